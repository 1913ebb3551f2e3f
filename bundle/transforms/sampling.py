"""Sampling: volumes to axial slices, slices to patches with the place they come from.

Units. A patch of ``p x p`` voxels that starts at row ``i`` of a slice of ``H`` rows lies at row ``(i + p/2) / H``:
the fraction of the slice's extent, 0 at the outer edge of the first voxel and 1 at that of the last; columns alike.
Slice ``k`` of ``D`` has the slice position ``(k + 0.5) / D``. Rows run left to right, columns back to front (RAS).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable

from bundle.data import collate_samples

from .normative import NormativeMap, hold, load_normative


def slice_position(index: Any, depth: int) -> Any:
    """Position of axial slice ``index`` (a number or a tensor of them) among ``depth`` slices, in [0, 1]."""
    return (index + 0.5) / depth


def patch_centers(start: torch.Tensor, patch_size: int, extent: int) -> torch.Tensor:
    """Centres, as fractions of ``extent`` voxels, of the patches whose first voxel is ``start``."""
    return (start + patch_size / 2) / extent


def patch_brain_share(image: torch.Tensor, patch_size: int, stride: int = 1) -> torch.Tensor:
    """Share of brain voxels (intensity > 0) in every patch of ``[B, 1, H, W]``: ``[B, 1, H', W']``."""
    return F.avg_pool2d((image > 0).float(), patch_size, stride)


def _name(data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
    return {"name": data["name"]} if "name" in data else {}


class FindBrainSlicesd(MapTransform):
    """List the axial slices that hold brain in ``brain_slices``, on the CPU, so that slices can be drawn from a volume
    on the GPU without waiting for it.

    Args:
        keys: the volume ``[1, H, W, D]``, 0 outside the brain.
        min_brain_share: slices with a smaller share of brain voxels are not listed.
    """

    def __init__(self, keys: str = "image", min_brain_share: float = 0.02) -> None:
        super().__init__(keys)
        self.min_brain_share = min_brain_share

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        share = (torch.as_tensor(data[self.keys[0]])[0] > 0).float().mean((0, 1)).cpu()
        found = torch.nonzero(share >= min(self.min_brain_share, float(share.max())))[:, 0]
        return {**data, "brain_slices": found}


class AxialSlicesd(MapTransform):
    """Take axial slices, evenly spread over those that hold brain: one dictionary per slice.

    Each holds ``image`` ``[1, H, W]``, the intensity, and ``slice_position`` ``[1, H, W]``, a plane filled with it. The
    network wants both as one image of two channels (`ConcatItemsd`); what changes intensities comes before. The scan's
    ``name`` is handed on to its slices and their patches, where there is one.

    Args:
        keys: the volume ``[1, H, W, D]``, with ``brain_slices`` beside it (`FindBrainSlicesd`).
        num_slices: how many.
    """

    def __init__(self, keys: str = "image", num_slices: int = 1) -> None:
        super().__init__(keys)
        self.num_slices = num_slices

    def choose(self, candidates: torch.Tensor) -> torch.Tensor:
        """Pick ``num_slices`` of the slice indices ``candidates``."""
        return candidates[torch.linspace(0, len(candidates) - 1, self.num_slices).round().long()]

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict[Hashable, Any]]:
        volume = data[self.keys[0]]
        volume = volume.as_tensor() if isinstance(volume, MetaTensor) else volume
        slices = []
        for k in self.choose(data["brain_slices"]).tolist():
            image = volume[:, :, :, k]
            plane = torch.full_like(image, slice_position(k, volume.shape[-1]))
            slices.append({self.keys[0]: image, "slice_position": plane, **_name(data)})
        return slices


class RandAxialSlicesd(AxialSlicesd, Randomizable):
    """Take ``num_slices`` axial slices at random (with replacement) instead of evenly spread ones."""

    def choose(self, candidates: torch.Tensor) -> torch.Tensor:
        return candidates[torch.as_tensor(self.R.randint(0, len(candidates), self.num_slices))]


def slabs(volumes: Sequence[torch.Tensor], slices: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Axial slices with those below and above them as channels, ``[B, len(volumes) * (2 * neighbours + 1), H, W]``:
    all of the first volume ``[1, H, W, D]``, then all of the next; 0 beyond the ends.
    """
    offsets = torch.arange(-neighbours, neighbours + 1)
    wanted = (slices.cpu()[:, None] + offsets + neighbours).flatten()
    found = []
    for volume in volumes:
        padded = F.pad(volume[0], (neighbours, neighbours))[..., wanted.to(volume.device)]
        found.append(padded.permute(2, 0, 1).unflatten(0, (len(slices), len(offsets))))
    return torch.cat(found, 1)


def with_normative(
    volume: torch.Tensor, normative: NormativeMap, contrast: str, held: bool = False
) -> list[torch.Tensor]:
    """A volume ``[1, H, W, D]``, and its z-score (`NormativeMap.z`), bounded to [-4, 10] and divided by 4; both of
    intensities in the range in which a difference tells, if they are ``held`` to it.
    """
    seen = hold(volume, normative.telling) if held else volume
    return [seen, normative.z(volume, contrast, telling=held).clamp(-4, 10) / 4]


class AxialSlabsd(MapTransform):
    """Take axial slices with their neighbours, intensity and z-score as channels (`with_normative`): one dictionary
    per slice, ``image`` ``[2 * (2 * neighbours + 1), H, W]`` and ``label`` ``[1, H, W]`` of the slice itself.

    Args:
        keys: the volume ``[1, H, W, D]``, with ``brain_slices`` beside it (`FindBrainSlicesd`).
        contrast: of the scan.
        normative: JSON file of the normative map; read when the first volume comes.
        num_slices: how many, evenly spread over those that hold brain.
        neighbours: on each side.
        label_key: the mask ``[1, H, W, D]``.
        held: see `with_normative`.
    """

    def __init__(
        self,
        keys: str = "image",
        contrast: str = "t1",
        normative: str = "",
        num_slices: int = 1,
        neighbours: int = 2,
        label_key: str = "label",
        held: bool = False,
    ) -> None:
        super().__init__(keys)
        self.contrast, self.normative, self.label_key = contrast, normative, label_key
        self.num_slices, self.neighbours, self.held = num_slices, neighbours, held

    def choose(self, candidates: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Pick ``num_slices`` of the slice indices ``candidates``; ``label`` is ``[1, H, W, D]``."""
        return candidates[torch.linspace(0, len(candidates) - 1, self.num_slices).round().long()]

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict[Hashable, Any]]:
        volume, label = (
            v.as_tensor() if isinstance(v, MetaTensor) else v for v in (data[self.keys[0]], data[self.label_key])
        )
        chosen = self.choose(data["brain_slices"], label)
        volumes = with_normative(volume, load_normative(self.normative), self.contrast, self.held)
        images = slabs(volumes, chosen, self.neighbours)
        return [
            {self.keys[0]: image, self.label_key: label[..., k], **_name(data)}
            for image, k in zip(images, chosen.tolist())
        ]


class RandAxialSlabsd(AxialSlabsd, Randomizable):
    """Slabs at random (with replacement): every second one, if there are any, with something marked in its slice."""

    def choose(self, candidates: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        marked = torch.nonzero(label[0].any(0).any(0).cpu())[:, 0]
        pools = [candidates, marked if len(marked) else candidates]
        drawn = [pools[i % 2][self.R.randint(0, len(pools[i % 2]))] for i in range(self.num_slices)]
        return torch.stack(drawn)


class RandPatchesd(MapTransform, Randomizable):
    """Cut random patches out of a slice: one dictionary per patch (the paper's own sampling is `CollateRandCentres`).

    Patches are drawn evenly from those whose brain share is at least ``min_brain_share``; a slice without any gives
    patches of weight 0. Each dictionary holds ``image`` ``[2, p, p]`` and ``label`` ``[3, 1, 1]``: row and column of
    the patch's centre (fractions of the slice) and the weight.

    Args:
        keys: the slice ``[2, H, W]``.
        label_key: where the location goes; MONAI's engines expect it in "label".
        patch_size: p, voxels.
        num_patches: per slice.
        min_brain_share: in [0, 1].
    """

    def __init__(
        self,
        keys: str = "image",
        label_key: str = "label",
        patch_size: int = 24,
        num_patches: int = 64,
        min_brain_share: float = 0.2,
    ) -> None:
        super().__init__(keys)
        self.label_key, self.patch_size = label_key, patch_size
        self.num_patches, self.min_brain_share = num_patches, min_brain_share

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict[Hashable, Any]]:
        image, p = data[self.keys[0]], self.patch_size
        valid = patch_brain_share(image[None, :1], p)[0, 0] >= self.min_brain_share
        starts = torch.nonzero(valid)
        weight = float(len(starts) > 0)
        if not weight:
            starts = torch.zeros(1, 2, dtype=torch.long)
        patches = []
        for i, j in starts[torch.as_tensor(self.R.randint(0, len(starts), self.num_patches))].tolist():
            label = torch.tensor([(i + p / 2) / image.shape[1], (j + p / 2) / image.shape[2], weight])
            window = image[:, i : i + p, j : j + p]
            patches.append({self.keys[0]: window, self.label_key: label[:, None, None], **_name(data)})
        return patches


class CollateRandCentres:
    """Collate a batch's slices and cut random patches out of all of them together, as the paper's code does.

    Voxels are drawn evenly over the slices, brain or not. The patch of each starts ``patch_size // 2`` voxels before
    it, as in inference, with background beyond the slice; those with too little brain are left out. Gives a batch of
    ``image`` ``[N, 2, p, p]`` and ``label`` ``[N, 3, 1, 1]`` as in `RandPatchesd` (two of weight 0 where none is left),
    and the ``name`` of every scan in it.

    It draws from torch's own generator, which checkpoints keep.

    Args:
        patch_size: p, voxels.
        num_centres: voxels drawn.
        min_brain_share: in [0, 1].
    """

    def __init__(self, patch_size: int = 24, num_centres: int = 4 * 8096, min_brain_share: float = 0.2) -> None:
        self.patch_size, self.num_centres, self.min_brain_share = patch_size, num_centres, min_brain_share

    def __call__(self, batch: list[Any]) -> dict[str, Any]:
        collated, p = collate_samples(batch), self.patch_size
        image, position = collated["image"][:, :1], collated["image"][:, 1]
        drawn = [torch.randint(n, (self.num_centres,), device=image.device) for n in (len(image), *image.shape[2:])]
        before = p // 2
        padded = F.pad(image, (before, p - before, before, p - before))
        windows = padded.unfold(2, p, 1).unfold(3, p, 1)[:, 0]
        patches = windows[tuple(drawn)]
        kept = torch.nonzero((patches > 0).float().mean((1, 2)) >= self.min_brain_share)[:, 0]
        weight = float(len(kept) > 0)
        if not weight:
            kept = kept.new_zeros(2)  # batch norm needs a batch
        patches, slices, rows, cols = (values[kept] for values in (patches, *drawn))
        plane = position[slices, rows, cols][:, None, None].expand_as(patches)
        place = [patch_centers(c - before, p, n) for c, n in zip((rows, cols), image.shape[2:])]
        label = torch.stack([*place, torch.full_like(place[0], weight)], 1)[:, :, None, None]
        names = {"name": collated["name"]} if "name" in collated else {}
        return {"image": torch.stack([patches, plane], 1), "label": label, **names}


class DenseLocationsd(MapTransform, Randomizable):
    """Keep the slice whole and give it the location of every patch that the network will see in it at ``stride``.

    The fully convolutional `PatchLocator` then learns from all patches of a slice in one pass. ``label`` is
    ``[3, H', W']`` as in `RandPatchesd`, weight 0 where the brain share is too small.

    Args:
        keys: the slice ``[2, H, W]``.
        label_key, patch_size, min_brain_share: as in `RandPatchesd`.
        stride: of the network's output, voxels.
        random_offset: crop up to ``stride - 1`` first rows and columns at random, so that every position is learned.
    """

    def __init__(
        self,
        keys: str = "image",
        label_key: str = "label",
        patch_size: int = 24,
        stride: int = 4,
        min_brain_share: float = 0.2,
        random_offset: bool = True,
    ) -> None:
        super().__init__(keys)
        self.label_key, self.patch_size, self.stride = label_key, patch_size, stride
        self.min_brain_share, self.random_offset = min_brain_share, random_offset

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image, p, s = data[self.keys[0]], self.patch_size, self.stride
        offset = self.R.randint(0, s, 2).tolist() if self.random_offset else [0, 0]
        # one size for every offset, so that slices can be stacked to a batch
        size = [(n - p - (s - 1)) // s * s + p if self.random_offset else n for n in image.shape[1:]]
        window = image[:, offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]]
        valid = patch_brain_share(window[None, :1], p, s)[0] >= self.min_brain_share
        rows, cols = (
            patch_centers(o + s * torch.arange(n), p, extent)
            for o, n, extent in zip(offset, valid.shape[1:], image.shape[1:])
        )
        location = torch.stack(torch.meshgrid(rows, cols, indexing="ij")).to(window)
        return {self.keys[0]: window, self.label_key: torch.cat([location, valid.float()]), **_name(data)}

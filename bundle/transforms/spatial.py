"""Geometry: from the scan's own voxels to the atlas grid, and back."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.networks.layers import gaussian_1d
from monai.transforms import InvertibleTransform, MapTransform, SpatialResample
from monai.utils import TraceKeys, ensure_tuple_rep
from scipy import ndimage

from bundle.data.atlas import grid_affine
from bundle.data.own_volume import own_voxel_mm3
from bundle.errors import InputError, require_monai


def gaussian_blur(volume: torch.Tensor, sigma: Sequence[float]) -> torch.Tensor:
    """Gaussian blur with the kernel of MONAI's `GaussianFilter`, which needs many times a large volume's memory.

    Args:
        volume: ``[C, X, Y, Z]``, of any type.
        sigma: of each axis, voxels.

    Returns:
        float32; computed on the CPU as if zeros lay outside the volume.
    """
    blurred = volume.cpu().numpy().astype(np.float32, copy=False)
    for axis, width in enumerate(sigma, 1):
        blurred = ndimage.correlate1d(blurred, gaussian_1d(torch.tensor(width)).numpy(), axis, mode="constant")
    return torch.as_tensor(blurred, device=volume.device)


class ResampleToGrid(SpatialResample):
    """Resample a volume once, from whatever voxels it has, to the atlas grid. Invertible.

    Where the grid is coarser than the scan, the scan is first smoothed to the grid's resolution (a Gaussian whose
    full width at half maximum makes up the difference), so that a 1 mm scan sampled at 2 mm looks like a 2 mm scan
    instead of carrying the noise of every eighth voxel.

    Args:
        spacing: mm.
        spatial_size: voxels of the grid.
        center: of the grid, atlas mm.

    Raises:
        InputError: a MONAI that resamples wrongly.
    """

    def __init__(self, spacing: float, spatial_size: Sequence[int], center: Sequence[float]) -> None:
        require_monai()
        super().__init__(padding_mode="zeros", align_corners=True, dtype=np.float32)
        self.spacing = float(spacing)
        self.spatial_size = tuple(spatial_size)
        self.grid_affine = torch.as_tensor(grid_affine(spacing, spatial_size, center))

    def __call__(self, img: MetaTensor, mode: str = "bilinear") -> Any:
        """Args: img ``[C, X, Y, Z]``; mode "bilinear", or "nearest" for labels, which are never smoothed."""
        if mode == "bilinear":
            voxel = np.linalg.norm(np.asarray(img.affine)[:3, :3], axis=0)
            fwhm = np.sqrt(np.maximum(self.spacing**2 - voxel**2, 0)) / voxel
            if (fwhm > 0.1).any():
                img = MetaTensor(gaussian_blur(img.as_tensor(), fwhm / 2.355)).copy_meta_from(img)
        return super().__call__(img, dst_affine=self.grid_affine, spatial_size=self.spatial_size, mode=mode)

    def inverse(self, data: MetaTensor) -> MetaTensor:
        """Back to the scan's own voxels, computed in the box around what is not 0: a head is mostly not brain."""
        step = data.applied_operations[-1]
        size, affine = step[TraceKeys.ORIG_SIZE], torch.as_tensor(step[TraceKeys.EXTRA_INFO]["src_affine"])
        box = ndimage.find_objects((data.as_tensor() != 0).any(0).cpu().numpy().astype(np.uint8))
        ends = [(s.start - 1, s.stop) for s in box[0]] if box else [(0, 0)] * 3  # interpolation reaches one voxel on
        corners = np.array(np.meshgrid(*ends, [1.0])).reshape(4, -1)
        places = (np.linalg.inv(np.asarray(affine, float)) @ np.asarray(data.affine, float) @ corners)[:3]
        first = np.clip(np.floor(places.min(1)).astype(int), 0, np.array(size) - 1)
        last = np.clip(np.ceil(places.max(1)).astype(int) + 1, first + 1, size)
        shift = torch.eye(4, dtype=affine.dtype)
        shift[:3, 3] = torch.as_tensor(first)
        step[TraceKeys.ORIG_SIZE] = (last - first).tolist()
        step[TraceKeys.EXTRA_INFO]["src_affine"] = affine @ shift
        part: Any = super().inverse(data)
        whole = torch.zeros(part.shape[0], *size, device=part.device)
        whole[(slice(None), *(slice(a, b) for a, b in zip(first, last)))] = part.as_tensor()
        back = MetaTensor(whole).copy_meta_from(part)
        back.affine = affine
        return back


class ResampleToGridd(MapTransform, InvertibleTransform):
    """Dictionary form of `ResampleToGrid` that lets no voxel outside the brain into the brain.

    Volumes of mode "bilinear" are set to 0 outside the brain mask and divided by the mask resampled alike: a voxel at
    the rim is a mean of brain voxels only, whether a skull, air or nothing lay beside it. On the grid, the mask holds
    the voxels of which at least half is brain.

    Args:
        keys: volumes ``[1, X, Y, Z]``.
        spacing, spatial_size, center: as in `ResampleToGrid`.
        mode: "bilinear" or "nearest", one for all keys or one per key.
        mask_key: brain mask on the scan's grid; moved too, not named in ``keys``. None: there is none.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spacing: float,
        spatial_size: Sequence[int],
        center: Sequence[float],
        mode: str | Sequence[str] = "bilinear",
        mask_key: str | None = "brain_mask",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.modes = ensure_tuple_rep(mode, len(self.keys))
        self.mask_key = mask_key
        self.resample = ResampleToGrid(spacing, spatial_size, center)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        inside, share, affine = None, None, None
        if self.mask_key:
            inside, affine = d[self.mask_key].as_tensor() > 0, d[self.mask_key].affine.clone()
            d[self.mask_key] = self.resample(d[self.mask_key])
            share = d[self.mask_key].as_tensor().clone()
            d[self.mask_key].set_((share >= 0.5).to(share))
        for key, mode in self.key_iterator(d, self.modes):
            volume = d[key]
            if mode == "bilinear" and inside is not None and volume.shape != inside.shape:
                sizes = ("x".join(map(str, v.shape[1:])) for v in (volume, inside))
                name = volume.meta.get("filename_or_obj", key)
                raise InputError(f"{name}: {' voxels where its scan has '.join(sizes)}; both must lie on one grid")
            if mode == "bilinear" and affine is not None and not torch.allclose(volume.affine, affine, atol=0.05):
                name = volume.meta.get("filename_or_obj", key)
                raise InputError(
                    f"{name}: lies elsewhere than its scan (affine of the header); write it with the scan's"
                )
            if mode == "bilinear" and inside is not None and share is not None:
                volume = MetaTensor(torch.where(inside, volume.as_tensor(), 0.0)).copy_meta_from(volume)
                if not volume.isfinite().all():  # one such voxel would take the level of the whole map
                    raise InputError(f"{volume.meta.get('filename_or_obj', key)}: has brain voxels that are not finite")
                volume = self.resample(volume)
                volume.set_(torch.where(share > 0.01, volume.as_tensor() / share.clamp(min=0.01), 0.0))
                d[key] = volume
            else:
                d[key] = self.resample(volume, mode)
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in (*self.key_iterator(d), self.mask_key):
            if key in d:
                d[key] = self.resample.inverse(d[key])
        return d


class KeepVolumed(MapTransform):
    """Make a mask out of one that was interpolated linearly, such that every region keeps its volume.

    A threshold of 0.5 makes small lesions smaller, and the nearest voxel makes all ragged. Here each connected region
    of the interpolated mask gets as many voxels as the sum of its values says, those of the highest values. Thin
    bridges can break by that: of a region in pieces the largest stays, and with it what can be a finding itself.

    Args:
        keys: masks in [0, 1], ``[1, X, Y, Z]``.
        min_lesion_mm3: least volume of a finding, mm^3 of the scan itself; a piece below half of it is a splinter.
    """

    def __init__(self, keys: KeysCollection, min_lesion_mm3: float = 0.0) -> None:
        super().__init__(keys)
        self.min_lesion_mm3 = min_lesion_mm3

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            share = d[key].as_tensor()[0].cpu().numpy()
            kept = np.zeros_like(share)
            least = self.min_lesion_mm3 / 2 / own_voxel_mm3(d[key])
            regions, _ = ndimage.label(share > 0.01, np.ones((3, 3, 3)))
            for number, box in enumerate(ndimage.find_objects(regions), 1):
                values = np.where(regions[box] == number, share[box], 0)
                strongest = np.argsort(-values, axis=None, kind="stable")[: round(float(values.sum()))]
                whole = np.zeros(values.shape, bool)
                whole.flat[strongest] = True
                pieces, _ = ndimage.label(whole, np.ones((3, 3, 3)))
                sizes = np.bincount(pieces[whole], minlength=2)
                kept[box][((sizes >= least) | (sizes == sizes.max()))[pieces] & whole] = 1
            d[key] = MetaTensor(torch.as_tensor(kept)[None]).copy_meta_from(d[key])
        return d

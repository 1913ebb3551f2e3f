"""What lies between a head and its file: coils, thick slices, and a brain mask that is not quite right."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandomizableTransform

from .tissue import TISSUES


def average_slices(volume: torch.Tensor, slices: int, axis: int) -> torch.Tensor:
    """Means of ``volume`` ``[..., X, Y, Z]`` over ``slices`` slabs of equal thickness along one of its last three axes;
    a slice that lies in two slabs counts in both by its share.
    """
    dim = volume.ndim - 3 + axis
    size = volume.shape[dim]
    total = F.pad(volume.cumsum(dim).movedim(dim, -1), (1, 0))
    edges = torch.linspace(0, size, slices + 1, dtype=volume.dtype, device=volume.device)
    below = edges.floor().long().clamp(max=size - 1)
    part = edges - below
    at_edges = total[..., below] * (1 - part) + total[..., below + 1] * part
    return (at_edges.diff(dim=-1) * (slices / size)).movedim(-1, dim)


class RandThickSlicesd(RandomizableTransform, MapTransform):
    """Average over slices of several mm along one axis (axial slices most often).

    Voxels outside the brain (0) are left out of the averages, as `ResampleToGridd` does.

    Args:
        keys: volumes ``[1, X, Y, Z]``, 0 outside the brain.
        spacing: of the grid, mm.
        thickness_mm: range to draw from.
        prob: that slices are thick.
        axial: share of axial slices among them; the rest is sagittal or coronal.
        interpolate: between the slices, so that the volume keeps its shape, as on the atlas grid. Otherwise the thick
            slices are all there is, as in a scanner's file: fewer, and the affine says so; voxels of which at least
            half is brain are brain.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spacing: float,
        thickness_mm: tuple[float, float] = (3.0, 6.0),
        prob: float = 0.5,
        axial: float = 0.7,
        interpolate: bool = True,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.spacing, self.thickness_mm, self.axial = spacing, thickness_mm, axial
        self.interpolate = interpolate

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return d
        axis = 2 if self.R.rand() < self.axial else self.R.randint(2)
        factor = self.R.uniform(*self.thickness_mm) / self.spacing
        if factor <= 1:
            return d
        for key in self.key_iterator(d):
            volume = d[key].as_tensor()
            inside = (volume > 0).to(volume)
            size = volume.shape[1 + axis]
            slices = max(1, round(size / factor))
            thick = average_slices(torch.stack([volume, inside]), slices, axis)
            if self.interpolate:
                thick = F.interpolate(thick, list(volume.shape[1:]), mode="trilinear")
                kept = inside > 0
            else:
                kept = thick[1] >= 0.5
            image = MetaTensor(torch.where(kept, thick[0] / thick[1].clamp(min=1e-3), 0.0)).copy_meta_from(d[key])
            if not self.interpolate:
                step = torch.eye(4, dtype=image.affine.dtype, device=image.affine.device)
                step[axis, axis] = size / slices
                step[axis, 3] = (size / slices - 1) / 2  # the middle of the first slab
                image.affine = image.affine @ step
            d[key] = image
        return d


def coil_shading(
    inside: np.ndarray, affine: np.ndarray, strength: float, random: np.random.RandomState, radius_mm: float = 130.0
) -> np.ndarray:
    """Shading of a receive coil: the sum of the broad Gaussian sensitivities of some elements around the head.

    Args:
        inside: brain ``[X, Y, Z]``.
        affine: voxels to mm.
        strength: the field reaches from ``1 - strength`` to ``1 + strength`` in the brain.
        random: draws the elements: where they sit, how strong and how wide they are.
        radius_mm: distance of the elements from the middle of the brain.

    Returns:
        the factor on every voxel's intensity, ``[X, Y, Z]``, float32; positive outside the brain, too.
    """
    index = np.stack(np.meshgrid(*map(np.arange, inside.shape), indexing="ij"), -1).astype(np.float32)
    world = index @ affine[:3, :3].T.astype(np.float32) + affine[:3, 3].astype(np.float32)
    middle = world[inside].mean(0)
    total = np.zeros(inside.shape, np.float32)
    for _ in range(random.randint(3, 9)):
        towards = random.standard_normal(3)
        place = middle + radius_mm * towards / np.linalg.norm(towards)
        width = random.uniform(0.6, 1.0) * radius_mm
        total += random.uniform(0.3, 1.0) * np.exp(-((world - place) ** 2).sum(-1) / (2 * width**2))
    low, high = total[inside].min(), total[inside].max()
    field = 1 + strength * (2 * (total - low) / max(high - low, 1e-12) - 1)
    return np.maximum(field, 0.1).astype(np.float32)


class RandCoilShadingd(RandomizableTransform, MapTransform):
    """Shade scans as a coil does, see `coil_shading`.

    Args:
        keys: volumes ``[1, X, Y, Z]``, 0 outside the brain.
        strength: range to draw from.
        prob: that a scan is shaded.
    """

    def __init__(self, keys: KeysCollection, strength: tuple[float, float] = (0.0, 0.3), prob: float = 1.0) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.strength = strength

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return d
        for key in self.key_iterator(d):
            image = d[key].as_tensor()
            inside = image[0].cpu().numpy() > 0
            field = coil_shading(inside, np.asarray(d[key].affine.cpu()), self.R.uniform(*self.strength), self.R)
            d[key] = MetaTensor(image * torch.as_tensor(field[None]).to(image)).copy_meta_from(d[key])
        return d


class RandSkullStripErrord(RandomizableTransform, MapTransform):
    """Take off the brain mask what skull strippers take off: fluid at the surface, or a voxel all around.

    Args:
        keys: brain masks ``[1, X, Y, Z]``.
        tissue_key: tissue shares, of which the first is fluid.
        prob: that the mask is changed.
    """

    def __init__(self, keys: KeysCollection = "brain_mask", tissue_key: str = "tissue", prob: float = 0.5) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.tissue_key = tissue_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        self.randomize(None)
        depth, fluid = self.R.randint(1, 4), self.R.uniform(0.3, 0.7)
        if not self._do_transform:
            return d
        for key in self.key_iterator(d):
            mask = (d[key].as_tensor() > 0).float()
            core = -F.max_pool3d(-mask, 2 * depth + 1, 1, depth)  # further than `depth` voxels from the surface
            if depth == 1:
                kept = core
            else:
                csf = d[self.tissue_key].as_tensor()[TISSUES.index("csf")]
                kept = mask * ((core > 0) | (csf[None] < fluid))
            d[key] = MetaTensor(kept).copy_meta_from(d[key])
        return d

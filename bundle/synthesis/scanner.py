"""What lies between a head and its file: thick slices, and a brain mask that is not quite right."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandomizableTransform

from .tissue import TISSUES


class RandThickSlicesd(RandomizableTransform, MapTransform):
    """Average over slices of several mm and interpolate between them, along one axis (axial slices most often).

    Voxels outside the brain (0) are left out of the averages, as `ResampleToGridd` does.

    Args:
        keys: volumes ``[1, X, Y, Z]``.
        spacing: of the grid, mm.
        thickness_mm: range to draw from.
        prob: that slices are thick.
        axial: share of axial slices among them; the rest is sagittal or coronal.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spacing: float,
        thickness_mm: tuple[float, float] = (3.0, 6.0),
        prob: float = 0.5,
        axial: float = 0.7,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.spacing, self.thickness_mm, self.axial = spacing, thickness_mm, axial

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
            size = list(volume.shape[1:])
            slices = [max(1, round(n / factor)) if i == axis else n for i, n in enumerate(size)]
            blurred = torch.stack([volume, inside])
            blurred = F.interpolate(F.interpolate(blurred, slices, mode="area"), size, mode="trilinear")
            image = torch.where(inside > 0, blurred[0] / blurred[1].clamp(min=1e-3), 0.0)
            d[key] = MetaTensor(image).copy_meta_from(d[key])
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

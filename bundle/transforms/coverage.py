"""What was not looked at: the part of a brain that the grid leaves out."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage

from bundle.data.atlas import grid_affine
from bundle.data.own_volume import scan_to_atlas

EXAMINED, NOT_EXAMINED = 1, 2  # values of a coverage mask; 0 is not brain


class MarkCoveraged(MapTransform):
    """Tell which part of the brain the grid will hold, before the scan is resampled to it.

    Leaves in ``output_key`` a uint8 ``[1, X, Y, Z]`` on the scan's grid (0 not brain, 1 brain on the grid, 2 brain
    outside it, by the voxels' centres), and in ``share_key`` the share of the brain outside, in [0, 1]. A share that
    an item of a prepared dataset brings along, which its own preparation left out, counts too.

    Args:
        keys: the brain mask ``[1, X, Y, Z]`` (one key), in the atlas' world.
        spacing, spatial_size, center: of the grid, see `ResampleToGrid`.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spacing: float,
        spatial_size: Sequence[int],
        center: Sequence[float],
        output_key: str = "coverage",
        share_key: str = "not_examined",
    ) -> None:
        super().__init__(keys)
        self.to_grid = np.linalg.inv(grid_affine(spacing, spatial_size, center))
        self.spatial_size, self.output_key, self.share_key = tuple(spatial_size), output_key, share_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        mask = d[self.keys[0]]
        coverage = (mask.as_tensor() > 0).to(torch.uint8).cpu()
        brain = coverage[0].numpy()  # what is written to the one is written to the other
        box = ndimage.find_objects(brain)[0] if brain.any() else None
        before = float(d.get(self.share_key, 0.0))
        now = 0.0
        if box is not None:
            part = brain[box]
            part[~self._inside(np.asarray(mask.affine, float), box) & (part > 0)] = NOT_EXAMINED
            now = float((part == NOT_EXAMINED).sum() / (part > 0).sum())
        d[self.output_key] = MetaTensor(coverage).copy_meta_from(mask)
        d[self.share_key] = 1 - (1 - before) * (1 - now)
        return d

    def _inside(self, affine: np.ndarray, box: Sequence[slice]) -> np.ndarray:
        """Which voxels of a box have their centre on the grid: between the outer edges of its first and last voxels."""
        matrix = self.to_grid @ affine
        axes = np.meshgrid(*(np.arange(s.start, s.stop, dtype=np.float32) for s in box), indexing="ij", sparse=True)
        inside = np.ones([s.stop - s.start for s in box], bool)
        for row, size in zip(matrix[:3].astype(np.float32), self.spatial_size):
            place = sum((factor * axis for factor, axis in zip(row, axes)), row[3])
            inside &= (place >= -0.5) & (place <= size - 0.5)
        return inside


class RestoreCoveraged(MapTransform):
    """Bring coverage masks back to the scan as it was: its affine, and its order of voxels. No voxel is interpolated.

    Args:
        keys: coverage masks as `MarkCoveraged` leaves them, on the scan's RAS grid in the atlas' world.
        like_key: what was inverted to the scan's own voxels already.
    """

    def __init__(self, keys: KeysCollection, like_key: str = "heatmap", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.like_key = like_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        like = d[self.like_key].affine
        for key in self.key_iterator(d):
            affine = np.linalg.inv(scan_to_atlas(d[key])) @ np.asarray(d[key].affine, float)
            # from index to index: whole steps along the axes, in another order
            order = nib.io_orientation(np.linalg.inv(np.asarray(like, float)) @ affine)
            turned = nib.orientations.apply_orientation(d[key].as_tensor()[0].cpu().numpy(), order)
            d[key] = MetaTensor(torch.as_tensor(np.ascontiguousarray(turned))[None], affine=like)
        return d

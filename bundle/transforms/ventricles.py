"""Wider ventricles, as old people have them, in scans of healthy people."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import convert_to_dst_type
from scipy import ndimage

from .anomalies import fluid_in

_CELLS = 4  # across the volume: of the random field that widens one part more than another
_EVEN = 0.2  # of the steepest border: borders that are much steeper than this move alike


class RandWideVentriclesd(RandomizableTransform, MapTransform):
    """Widen the fluid deep inside a healthy brain, in places more than in others; what surrounds it is pushed away.

    Fluid is what is as bright as fluid in this contrast. Its borders move outwards by up to 1.25 times the reach, along
    the gradient of the fluid smoothed by the reach, so that wide ventricles move more than narrow sulci.

    Args:
        keys: normalised volume ``[1, H, W, D]``, 0 outside the brain (one key).
        contrast: "t1", "t2" or "flair"; tells how bright fluid is.
        prob: share of the volumes that are changed.
        reach: least and largest reach, voxels.
        depth: fluid nearer to the surface of the brain than this is no part of it, voxels.
    """

    def __init__(
        self,
        keys: KeysCollection,
        contrast: str,
        prob: float = 0.35,
        reach: tuple[float, float] = (2.0, 6.0),
        depth: float = 10.0,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.contrast, self.reach, self.depth = contrast, reach, depth

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return d
        given = d[self.keys[0]]
        image = torch.as_tensor(given)[0].cpu().numpy().astype(np.float32)
        where = np.indices(image.shape) + self._field(image)
        moved = ndimage.map_coordinates(image, where, order=1, mode="nearest")
        moved *= ndimage.map_coordinates((image > 0).astype(np.float32), where, order=0, mode="nearest")
        d[self.keys[0]] = convert_to_dst_type(moved[None], given)[0]
        return d

    def _field(self, image: np.ndarray) -> np.ndarray:
        """Where each voxel's new brightness comes from, voxels away, ``[3, H, W, D]``."""
        reach, most = self.R.uniform(*self.reach), self.R.uniform(0.3, 1.5)
        cells = self.R.uniform(0.2, 1.2, (_CELLS,) * 3)
        deep = ndimage.distance_transform_edt(ndimage.binary_fill_holes(image > 0)) > self.depth
        fluid = ndimage.binary_opening(fluid_in(image, self.contrast) & deep).astype(np.float32)
        towards = np.stack(np.gradient(ndimage.gaussian_filter(fluid, reach)))
        steep = np.linalg.norm(towards, axis=0)
        share = ndimage.zoom(cells, np.array(image.shape) / _CELLS, order=1, grid_mode=True, mode="nearest").clip(0, 1)
        return (towards * (reach * most * share / (steep + max(_EVEN * steep.max(), 1e-6)))).astype(np.float32)

"""Intensity: every brain on one scale, and 0 kept for what is not brain."""

from __future__ import annotations

from typing import Hashable, Mapping

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from bundle.errors import InputError

# The lowest value of a brain voxel. 0 is kept for the outside, so that a volume carries its own brain mask
# through the inferer (whose signature has no room for a second volume).
LOWEST_BRAIN_INTENSITY = 1e-3


class NormalizeBrainIntensityd(MapTransform):
    """Map two percentiles of the brain's intensities to 0 and 1, linearly, and everything outside the brain to 0.

    Brain voxels are clipped to [0.001, ``highest``]: never 0, and bright lesions keep their contrast above 1.
    Doing it twice changes nothing that matters, so prepared data may go through it again.

    Args:
        keys: volumes ``[1, X, Y, Z]``.
        mask_key: brain mask on the same grid.
        lower, upper: percentiles.
        highest: upper clip, in units of the scaled range.

    Raises:
        InputError: the brain holds no two different intensities, or values that are not finite.
    """

    def __init__(
        self,
        keys: KeysCollection,
        mask_key: str = "brain_mask",
        lower: float = 1.0,
        upper: float = 99.0,
        highest: float = 2.0,
    ) -> None:
        super().__init__(keys)
        self.mask_key, self.lower, self.upper, self.highest = mask_key, lower, upper, highest

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        d = dict(data)
        inside = d[self.mask_key] > 0
        for key in self.key_iterator(d):
            name = d[key].meta.get("filename_or_obj", key)
            values = d[key][inside].float().cpu().numpy()
            if values.size == 0:
                raise InputError(f"{name}: no brain in the field of the atlas grid; check its orientation and alignment")
            if not np.isfinite(values).all():
                raise InputError(f"{name}: {np.sum(~np.isfinite(values))} brain voxels are not finite; repair the scan")
            low, high = np.percentile(values, [self.lower, self.upper])
            if high - low < 1e-6 * max(abs(high), 1e-30) or high == low:
                raise InputError(f"{name}: the brain has one constant intensity ({low:g}); not an image")
            scaled = ((d[key] - low) / (high - low)).clamp(LOWEST_BRAIN_INTENSITY, self.highest)
            d[key] = torch.where(inside, scaled, torch.zeros_like(scaled))
        return d

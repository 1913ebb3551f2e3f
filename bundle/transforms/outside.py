"""Scores leave the atlas without a dark rim around the brain."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform


class FillOutsided(MapTransform):
    """After volumes, masked (MONAI's `MaskIntensityd`), and their mask have been interpolated alike: divide the one by
    the other, so that voxels at the rim are means of brain voxels only, and give what is outside the lowest value
    inside.

    Leaves the mask binary: 1 where at least half of the interpolation came from the brain.

    Args:
        keys: volumes ``[1, X, Y, Z]``, masked before they were interpolated.
        mask_key: the mask, interpolated linearly.
    """

    def __init__(self, keys: KeysCollection, mask_key: str = "brain_mask") -> None:
        super().__init__(keys)
        self.mask_key = mask_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        weight = d[self.mask_key]
        inside = weight.as_tensor() >= 0.5
        for key in self.key_iterator(d):
            volume = d[key].clone()
            values = volume.as_tensor() / weight.as_tensor().clamp(min=1e-6)
            values[~inside] = values[inside].min() if inside.any() else 0.0
            volume.set_(values)
            d[key] = volume
        d[self.mask_key] = MetaTensor(inside.float()).copy_meta_from(weight)
        return d

"""Masks of lesions that come with a scan: checked, and what in them counts for nothing."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from bundle.errors import InputError

from .brain import mask_volume_ml

_LARGEST_LESION_ML = 1000.0


class CheckLabelsd(MapTransform):
    """Refuse masks of lesions that cannot be any: they would be measured all the same.

    Args:
        keys: label maps, 0 where there is no lesion.
        image_key: the scan.

    Raises:
        InputError: a value that is not finite; no 0 at all, or more than a litre marked; lesions of which none lies in
            the scan's field of view.
    """

    def __init__(self, keys: KeysCollection, image_key: str = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            label, file = d[key].as_tensor()[0], d[key].meta.get("filename_or_obj", key)
            if not label.isfinite().all():
                raise InputError(f"{file}: holds values that are not finite; a mask of lesions is 0 outside them")
            marked = label > 0
            volume_ml = mask_volume_ml(marked, d[key])
            if marked.all() or volume_ml > _LARGEST_LESION_ML:
                raise InputError(f"{file}: marks {volume_ml:.0f} ml; a mask of lesions is 0 outside them")
            if marked.any() and not _meet(marked, d[key].affine, d[self.image_key]):
                raise InputError(f"{file}: its lesions lie outside the scan; is it of the same person and space?")
        return d


def _meet(marked: torch.Tensor, affine: Any, image: MetaTensor) -> bool:
    """Whether a voxel of a mask ``[X, Y, Z]`` with ``affine`` lies in the field of view of ``image``."""
    where = np.argwhere(marked.numpy())
    to_image = np.linalg.inv(np.asarray(image.affine, float)) @ np.asarray(affine, float)
    index = where @ to_image[:3, :3].T + to_image[:3, 3]
    return bool(((index > -1) & (index < np.array(image.shape[1:]))).all(1).any())


class IgnoreLabelsd(MapTransform):
    """Set the voxels whose label an item lists in ``ignored_labels`` to -1: neither lesion nor healthy when methods
    are scored. Other items are left as they are.

    Args:
        keys: label maps.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        ignored = torch.as_tensor(d.get("ignored_labels", []))
        for key in self.key_iterator(d):
            d[key] = d[key].masked_fill(torch.isin(d[key].as_tensor(), ignored.to(d[key].dtype)), -1)
        return d

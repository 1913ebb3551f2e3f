"""Masks of lesions that come with a scan: checked, and what in them counts for nothing."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from bundle.errors import InputError, flag

from .brain import mask_volume_ml

_LARGEST_LESION_ML, _LARGEST_SHIFT_MM = 1000.0, 2.0


class CheckLabelsd(MapTransform):
    """Refuse masks of lesions that cannot be any: they would be measured all the same. Flag what lies elsewhere than
    its scan: a mask of the scan's shape whose header puts it more than 2 mm away, and lesions of which most lie outside
    the scan's field of view. Adds ``has_lesions`` (bool), for those that are lost on the way to a grid.

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
            d["has_lesions"] = bool(marked.any())
            share = _share_within(marked, d[key].affine, d[self.image_key]) if marked.any() else 1.0
            if share == 0:
                raise InputError(f"{file}: its lesions lie outside the scan; is it of the same person and space?")
            apart = _apart_mm(d[key], d[self.image_key]) if d[key].shape == d[self.image_key].shape else 0.0
            name = Path(str(file)).name
            if apart > _LARGEST_SHIFT_MM:
                d = flag(d, f"{name} has its scan's voxels, but lies up to {apart:.0f} mm elsewhere by its header")
            elif share < 0.5:
                d = flag(d, f"{name}: {1 - share:.0%} of its lesions lie outside the scan")
        return d


def _share_within(marked: torch.Tensor, affine: Any, image: MetaTensor) -> float:
    """Share of the voxels of a mask ``[X, Y, Z]`` with ``affine`` that lie in the field of view of ``image``."""
    where = np.argwhere(marked.numpy())
    to_image = np.linalg.inv(np.asarray(image.affine, float)) @ np.asarray(affine, float)
    index = where @ to_image[:3, :3].T + to_image[:3, 3]
    return float(((index > -1) & (index < np.array(image.shape[1:]))).all(1).mean())


def _apart_mm(label: MetaTensor, image: MetaTensor) -> float:
    """How far the boxes of two volumes of one shape lie apart: the farthest of a corner's nearest ones. Axes that are
    stored the other way round, as their header says, share the corners.
    """
    ends = np.array([[*corner, 1.0] for corner in np.ndindex(2, 2, 2)]) * [*np.subtract(image.shape[1:], 1), 1]
    boxes = [(ends @ np.asarray(volume.affine, float).T)[:, None, :3] for volume in (label, image)]
    return float(np.linalg.norm(boxes[0] - boxes[1].swapaxes(0, 1), axis=-1).min(1).max())


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

"""Brain that its mask left out: taken back where the scan shows it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage

from bundle.data.atlas import load_atlas
from bundle.data.own_volume import own_voxel_mm3
from bundle.errors import InputError, flag

_LATTICE_MM = 2.0
# A good mask may leave out a rim: of 50 masks (30 of healthy heads, 20 of scans with multiple sclerosis), two, of one
# head, left out 2 ml at this depth below the surface of the atlas' brain, and they reached 4.5 mm from the mask.
_RIM_MM, _LEAST_REACH_MM = 6.0, 5.0
_LEAST_ML, _LEAST_MISSING_ML = 1.0, 3.0
_LEAST_SIGNAL = 0.1  # of the brain's median; fluid on FLAIR has more, air has less
# below this overlap with the atlas' brain (Dice), nobody can tell what is missing
_LEAST_OVERLAP = 0.85


@lru_cache(maxsize=2)
def _atlas_depth(template: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Of an atlas in steps of about 2 mm: depth below its brain's surface ``[X, Y, Z]`` (mm, 0 outside), and affine."""
    mask = load_atlas(template).brain_mask
    affine = np.asarray(mask.affine, float)
    steps = [max(1, round(_LATTICE_MM / voxel)) for voxel in np.linalg.norm(affine[:3, :3], axis=0)]
    brain = np.pad(mask[0].numpy()[:: steps[0], :: steps[1], :: steps[2]] > 0, 1)
    affine = affine @ np.diag([*steps, 1.0])
    depth = ndimage.distance_transform_edt(brain, sampling=np.linalg.norm(affine[:3, :3], axis=0))
    return depth[1:-1, 1:-1, 1:-1], affine


def _sample(volume: np.ndarray, matrix: np.ndarray, shape: Any, outside: float = 0.0) -> np.ndarray:
    """``volume`` at the voxels of another grid, linearly; ``matrix`` leads from their indices to its own."""
    return ndimage.affine_transform(
        volume, matrix, output_shape=tuple(shape), output=np.float32, order=1, mode="constant", cval=outside
    )


class RecoverBraind(MapTransform):
    """Give back to the brain mask what it lacks of the brain, by the atlas: a stripping that was made for healthy
    adults cuts off tumours, and masks that are handed in have holes.

    What counts is the atlas' brain but for a rim of 6 mm, and whatever the mask encloses. Regions of it that are
    outside the mask, have at least 1 ml and reach 5 mm away from the mask are added, grown to the surface of the atlas'
    brain, where the scan has signal there; both, and what has none (it was cut away, if it is more than 3 ml), are
    flagged. Items of a prepared dataset (``prepared``), and brains that do not lie on the atlas, are left as they are.

    Args:
        keys: the scan ``[1, X, Y, Z]`` (one key), in the atlas' world.
        mask_key: its brain mask on the same grid; keeps its affine and history.
        method: "atlas", or "none" to leave the mask as it is.
        atlas: see `load_atlas`.
    """

    def __init__(
        self, keys: str = "image", mask_key: str = "brain_mask", method: str = "atlas", atlas: str | None = None
    ) -> None:
        super().__init__(keys)
        if method not in ("atlas", "none"):
            raise InputError(f"brain_recovery '{method}' is unknown: use 'atlas' or 'none'")
        self.mask_key, self.method, self.atlas = mask_key, method, atlas

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if self.method == "none" or d.get("prepared") or not (d[self.mask_key] > 0).any():
            return d
        image, mask = d[self.keys[0]], d[self.mask_key]
        values, brain = (v.as_tensor()[0].cpu().float().numpy() for v in (image, mask))
        depth, affine = _atlas_depth(self.atlas)
        to_scan = np.linalg.inv(np.asarray(mask.affine, float)) @ affine
        own_ml = own_voxel_mm3(mask) / 1000
        voxel_ml = own_ml / abs(np.linalg.det(np.linalg.inv(to_scan)[:3, :3]))
        least = _least_signal(values[brain > 0])
        scan = _sample(values, to_scan, depth.shape, outside=np.nan)
        inside = _sample(brain, to_scan, depth.shape) >= 0.5
        expected = (depth > 0) & ~np.isnan(scan)
        if 2 * (inside & expected).sum() < _LEAST_OVERLAP * (inside.sum() + expected.sum()):
            return d
        known = (values != 0) & (values != _background(values))
        there = _sample(known.astype(np.float32), to_scan, depth.shape) >= 0.5
        signal = there & (scan > least)
        voxel_mm = np.linalg.norm(affine[:3, :3], axis=0)
        deep = (depth >= _RIM_MM) & expected & ~inside
        left_out = _far_regions(deep & signal, inside, voxel_mm, _LEAST_ML / voxel_ml)
        left_out = _grown(left_out, (depth > 0) & signal & ~inside, voxel_mm)
        holes = ndimage.binary_fill_holes(inside) & ~inside & there
        left_out |= _regions(holes, _LEAST_ML / voxel_ml)[0]
        missing = _far_regions(deep & ~signal & ~left_out, inside, voxel_mm, _LEAST_ML / voxel_ml)
        missing = _grown(missing, (depth > 0) & expected & ~signal & ~inside & ~left_out, voxel_mm)
        if left_out.any():
            added = _bring_back(left_out, inside, np.linalg.inv(to_scan), brain.shape) & (brain == 0) & known
            whole = torch.as_tensor(np.where(added, 1.0, brain), dtype=mask.dtype)[None]
            d[self.mask_key] = MetaTensor(whole.to(mask.device)).copy_meta_from(mask)
            d = flag(d, f"{added.sum() * own_ml:.0f} ml of the brain, left out by its mask, were taken back")
        if missing.sum() * voxel_ml > _LEAST_MISSING_ML:
            d = flag(d, f"{missing.sum() * voxel_ml:.0f} ml of the brain are missing from the scan")
        return d


def _background(values: np.ndarray) -> float:
    """What stands in the corners of a scan: where intensities were shifted, a blanked background is not 0."""
    corners = values[:: values.shape[0] - 1 or 1, :: values.shape[1] - 1 or 1, :: values.shape[2] - 1 or 1]
    found, counts = np.unique(corners, return_counts=True)
    return float(found[counts.argmax()])


def _least_signal(brain: np.ndarray) -> float:
    """The intensity above which a voxel is no air; of scans that were brought to a mean of 0, none is known."""
    if (brain < 0).mean() > 0.05:
        return -np.inf
    return _LEAST_SIGNAL * float(np.median(brain))


def _regions(where: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``where`` without connected regions (6 neighbours) of fewer than ``least`` voxels, their labels, and the numbers
    of those that stay.
    """
    labels, _ = ndimage.label(where)
    kept = 1 + np.flatnonzero(np.bincount(labels.ravel())[1:] >= least)
    return np.isin(labels, kept) if kept.size else np.zeros(where.shape, bool), labels, kept


def _far_regions(where: np.ndarray, inside: np.ndarray, voxel_mm: np.ndarray, least: float) -> np.ndarray:
    """Connected regions of at least ``least`` voxels that reach far away from ``inside``."""
    found, labels, kept = _regions(where, least)
    if not kept.size:
        return found
    reach = ndimage.maximum(ndimage.distance_transform_edt(~inside, sampling=voxel_mm), labels, kept)
    return np.isin(labels, kept[np.asarray(reach) >= _LEAST_REACH_MM])


def _grown(region: np.ndarray, where: np.ndarray, voxel_mm: np.ndarray) -> np.ndarray:
    """A region that was looked for below the rim, and what of ``where`` is near enough to be the rim above it."""
    if not region.any():
        return region
    near = ndimage.distance_transform_edt(~region, sampling=voxel_mm) <= _RIM_MM + _LATTICE_MM
    return region | (near & where)


def _bring_back(region: np.ndarray, inside: np.ndarray, to_lattice: np.ndarray, shape: Any) -> np.ndarray:
    """A region beside a mask, from the lattice to the scan's voxels, such that no gap is left between the two.

    Args:
        region, inside: on the lattice.
        to_lattice: from indices of the scan to those of the lattice.
        shape: of the scan.
    """
    around = ndimage.binary_dilation(region, np.ones((3, 3, 3)), 2)
    corners = np.argwhere(around)
    ends = np.array([corners.min(0), corners.max(0)])
    box = np.array(np.meshgrid(*ends.T, [1.0])).reshape(4, -1)
    places = (np.linalg.inv(to_lattice) @ box)[:3]
    first = np.clip(np.floor(places.min(1)).astype(int), 0, shape)
    last = np.clip(np.ceil(places.max(1)).astype(int) + 1, 0, shape)
    start = to_lattice.copy()
    start[:3, 3] += to_lattice[:3, :3] @ first
    whole, near = (_sample(v.astype(np.float32), start, last - first) >= 0.5 for v in (region | inside, around))
    added = np.zeros(shape, bool)
    added[tuple(slice(a, b) for a, b in zip(first, last))] = whole & near
    return added

"""A lesion of real shape, planted into a scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage

from bundle.errors import InputError


class Look(NamedTuple):
    """How lesions look in a contrast.

    Attributes:
        quantile, factors: what their brightness tends to: a quantile of the brain's own intensities, and the range of
            factors on it.
        strength: range of how far they go there, in [0, 1]: so that planted lesions lie about as far from healthy
            people as real ones do (`scripts/lesion_strength.py`, docs/results.md).
    """

    quantile: float
    factors: tuple[float, float]
    strength: tuple[float, float]


# T1w: nearly as dark as fluid; T2w: nearly as bright as fluid; FLAIR: brighter than any healthy tissue
LESION_LOOK = {
    "t1": Look(0.05, (0.5, 1.0), (0.25, 0.75)),
    "t2": Look(0.95, (0.8, 1.0), (0.75, 1.0)),
    "flair": Look(0.99, (1.0, 1.3), (0.75, 1.0)),
}


def plant_lesion(
    image: torch.Tensor,
    brain_mask: torch.Tensor,
    soft: torch.Tensor,
    contrast: str,
    strength: tuple[float, float] | None,
    rng: np.random.RandomState,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend a lesion into a scan: ``image + strength * soft * (lesion's brightness - image)``, so that the tissue's
    texture shows through as much as the lesion is weak.

    Args:
        image, brain_mask: ``[1, X, Y, Z]``.
        soft: ``[1, X, Y, Z]``, how much of each voxel is lesion, in [0, 1].
        contrast: one of `LESION_LOOK`.
        strength: range that the strength is drawn from, in [0, 1]; None: the contrast's own.
        rng: draws strength and brightness.

    Returns:
        the scan with the lesion, and the lesion's mask (0 and 1; voxels of at least half lesion inside the brain).

    Raises:
        InputError: the strength is no range in [0, 1].
    """
    inside, look = brain_mask > 0, LESION_LOOK[contrast]
    least, most = strength or look.strength
    if not 0 <= least <= most <= 1:
        raise InputError(f"strength of lesions {least:g} to {most:g}: name a range in [0, 1], the least first")
    brightness = float(np.quantile(image[inside].numpy(), look.quantile)) * rng.uniform(*look.factors)
    soft = soft * inside
    planted = image + rng.uniform(least, most) * soft * (brightness - image)
    return planted, (soft >= 0.5).to(image.dtype)


def share_of_voxels(mask: np.ndarray, mask_affine: np.ndarray, shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """How much of each voxel of a scan a mask fills: its mean over the voxel, interpolated linearly in between.

    Args:
        mask: ``[A, B, C]``, in [0, 1].
        mask_affine: of the mask, to some world.
        shape, affine: of the scan, to the same world.

    Returns:
        ``[X, Y, Z]``, float32, in [0, 1].
    """
    share = np.zeros(shape, np.float32)
    where = np.argwhere(mask > 0)
    if not len(where):
        return share
    # only where the mask can be: the corners of its box, in voxels of the scan
    to_scan = np.linalg.inv(affine) @ mask_affine
    low, high = where.min(0) - 1, where.max(0) + 1
    corners = np.array([np.where(corner, high, low) for corner in np.ndindex(2, 2, 2)])
    reached = corners @ to_scan[:3, :3].T + to_scan[:3, 3]
    first = np.maximum(np.floor(reached.min(0) - 1).astype(int), 0)
    last = np.minimum(np.ceil(reached.max(0) + 1).astype(int), np.array(shape) - 1)
    if (first > last).any():
        return share
    index = np.stack(np.meshgrid(*(np.arange(a, b + 1) for a, b in zip(first, last)), indexing="ij")).astype(float)
    to_mask = np.linalg.inv(to_scan)
    # as many places in a voxel as it holds voxels of the mask, along each of its edges
    steps = np.maximum(np.ceil(np.linalg.norm(to_mask[:3, :3], axis=0) - 1e-3), 1).astype(int)
    total = np.zeros(index.shape[1:], np.float32)
    volume = mask.astype(np.float32)
    for place in np.ndindex(*steps):
        shift = ((np.array(place) + 0.5) / steps - 0.5).reshape(3, 1, 1, 1)
        there = np.tensordot(to_mask[:3, :3], index + shift, 1) + to_mask[:3, 3].reshape(3, 1, 1, 1)
        total += ndimage.map_coordinates(volume, there, order=1, mode="constant")
    box = tuple(slice(a, b + 1) for a, b in zip(first, last))
    share[box] = total / steps.prod()
    return share

"""Operating points: thresholds chosen by how many findings healthy people have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from bundle.errors import InputError

# findings of at least `FINDING_MM3` of the person's own volume that a healthy scan may have, on average
POINTS = {"specific": 2.0, "screening": 10.0, "strict": 1.0}
FINDING_MM3 = 50.0
# shares of the healthy voxels above the thresholds that are tried
_TAILS = np.geomspace(1e-5, 0.1, 30)
_NEIGHBOURS = np.ones((3, 3, 3))


def require_point(name: str) -> str:
    """Return ``name`` if there is an operating point of that name.

    Raises:
        InputError: there is none.
    """
    if name not in POINTS:
        raise InputError(f"operating_point '{name}' is unknown: use one of {', '.join(POINTS)}")
    return name


def count_findings(marked: np.ndarray, least: float) -> int:
    """Number of regions (26 neighbours) of at least ``least`` voxels in ``marked`` ``[H, W, D]`` (bool)."""
    labels, count = ndimage.label(marked, _NEIGHBOURS)
    return int((np.bincount(labels[labels > 0], minlength=count + 1)[1:] >= least - 1e-6).sum()) if count else 0


def operating_points(
    scores: Sequence[np.ndarray], inside: Sequence[np.ndarray], voxel_mm3: Sequence[float]
) -> dict[str, float]:
    """For each of `POINTS` the lowest threshold at and above which healthy scans have on average at most so many
    findings; the highest score of all where no lower one will do.

    Args:
        scores: per healthy scan, left out of the maps, ``[H, W, D]``; the lowest inside the brain also lies outside it.
        inside: its brain, bool.
        voxel_mm3: of the person's own volume in a voxel.
    """
    pooled = np.concatenate([s[i] for s, i in zip(scores, inside)])
    least = [FINDING_MM3 / volume for volume in voxel_mm3]
    found = dict.fromkeys(POINTS, float(pooled.max()))
    open_points = dict(POINTS)
    for threshold in np.quantile(pooled, 1 - _TAILS):
        mean = np.mean([count_findings((s > threshold) & i, n) for s, i, n in zip(scores, inside, least)])
        open_points = {name: most for name, most in open_points.items() if mean <= most}
        found |= dict.fromkeys(open_points, float(threshold))
        if not open_points:
            break
    return found

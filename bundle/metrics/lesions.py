"""Lesions counted whole: how many are touched, and how many findings touch none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

_NEIGHBOURS = np.ones((3, 3, 3))


def count_lesions(found: np.ndarray, truth: np.ndarray, min_voxels: float = 1) -> tuple[int, int, int]:
    """Findings against lesions, as connected regions of 26 neighbours; a shared voxel is a hit.

    Args:
        found, truth: masks ``[X, Y, Z]``.
        min_voxels: smaller findings do not count; all lesions do.

    Returns:
        number of lesions that are hit, number of lesions, number of findings that hit none.
    """
    regions, number = ndimage.label(found, _NEIGHBOURS)
    sizes = np.bincount(regions.ravel(), minlength=number + 1)
    kept = np.flatnonzero(sizes >= min_voxels)
    kept = kept[kept > 0]
    lesions, total = ndimage.label(truth, _NEIGHBOURS)
    touching = np.unique(regions[truth > 0])
    hit = np.unique(lesions[np.isin(regions, kept)])
    return int((hit > 0).sum()), int(total), len(np.setdiff1d(kept, touching))


def recall_at_false_positives(
    scores: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    false_positives: float = 1.0,
    min_voxels: float = 1,
    thresholds: int = 60,
) -> float:
    """Share of lesions that are hit at the lowest threshold, one for all scans, before which there were never more than
    ``false_positives`` false findings a scan: a point of the free-response curve.

    Args:
        scores: per scan, score map ``[X, Y, Z]``, outside the brain the lowest.
        truths: per scan, lesion mask.
        false_positives: mean per scan.
        min_voxels: see `count_lesions`.
        thresholds: how many are tried, from the highest score down through the rarest tenth of the voxels.
    """
    pooled = np.concatenate([s[s > s.min()] for s in scores])
    tails = np.concatenate([[0.0], np.geomspace(1e-6, 0.1, thresholds - 1)])
    recall = 0.0
    for threshold in np.quantile(pooled, 1 - tails):
        counts = [count_lesions(s >= threshold, t, min_voxels) for s, t in zip(scores, truths)]
        hit, total, false = np.sum(counts, 0)
        if false > false_positives * len(scores):
            break
        recall = hit / max(total, 1)
    return float(recall)

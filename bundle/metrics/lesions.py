"""Lesions counted whole: how many are found, and how many findings are none.

The rule is panoptica's (Kofler et al., arXiv 2312.02608) `NaiveThresholdMatching` with many findings to one lesion and
any overlap: regions of 26 neighbours; pairs that share a voxel are taken by falling intersection over union, and each
finding goes to one lesion, so that one large finding over five lesions has found one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

_NEIGHBOURS = np.ones((3, 3, 3))


def match_lesions(found: np.ndarray, truth: np.ndarray, min_voxels: float = 1) -> tuple[np.ndarray, np.ndarray, int]:
    """Match findings to lesions.

    Args:
        found, truth: masks ``[X, Y, Z]``.
        min_voxels: smaller findings do not count; all lesions do.

    Returns:
        size of each lesion in voxels, whether it was found, and the number of findings that share no voxel with any.
    """
    findings, number = ndimage.label(found, _NEIGHBOURS)
    lesions, total = ndimage.label(truth, _NEIGHBOURS)
    finding_sizes, lesion_sizes = (
        np.bincount(r.ravel(), minlength=n + 1) for r, n in ((findings, number), (lesions, total))
    )
    both = (findings > 0) & (lesions > 0)
    pairs, shared = np.unique(np.stack([findings[both], lesions[both]]), axis=1, return_counts=True)
    counts = finding_sizes >= min_voxels
    overlap = shared / (finding_sizes[pairs[0]] + lesion_sizes[pairs[1]] - shared)
    hit, taken = np.zeros(total + 1, bool), np.zeros(number + 1, bool)
    for finding, lesion in pairs[:, np.argsort(-overlap, kind="stable")].T:
        if counts[finding] and not taken[finding]:
            taken[finding] = hit[lesion] = True
    return lesion_sizes[1:], hit[1:], int((counts & ~taken)[1:].sum())


def count_lesions(found: np.ndarray, truth: np.ndarray, min_voxels: float = 1) -> tuple[int, int, int]:
    """Number of lesions that are found, number of lesions, number of false findings; see `match_lesions`."""
    sizes, hit, false = match_lesions(found, truth, min_voxels)
    return int(hit.sum()), len(sizes), false


def recall_at_false_positives(
    scores: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    false_positives: float = 1.0,
    min_voxels: float = 1,
    thresholds: int = 60,
) -> float:
    """Share of lesions that are found at the lowest threshold, one for all scans, before which there were never more
    than ``false_positives`` false findings a scan: a point of the free-response curve.

    Args:
        scores: per scan, score map ``[X, Y, Z]``, outside the brain the lowest.
        truths: per scan, lesion mask.
        false_positives: mean per scan.
        min_voxels: see `match_lesions`.
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

"""Several contrasts of one visit, one answer: one leads, the others confirm it, and what they alone show is kept."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import ndimage

# from the one that shows most, where none has found anything
_ORDER = ("flair", "t2", "t1")
# what all others see fully counts so much more; what the leading contrast does not see counts so much
_CONFIRMED, _ALONE = 0.25, 0.8
# a contrast sees a region where its score is on average this share of its threshold
_SEES = 0.5
_NEIGHBOURS = np.ones((3, 3, 3))


def excess_ml(score: np.ndarray, found: np.ndarray, voxel_ml: float) -> float:
    """How much a contrast sees: the volume of its findings, each voxel times how far its score is above the threshold,
    in thresholds. Volume alone would make the most blurred contrast lead: T2w marks more around a lesion than FLAIR.

    Args:
        score: ``[X, Y, Z]``, in thresholds: 1 is lesion.
        found: mask of its findings.
        voxel_ml: of a voxel.
    """
    return float(np.maximum(score[found] - 1, 0).sum() * voxel_ml)


def leading_contrast(excess: Mapping[str, float], doubtful: Mapping[str, bool]) -> str:
    """The contrast that sees most (`excess_ml`), of those that nothing speaks against if there are any; where none has
    found anything FLAIR, T2w, T1w, in this order.
    """
    return min(excess, key=lambda c: (doubtful[c], -excess[c], _ORDER.index(c)))


def sees(score: np.ndarray, region: np.ndarray) -> bool:
    """Whether a contrast sees a region (bool): its score, in thresholds, is there 0.5 or more on average."""
    return float(np.maximum(score[region], 0).mean()) >= _SEES


def combine_contrasts(
    scores: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    examined: Mapping[str, np.ndarray],
    leading: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and findings of several contrasts of one head, on the grid of the leading one.

    - The others confirm: a score above 0 is multiplied by ``1 + a / 4``, where ``a`` in [0, 1] is the mean of the
      others' scores, each cut to [0, 1], of those that looked at the voxel. What no other sees stays as it is, and so
      falls behind.
    - Findings are the leading contrast's, with its outlines: others draw the same lesion wider, or narrower.
    - What they alone show is kept: a finding of another contrast that touches none of the answer's, or where the
      leading one sees nothing (`sees`), is added; its score is at least 0.8 of the other's own. So no finding is lost,
      and it stands behind those that the leading contrast sees as clearly.

    Sums of the scores lose to the best contrast alone: fluid and atrophy of T1w come in. Our own rule; figures are in
    docs/evaluation.md.

    Args:
        scores: contrast -> ``[X, Y, Z]``, in thresholds: 1 is lesion in each.
        found: contrast -> mask of its findings (bool).
        examined: contrast -> mask of the brain that it looked at (bool).
        leading: the contrast whose grid this is.

    Returns:
        the combined score, in thresholds of the leading contrast, and the mask of the findings (bool); both mean
        nothing outside the brain that the leading contrast shows.
    """
    lead = scores[leading]
    others = sorted((c for c in scores if c != leading), key=_ORDER.index)
    agreement = np.sum([np.clip(scores[c], 0, 1) * examined[c] for c in others], 0)
    agreement /= np.maximum(np.sum([examined[c] for c in others], 0), 1)
    combined = np.where(lead > 0, lead * (1 + _CONFIRMED * agreement), lead)
    mask, seen = found[leading].copy(), lead.copy()
    for contrast in others:
        regions, _ = ndimage.label(found[contrast], _NEIGHBOURS)
        for number, box in enumerate(ndimage.find_objects(regions), 1):
            region = regions[box] == number
            if mask[box][region].any() and sees(seen[box], region):
                continue
            own = np.maximum(scores[contrast][box][region], 1)  # of interpolated masks the rim is less
            combined[box][region] = np.maximum(combined[box][region], _ALONE * own)
            seen[box][region] = np.maximum(seen[box][region], own)
            mask[box] |= region
    return combined, mask

"""A scan's scores, counted: all that threshold curves need, small enough to keep for every case of a cohort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# of a float32's 23 bits of mantissa, those that tell bins apart: scores in one bin differ by less than 0.05 %
_MANTISSA_BITS = 11
_SHIFT = 23 - _MANTISSA_BITS


@dataclass(frozen=True)
class ScoreCurve:
    """Numbers of lesion and of other voxels per bin of the score, the highest score first.

    Bins are those of a float32 rounded to 11 bits of mantissa, so that curves of any scans add up without agreeing on
    a range first; voxels of one bin count as ties.

    Attributes:
        lowest: ``[N]`` lowest score of each bin, falling.
        positive, negative: ``[N]`` numbers of lesion voxels and of others.
    """

    lowest: np.ndarray
    positive: np.ndarray
    negative: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, labels: np.ndarray) -> ScoreCurve:
        """Count ``scores`` of voxels, of which ``labels`` (bool) are lesion.

        Raises:
            ValueError: a score that is not a number.
        """
        if np.isnan(scores).any():
            raise ValueError("scores hold NaN")
        # + 0.0 makes -0 and 0 one; a float's bits, read as an integer, are in order once negative ones are turned round
        bits = np.ascontiguousarray(scores, np.float32).ravel() + np.float32(0.0)
        keys = bits.view(np.int32)
        keys = np.where(keys < 0, np.int32(-(2**31)) - keys, keys) >> _SHIFT
        base = int(keys.min()) if keys.size else 0
        keys = keys - base
        lesion = np.asarray(labels, bool).ravel()
        total, positive = np.bincount(keys), np.bincount(keys[lesion], minlength=int(keys.max(initial=0)) + 1)
        used = np.flatnonzero(total)[::-1]
        edges = ((used + base) << _SHIFT).astype(np.int32)
        lowest = np.where(edges < 0, np.int32(-(2**31)) - edges, edges).astype(np.int32).view(np.float32)
        return cls(lowest.astype(np.float64), positive[used], total[used] - positive[used])

    @classmethod
    def pooled(cls, curves: Sequence[ScoreCurve]) -> ScoreCurve:
        """All voxels of several scans together."""
        lowest, where = np.unique(np.concatenate([c.lowest for c in curves]), return_inverse=True)
        counts = np.zeros((2, len(lowest)), np.int64)
        np.add.at(counts[0], where, np.concatenate([c.positive for c in curves]))
        np.add.at(counts[1], where, np.concatenate([c.negative for c in curves]))
        return cls(lowest[::-1], counts[0][::-1], counts[1][::-1])

    def _cumulative(self) -> tuple[np.ndarray, np.ndarray]:
        """True and false positives if each bin, and all above it, is called lesion."""
        return self.positive.cumsum(), self.negative.cumsum()

    def precision_recall(self) -> tuple[np.ndarray, np.ndarray]:
        """Precision and recall from the strictest threshold to the most lenient; recall is NaN without lesions."""
        true, false = self._cumulative()
        with np.errstate(invalid="ignore"):
            return true / (true + false), true / self.positive.sum()

    def auprc(self) -> float:
        """Average precision, as `average_precision`, ties by bin; NaN without lesions."""
        if not self.positive.sum():
            return float("nan")
        precision, recall = self.precision_recall()
        return float((precision * np.diff(recall, prepend=0)).sum())

    def auroc(self) -> float:
        """Area under the receiver operating characteristic; NaN without lesions or without anything else."""
        true, false = self._cumulative()
        if not len(true) or not true[-1] or not false[-1]:
            return float("nan")
        heights, places = np.r_[0, true / true[-1]], np.r_[0, false / false[-1]]
        return float((np.diff(places) * (heights[1:] + heights[:-1]) / 2).sum())

    def dice(self, thresholds: np.ndarray) -> np.ndarray:
        """Dice of calling voxels above each threshold lesion; NaN without lesions."""
        true, false = (np.r_[0, c] for c in self._cumulative())
        # bins that lie above the threshold as a whole
        above = np.searchsorted(-self.lowest, -np.asarray(thresholds, float), side="left")
        positive = self.positive.sum()
        if not positive:
            return np.full(np.shape(thresholds), np.nan)
        return 2 * true[above] / (true[above] + false[above] + positive)

    def best_dice(self) -> float:
        """The highest Dice of any threshold, which no threshold chosen beforehand can exceed; NaN without lesions."""
        true, false = self._cumulative()
        return float((2 * true / (true + false + true[-1])).max()) if self.positive.sum() else float("nan")


def best_threshold(curves: Sequence[ScoreCurve], candidates: int = 2000) -> float:
    """The threshold with the highest mean Dice over scans with lesions; the strictest one of several.

    Args:
        curves: of the scans to choose on.
        candidates: how many are tried, evenly spread over the bins of all scans.

    Raises:
        ValueError: no scan has lesions.
    """
    curves = [c for c in curves if c.positive.sum()]
    if not curves:
        raise ValueError("a threshold can only be chosen on scans with lesions")
    bins = np.unique(np.concatenate([c.lowest for c in curves]))[::-1]
    tried = np.nextafter(bins[np.unique(np.linspace(0, len(bins) - 1, candidates).round().astype(int))], -np.inf)
    return float(tried[np.mean([c.dice(tried) for c in curves], 0).argmax()])

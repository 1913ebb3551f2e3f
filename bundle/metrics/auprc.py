"""Area under the precision-recall curve."""

from __future__ import annotations

import torch


def average_precision(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Average precision of voxel scores: the sum over thresholds of precision times the gain in recall.

    Exact, ties taken together, as scikit-learn's ``average_precision_score``; NaN without a positive.

    Args:
        scores: any shape, larger is more abnormal.
        labels: same number of voxels, > 0 is lesion.
    """
    order = scores.flatten().argsort(descending=True)
    ordered, positive = scores.flatten()[order], (labels.flatten()[order] > 0)
    if not positive.any():
        return float("nan")
    # one point per distinct score: its last voxel
    last = torch.ones_like(positive)
    last[:-1] = ordered[1:] != ordered[:-1]
    found = positive.cumsum(0)[last].double()
    flagged = torch.nonzero(last)[:, 0].double() + 1
    gain = torch.diff(found, prepend=found.new_zeros(1))
    return float((gain * found / flagged).sum() / found[-1])

"""Area under the precision-recall curve, and what it is compared with."""

from __future__ import annotations

from typing import Any

import torch
from monai.metrics import CumulativeIterationMetric

from bundle.parallel import gather


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


class AUPRCMetric(CumulativeIterationMetric):
    """Average precision per case; `aggregate` gives the mean over the cases that have lesions (NaN if none has).

    ``y_pred`` (scores) and ``y`` are lists of ``[1, ...]`` or a batch ``[B, 1, ...]``.

    Args:
        pooled: `aggregate` gives the average precision over the voxels of all cases together instead.
    """

    def __init__(self, pooled: bool = False) -> None:
        self.pooled = pooled
        super().__init__()

    def reset(self) -> None:
        super().reset()
        # apart from MONAI's buffer, which would take hours to file millions of voxels one by one
        self._voxels: list[tuple[torch.Tensor, torch.Tensor]] = []

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        if y is None or y.shape != y_pred.shape:
            raise ValueError(f"scores {tuple(y_pred.shape)} need labels of the same shape")
        if self.pooled:
            self._voxels.append((y_pred.flatten(), y.flatten() > 0))
        return torch.tensor([[average_precision(p, t)] for p, t in zip(y_pred, y)])

    def aggregate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.pooled:
            scores, labels = (torch.cat(v) for v in zip(*gather(self._voxels)))
            return torch.tensor(average_precision(scores, labels))
        return self.get_buffer().nanmean()

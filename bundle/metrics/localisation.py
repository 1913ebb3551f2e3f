"""How far off the localiser is, in mm."""

from __future__ import annotations

from typing import Any

import torch
from monai.metrics import CumulativeIterationMetric


class LocalisationErrorMetric(CumulativeIterationMetric):
    """Mean absolute error of the predicted location over all patches of weight 1, in mm.

    ``y_pred`` is the network's output ``[B, 4, H', W']``, ``y`` the label ``[B, 3, H', W']`` (row, column, weight).

    Args:
        extent_mm: rows' and columns' extent of a slice, mm.
        euclidean: distance in the slice instead of the mean of both coordinates' errors.
    """

    def __init__(self, extent_mm: tuple[float, float], euclidean: bool = False) -> None:
        super().__init__()
        self.extent_mm, self.euclidean = tuple(extent_mm), euclidean

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        if y is None or y_pred.shape[1] != 4 or y.shape[1] != 3:
            raise ValueError("expected predictions [B, 4, H, W] and labels [B, 3, H, W]")
        extent = torch.tensor(self.extent_mm, device=y.device).view(1, 2, 1, 1)
        error = (y_pred[:, :2].float() - y[:, :2]).abs() * extent
        distance = error.norm(dim=1) if self.euclidean else error.mean(1)
        weight = y[:, 2]
        return torch.stack([(distance * weight).sum((1, 2)), weight.sum((1, 2))], 1)

    def aggregate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        total, weight = self.get_buffer().sum(0)
        return total / weight

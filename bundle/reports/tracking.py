"""What a tracked training shows of its validation slices."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bundle.scoring import anomaly_channels


def slice_images(batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, list[None]]:
    """Intensities ``[B, 1, H, W]`` of a batch, and no labels: what MONAI's image handlers ask for."""
    return batch["image"][:, :1], [None] * len(batch["image"])


def slice_heatmaps(output: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The paper's score, log squared error + log variance, of each position of validation slices, ``[B, 1, H', W']``;
    positions without enough brain have the lowest of their slice.

    Args:
        output: of the evaluator: ``pred`` ``[B, 4, H', W']`` and ``label`` ``[B, 3, H', W']``.
    """
    pred, label = output["pred"].float(), output["label"]
    score = anomaly_channels(pred, label[:, :2]).sum(1, keepdim=True)
    inside = label[:, 2:] > 0
    lowest = score.masked_fill(~inside, torch.inf).amin((1, 2, 3), keepdim=True)
    return torch.where(inside, score, lowest.nan_to_num(posinf=0.0))

"""The paper's score to the letter (Baker & Brockmeier, arXiv 2506.22504, as their public code has it)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

from .anomaly import fill_outside

MEDIAN_VOXELS = 7  # in each direction
_FLOOR = 1e-10  # added to the squared distance, percent squared
# names of scores; the masked one leaves the background at 0, above much of the brain, and is judged with it
MASKED = "paper_masked"
PAPER_SCORES = ("paper", MASKED)


def paper_channels(pred: torch.Tensor, location: torch.Tensor) -> torch.Tensor:
    """Log of the squared distance, and log variance, of percent of the slice; the paper's score is their sum.

    Args:
        pred: ``[B, 4, H, W, D]`` network output (row, column, log variance of each), fractions of the slice.
        location: ``[B or 1, 2, H, W, D]`` true row and column, fractions of the slice.

    Returns:
        ``[B, 2, H, W, D]``; of the log variances the mean over both coordinates.
    """
    squared = (100 * (pred[:, :2] - location)).square().sum(1, keepdim=True)
    log_variance = pred[:, 2:].mean(1, keepdim=True) + 2 * math.log(100)
    return torch.cat([(squared + _FLOOR).log(), log_variance], 1)


def near(inside: torch.Tensor) -> torch.Tensor:
    """Voxels whose values the median of a brain voxel knows: ``[H, W, D]`` bool to the same."""
    return torch.nn.functional.max_pool3d(inside[None].float(), MEDIAN_VOXELS, 1, MEDIAN_VOXELS // 2)[0] > 0


def paper_score(name: str, channels: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Sum of the channels, median filtered (the background around the brain counts too, mirrored at the grid's edge).

    Args:
        name: "paper", or `MASKED`, which is 0 outside the brain.
        channels: `paper_channels` ``[2, H, W, D]``, of the brain and what lies `near` it.
        inside: the brain, ``[1, H, W, D]`` bool.
    """
    total = channels.sum(0)
    used = torch.nonzero(near(inside[0]))
    box = tuple(slice(int(a), int(b) + 1) for a, b in zip(used.min(0).values, used.max(0).values))
    filtered = torch.zeros_like(total)
    filtered[box] = torch.as_tensor(ndimage.median_filter(total[box].numpy(), MEDIAN_VOXELS))
    score = filtered[None] * inside
    return score if name == MASKED else fill_outside(score, inside)


def paper_quantiles(
    channels: Sequence[torch.Tensor], images: Sequence[torch.Tensor], quantiles: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Quantiles of all healthy brain voxels together, before the median filter, as the paper's code takes them: name of
    the score -> {quantile as text: score}.

    Args:
        channels: per scan, `paper_channels`.
        images: per scan, intensities ``[1, H, W, D]``, 0 outside the brain.
        quantiles: in [0, 1].
    """
    values = np.concatenate([c.sum(0)[i[0] > 0].numpy() for c, i in zip(channels, images)])
    found = dict(zip([f"{q:g}" for q in quantiles], np.quantile(values, quantiles).astype(float).tolist()))
    return dict.fromkeys(PAPER_SCORES, found)

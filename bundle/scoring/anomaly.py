"""The anomaly channels: how badly a patch is localised, and how unsure the network is."""

from __future__ import annotations

import torch
from monai.transforms import generate_spatial_bounding_box

from bundle.transforms.spatial import gaussian_blur

# Floor of the squared error before its logarithm: a thousandth of the slice, 0.2 mm; finer differences are noise.
SQUARED_ERROR_FLOOR = 1e-6


def anomaly_channels(pred: torch.Tensor, location: torch.Tensor) -> torch.Tensor:
    """Log squared error and log variance of the predicted locations.

    The score of Baker & Brockmeier (arXiv 2506.22504) is their sum, ``log(error^2) + log(variance)``.

    Args:
        pred: ``[B, 4, H, W]`` (or ``[B, 4, H, W, D]``) network output (row, column, log variance of row, of column).
        location: ``[B or 1, 2, H, W]`` true row and column, in fractions of the slice as ``pred``.

    Returns:
        ``[B, 2, H, W]``: log of the squared distance (row and column together, not below `SQUARED_ERROR_FLOOR`), and
        log of the total variance (sum over row and column); both of fractions of the slice, squared.
    """
    squared_error = ((pred[:, :2] - location) ** 2).sum(1, keepdim=True)
    log_variance = torch.logsumexp(pred[:, 2:], 1, keepdim=True)
    return torch.cat([squared_error.clamp(min=SQUARED_ERROR_FLOOR).log(), log_variance], 1)


def smooth_inside(volumes: torch.Tensor, inside: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian mean over the brain voxels around each voxel; what lies outside has no weight.

    A lesion changes every patch that it lies in, and what single patches add by chance averages out.

    Args:
        volumes: ``[C, H, W, D]``.
        inside: ``[1, H, W, D]`` bool, with at least one voxel set.
        sigma: voxels; 0 changes nothing.
    """
    if sigma == 0:
        return volumes
    # the brain's bounding box: beyond it everything counts for nothing
    box = (slice(None), *map(slice, *generate_spatial_bounding_box(inside)))
    weight = inside[box].to(volumes)
    total = gaussian_blur(torch.cat([volumes[box] * weight, weight]), [sigma] * 3)
    result = volumes.clone()
    result[box] = torch.where(inside[box], total[:-1] / total[-1:].clamp(min=1e-6), volumes[box])
    return result


def fill_outside(scores: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Give voxels outside the brain the lowest score that any voxel inside has, per volume and channel.

    Zero would not do: log scores are negative, and the background would rank above the brain.

    Args:
        scores: ``[C, H, W, D]``.
        inside: ``[1, H, W, D]`` bool, with at least one voxel set.
    """
    lowest = torch.where(inside, scores, torch.full_like(scores, torch.inf)).flatten(1).min(1).values
    return torch.where(inside, scores, lowest.view(-1, *[1] * (scores.ndim - 1)))

"""Losses of location regression.

All take the network's output ``[B, 4, H', W']`` (row, column, their log variances) and the label ``[B, 3, H', W']``
of the sampling transforms (row, column, weight), and return the weighted mean over patches of the sum over both
coordinates. Patches of weight 0 have no influence, whatever they hold.
"""

from __future__ import annotations

import math

import torch
from torch.nn.modules.loss import _Loss


class LocationLoss(_Loss):
    """Base: the weighted mean over patches. Subclasses give the loss of each coordinate of each patch."""

    def forward(self, pred: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Args: pred ``[B, 4, H', W']``; label ``[B, 3, H', W']``. Returns a scalar; 0 if all weights are 0.

        Raises:
            ValueError: the shapes do not belong together.
        """
        if pred.shape[1] != 4 or label.shape[1] != 3 or pred.shape[2:] != label.shape[2:]:
            raise ValueError(
                f"expected [B, 4, H, W] and [B, 3, H, W], got {tuple(pred.shape)} and {tuple(label.shape)}"
            )
        mean, log_variance = pred.float().chunk(2, dim=1)
        location, weight = label[:, :2], label[:, 2:]
        loss = self.coordinate_loss(mean - location, log_variance)
        return (loss * weight).sum() / weight.sum().clamp(min=1e-8)

    def coordinate_loss(self, error: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class LocationMSELoss(LocationLoss):
    """Squared error; the variance is not trained."""

    def coordinate_loss(self, error: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
        return error**2


class BetaNLLLoss(LocationLoss):
    """Gaussian negative log-likelihood, each term weighted by ``variance ** beta`` (Seitzer et al. 2022,
    arXiv 2203.09168, eq. 5): 0 is the plain likelihood, 1 gives the mean the gradient of the squared error.

    Args:
        beta: in [0, 1].
        units: that the slice is divided into for the loss; 100 is the loss of percent, as the paper has it. Gradients
            are ``units ** (2 * beta)`` times as large then.
    """

    def __init__(self, beta: float = 0.5, units: float = 1.0) -> None:
        super().__init__()
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must be in [0, 1], got {beta}")
        self.beta, self.units = beta, units

    def coordinate_loss(self, error: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
        error, log_variance = error * self.units, log_variance + 2 * math.log(self.units)
        nll = 0.5 * (log_variance + error**2 * torch.exp(-log_variance))
        return nll * torch.exp(self.beta * log_variance.detach())


class FaithfulLoss(LocationLoss):
    """Squared error for the mean, likelihood for the variance around a mean that it cannot move (Stirn et al. 2023,
    arXiv 2212.09184). Set ``detach_variance`` in the network too, so that the variance does not shape its features.
    """

    def coordinate_loss(self, error: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
        nll = 0.5 * (log_variance + error.detach() ** 2 * torch.exp(-log_variance))
        return 0.5 * error**2 + nll

"""The published network, for those who want the paper to the letter."""

from __future__ import annotations

import math

import torch
from monai.networks.nets import resnet18
from torch import nn

_PERCENT = 100.0  # it counts places, and slices, in percent


class ResNetPatchLocator(nn.Module):
    """ResNet-18, a sinusoidal embedding of the slice added to its 512 features, and two five-layer heads with batch
    norm for location and log variance (Baker & Brockmeier, arXiv 2506.22504, as their public code has it).

    Same signature as `PatchLocator`: a patch gives ``[B, 4, 1, 1]``. Inside, the heads count places in percent of the
    slice, and its fraction and the log variance of that are given. A larger slice is cut into its patches, which are
    run one by one: exact, and as slow as that sounds.

    Args:
        patch_size: voxels.
        stride: of the output on slices larger than a patch, voxels.
        chunk: patches run at once. In training all are, so that batch norm knows all of them.
        slices: of the grid. The paper counts slice k of n as k / n, the plane that comes in holds (k + 0.5) / n.
        detach_variance: as in `PatchLocator`.
    """

    def __init__(
        self,
        patch_size: int = 24,
        stride: int = 1,
        chunk: int = 2048,
        slices: int = 100,
        detach_variance: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size, self.stride, self.chunk, self.slices = patch_size, stride, chunk, slices
        self.detach_variance = detach_variance
        self.trunk = resnet18(spatial_dims=2, n_input_channels=1, feed_forward=False, bias_downsample=False)
        # padding 3 with a kernel of 3, which MONAI has no argument for: 24 voxels become 14
        self.trunk.conv1 = nn.Conv2d(1, 64, 3, stride=2, padding=3, bias=False)
        features = 512
        self.rates: torch.Tensor
        self.register_buffer("rates", 10000.0 ** (-torch.arange(0, features, 2) / features), persistent=False)
        self.location_head = self._head(features)
        self.variance_head = self._head(features)

    @staticmethod
    def _head(features: int) -> nn.Sequential:
        widths = [features, features, 128, 64, 32]
        hidden = [
            layer
            for a, b in zip(widths[:-1], widths[1:])
            for layer in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(inplace=True))
        ]
        return nn.Sequential(*hidden, nn.Linear(widths[-1], 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, p = x.shape[0], self.patch_size
        windows = x.unfold(2, p, self.stride).unfold(3, p, self.stride)
        h, w = windows.shape[2:4]
        patches = windows.permute(0, 2, 3, 1, 4, 5)
        # indices instead of one reshape: a slice's patches together would fill the memory
        index = torch.arange(b * h * w, device=x.device)
        chunks = index.split(len(index) if self.training else self.chunk)
        answers = [self._locate(patches[i // (h * w), i // w % h, i % w]) for i in chunks]
        return torch.cat(answers).view(b, h, w, 4).permute(0, 3, 1, 2)

    def _locate(self, patches: torch.Tensor) -> torch.Tensor:
        """``[N, 2, p, p]`` to ``[N, 4]``."""
        c = self.patch_size // 2
        angle = _PERCENT * (patches[:, 1, c, c, None] - 0.5 / self.slices) * self.rates
        features = self.trunk(patches[:, :1]) + torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
        variance_features = features.detach() if self.detach_variance else features
        location, log_variance = self.location_head(features), self.variance_head(variance_features)
        return torch.cat([location / _PERCENT, log_variance - 2 * math.log(_PERCENT)], 1)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, stride={self.stride}"

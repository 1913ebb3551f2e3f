"""The published network, for those who want the paper to the letter."""

from __future__ import annotations

import torch
from monai.networks.nets import resnet18
from torch import nn


class ResNetPatchLocator(nn.Module):
    """ResNet-18 with a 3x3 stem; a sinusoidal embedding of the slice is added to its 512 features; two five-layer
    heads with batch norm give location and log variance (Baker & Brockmeier, arXiv 2506.22504).

    Same signature as `PatchLocator`: a patch gives ``[B, 4, 1, 1]``. A larger slice is cut into its patches, which
    are run one by one in chunks: exact, and as slow as that sounds.

    Args:
        patch_size: voxels.
        stride: of the output on slices larger than a patch, voxels.
        chunk: patches run at once.
        slices: resolution of the sinusoidal embedding: number of slices that [0, 1] is divided into.
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
        # first layer 3x3 without stride or pooling: patches are far smaller than the images ResNet was made for
        self.trunk = resnet18(
            spatial_dims=2, n_input_channels=1, conv1_t_size=3, conv1_t_stride=1, no_max_pool=True, feed_forward=False
        )
        features = 512
        rates = torch.exp(-torch.arange(0, features, 2) / features * torch.log(torch.tensor(10000.0)))
        self.rates: torch.Tensor
        self.register_buffer("rates", rates, persistent=False)
        self.location_head = self._head(features)
        self.variance_head = self._head(features)

    @staticmethod
    def _head(features: int) -> nn.Sequential:
        widths = [features, 256, 128, 64, 32]
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
        answers = [self._locate(patches[i // (h * w), i // w % h, i % w]) for i in index.split(self.chunk)]
        return torch.cat(answers).view(b, h, w, 4).permute(0, 3, 1, 2)

    def _locate(self, patches: torch.Tensor) -> torch.Tensor:
        """``[N, 2, p, p]`` to ``[N, 4]``."""
        c = self.patch_size // 2
        angle = patches[:, 1, c, c, None] * self.slices * self.rates
        features = self.trunk(patches[:, :1]) + torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
        variance_features = features.detach() if self.detach_variance else features
        return torch.cat([self.location_head(features), self.variance_head(variance_features)], 1)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, stride={self.stride}"

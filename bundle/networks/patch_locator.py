"""The localiser: which place of the slice does this patch come from, and how sure is that?"""

from __future__ import annotations

import torch
from torch import nn


def plan_layers(patch_size: int) -> list[tuple[int, int]]:
    """(kernel, stride) of valid convolutions whose receptive field is exactly ``patch_size``.

    Pairs of 3x3 convolutions, each pair followed by a 2x2 convolution of stride 2, until at most 5 voxels are left,
    which the last convolution covers: 24 -> 20 -> 10 -> 6 -> 3 -> 1 and 12 -> 8 -> 4 -> 1.

    Raises:
        ValueError: ``patch_size`` cannot be halved evenly in this way.
    """
    layers: list[tuple[int, int]] = []
    size = patch_size
    while size > 5:
        if size % 2:
            raise ValueError(f"patch_size {patch_size} cannot be halved evenly; use 8, 12, 16, 20, 24, 28, 32 or 36")
        size = (size - 4) // 2
        layers += [(3, 1), (3, 1), (2, 2)]
    if not layers:
        raise ValueError(f"patch_size {patch_size} is too small; use at least 6")
    return [*layers, (size, 1)]


def folded(
    weight: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the convolution that does the work of one with ``weight`` and the batch norm behind it
    (its weight, bias, running mean and running variance).
    """
    scale = norm[0] * torch.rsqrt(norm[3] + eps)
    return weight * scale.view(-1, 1, 1, 1), norm[1] - norm[2] * scale


class PatchLocator(nn.Module):
    """Fully convolutional localiser without padding: a patch gives one answer, a slice that of every patch in it.

    Input ``[B, 2, H, W]``: intensity, and a plane that holds the slice position in [0, 1]. Output ``[B, 4, H', W']``
    with ``H' = (H - patch_size) // stride + 1``: row and column of the centre of the patch that starts at
    ``stride * (i, j)``, as fractions of the slice, and the log variance of each (fraction squared).

    Dense evaluation equals patch-by-patch evaluation: where ``stride`` is smaller than the network's own, the strided
    convolutions run unstrided and everything after them dilated (a trous), so that each output voxel sees exactly
    the voxels, through exactly the weights, of its own patch. Normalisation is over channels or by running
    statistics, never over space.

    The slice position enters after the receptive field is complete, as sines and cosines through a linear layer, so
    that one set of filters serves the whole brain.

    Args:
        patch_size: receptive field, voxels; see `plan_layers`.
        channels: of the first pair of convolutions, doubled at each halving up to ``max_channels``.
        max_channels: widest convolution.
        features: width of the last convolution and of the two-layer heads (1x1 convolutions).
        position_frequencies: number of sine/cosine pairs of the slice position.
        stride: of the output, voxels; an attribute that may be set later. Powers of two are cheapest.
        detach_variance: keep the variance head's gradient out of the shared layers (faithful heteroscedastic
            regression, Stirn et al. 2023, arXiv 2212.09184).
    """

    def __init__(
        self,
        patch_size: int = 24,
        channels: int = 32,
        max_channels: int = 96,
        features: int = 160,
        position_frequencies: int = 6,
        stride: int = 1,
        detach_variance: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.detach_variance = detach_variance
        self.convolutions = nn.ModuleList()
        self.norms = nn.ModuleList()
        layers = plan_layers(patch_size)
        width_in, width = 1, channels
        for kernel, layer_stride in layers[:-1]:
            if layer_stride > 1:
                width = min(2 * width, max_channels)
            self.convolutions.append(nn.Conv2d(width_in, width, kernel, bias=False))
            self.norms.append(nn.BatchNorm2d(width))
            width_in = width
        self.convolutions.append(nn.Conv2d(width_in, features, layers[-1][0], bias=False))
        self.norms.append(nn.BatchNorm2d(features))
        self.own_strides = [s for _, s in layers]
        self.frequencies: torch.Tensor
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(position_frequencies) / 2, persistent=False)
        self.position = nn.Conv2d(2 * position_frequencies, features, 1)
        # start at the middle of the slice with the variance of an even spread over it (1/12)
        self.location_head = self._head(features, 0.5)
        self.variance_head = self._head(features, -2.5)
        self.stride = stride
        # convolutions run about three times faster in this layout, on CPUs and GPUs alike
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @staticmethod
    def _head(features: int, start: float) -> nn.Sequential:
        last = nn.Conv2d(features, 2, 1)
        nn.init.constant_(last.bias, start)  # type: ignore[arg-type]
        return nn.Sequential(nn.Conv2d(features, features, 1), nn.ReLU(inplace=True), last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.locate(self.embed(x))

    def locate(self, features: torch.Tensor) -> torch.Tensor:
        """The heads: features ``[B, features, H', W']`` to locations and log variances ``[B, 4, H', W']``."""
        variance_features = features.detach() if self.detach_variance else features
        return torch.cat([self.location_head(features), self.variance_head(variance_features)], 1)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, 2, H, W]`` to the features ``[B, features, H', W']`` that both heads read: what a patch looks like, at
        its slice.
        """
        features, plane = x[:, :1].contiguous(memory_format=torch.channels_last), x[:, 1:]
        strides = self.layer_strides(self.stride)
        dilation = 1
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms)):
            if self.training:
                features = norm(nn.functional.conv2d(features, convolution.weight, None, strides[i], 0, dilation))  # type: ignore[arg-type]
            else:  # the largest tensors are passed over once instead of twice
                statistics = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
                weight, bias = folded(convolution.weight, statistics, norm.eps)  # type: ignore[arg-type]
                features = nn.functional.conv2d(features, weight, bias, strides[i], 0, dilation)
            if i < len(self.own_strides) - 1:
                features = nn.functional.relu(features, inplace=True)
            dilation = dilation * self.own_strides[i] // min(strides[i], self.own_strides[i])
        # the plane is constant within a slice, so any of its voxels tells the slice's position
        angle = plane[:, :, :1, :1] * self.frequencies.view(1, -1, 1, 1)
        position = self.position(torch.cat([angle.sin(), angle.cos()], 1))
        return nn.functional.relu(features + position, inplace=True)

    def layer_strides(self, stride: int) -> list[int]:
        """Stride of each convolution for an output stride: its own as long as that is not too coarse, then 1; what is
        still missing at the end is left to the last one.
        """
        strides: list[int] = []
        remaining = stride
        for own in self.own_strides:
            take = own if remaining % own == 0 else 1
            strides.append(take)
            remaining = remaining // take
        strides[-1] *= remaining
        return strides

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, stride={self.stride}"

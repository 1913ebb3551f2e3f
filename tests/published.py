"""The published network and score, restated in plain torch without MONAI or the bundle: what ours must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.ndimage import median_filter
from torch import nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _ in range(2))
        self.shortcut = None
        if a != b:
            self.shortcut = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))

    def forward(self, x):
        y = self.norms[1](self.second(self.norms[0](self.first(x)).relu()))
        return (y + (x if self.shortcut is None else self.shortcut(x))).relu()


class Published(nn.Module):
    """Patches ``[N, 1, p, p]`` and slices in percent ``[N]`` to location and log variance ``[N, 2]``, in percent."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 64, 3, stride=2, padding=3, bias=False), nn.BatchNorm2d(64)
        widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
        self.blocks = nn.Sequential(*(Block(*w) for w in [*widths, (512, 512, 1)]))
        self.heads = nn.ModuleList(self.head() for _ in range(2))

    @staticmethod
    def head():
        layers = []
        for a, b in ((512, 512), (512, 128), (128, 64), (64, 32)):
            layers += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(32, 2))

    def forward(self, patches, percent):
        x = F.max_pool2d(self.norm(self.stem(patches)).relu(), 3, 2, 1)
        features = self.blocks(x).mean((2, 3))
        for i in range(256):
            rate = 10000 ** (-2 * i / 512)
            features[:, 2 * i] += torch.sin(percent * rate)
            features[:, 2 * i + 1] += torch.cos(percent * rate)
        return self.heads[0](features), self.heads[1](features)

    def take_weights(self, ours) -> Published:
        """Those of a `ResNetPatchLocator`."""

        def copy(theirs, mine):
            theirs.load_state_dict(mine.state_dict())

        copy(self.stem, ours.trunk.conv1)
        copy(self.norm, ours.trunk.bn1)
        layers = [block for k in range(1, 5) for block in getattr(ours.trunk, f"layer{k}")]
        for theirs, mine in zip(self.blocks, layers, strict=True):
            copy(theirs.first, mine.conv1)
            copy(theirs.second, mine.conv2)
            copy(theirs.norms[0], mine.bn1)
            copy(theirs.norms[1], mine.bn2)
            if theirs.shortcut is not None:
                copy(theirs.shortcut, mine.downsample)
        copy(self.heads[0], ours.location_head)
        copy(self.heads[1], ours.variance_head)
        return self.eval()


@torch.no_grad()
def published_heatmap(network: Published, volume, patch: int, median: int = 7):
    """Score of every voxel of ``[H, W, D]``, the background's too, median filtered, times the brain mask."""
    h, w, d = volume.shape
    before = patch // 2
    padded = F.pad(volume.permute(2, 0, 1), (before, before, before, before))
    heatmap = torch.zeros(h, w, d)
    for k in range(d):
        places = [(i, j) for i in range(h) for j in range(w)]
        patches = torch.stack([padded[k, i : i + patch, j : j + patch] for i, j in places])[:, None]
        location, log_variance = network(patches, torch.full((len(places),), 100.0 * k / d))
        truth = torch.tensor([[100.0 * i / h, 100.0 * j / w] for i, j in places])
        distance = ((location - truth) ** 2).sum(1)
        heatmap[:, :, k] = ((distance + 1e-10).log() + log_variance.mean(1)).view(h, w)
    return torch.as_tensor(median_filter(heatmap.numpy(), size=median)) * (volume > 0)

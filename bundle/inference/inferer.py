"""From a volume and the network to the anomaly channels of every voxel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from monai.inferers import Inferer
from monai.utils import convert_to_dst_type

from bundle.scoring import anomaly_channels, fill_outside
from bundle.transforms.sampling import patch_centers, slice_position


class PatchLocationInferer(Inferer):
    """Localise the patch around every brain voxel and return its anomaly channels.

    A voxel's patch is the one that starts ``patch_size // 2`` voxels before it in both directions; slices are padded
    with background, so that voxels at the rim of the grid have theirs too. Brain is where the intensity is above 0
    (see `NormalizeBrainIntensityd`); only the slices and the bounding box that hold brain are run.

    Args:
        patch_size: receptive field of the network, voxels.
        chunk: slices run at once; bounds the memory.
        precision: "float32", or "bfloat16" for autocast.
        output: "anomaly" gives log squared error and log variance ``[B, 2, H, W, D]``, voxels outside the brain set to
            the lowest score inside; "location" gives the network's four channels as they are, 0 outside the brain.

    Raises:
        ValueError: an unknown ``precision`` or ``output``; an input that is not ``[B, 1, H, W, D]``, or has no brain.
    """

    def __init__(
        self, patch_size: int = 24, chunk: int = 8, precision: str = "float32", output: str = "anomaly"
    ) -> None:
        super().__init__()
        if precision not in ("float32", "bfloat16") or output not in ("anomaly", "location"):
            raise ValueError(f"unknown precision '{precision}' or output '{output}'")
        self.patch_size, self.chunk, self.precision, self.output = patch_size, chunk, precision, output

    @torch.no_grad()
    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Args: inputs ``[B, 1, H, W, D]`` normalised intensities; network as `PatchLocator`, at stride 1."""
        if inputs.ndim != 5 or inputs.shape[1] != 1:
            raise ValueError(f"expected volumes [B, 1, H, W, D], got {tuple(inputs.shape)}")
        volumes = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        results = torch.stack([self._volume(v, network) for v in volumes])
        return convert_to_dst_type(results, inputs)[0]

    def _volume(self, volume: torch.Tensor, network: Callable[..., torch.Tensor]) -> torch.Tensor:
        inside = volume > 0
        if not inside.any():
            raise ValueError("the volume holds no brain (no intensity above 0)")
        h, w, d = volume.shape[1:]
        p, before = self.patch_size, self.patch_size // 2
        rows, cols, slices = (torch.nonzero(inside[0].any(a).any(b))[:, 0] for a, b in ((2, 1), (2, 0), (1, 0)))
        r0, r1, c0, c1 = int(rows[0]), int(rows[-1]) + 1, int(cols[0]), int(cols[-1]) + 1
        # every voxel of the box with its whole patch
        box = F.pad(volume[0].permute(2, 0, 1), (before, p - 1 - before, before, p - 1 - before))
        box = box[:, r0 : r1 + p - 1, c0 : c1 + p - 1]
        location = torch.stack(
            torch.meshgrid(
                patch_centers(torch.arange(r0, r1, device=volume.device) - before, p, h),
                patch_centers(torch.arange(c0, c1, device=volume.device) - before, p, w),
                indexing="ij",
            )
        )[None]
        result = volume.new_zeros(2 if self.output == "anomaly" else 4, h, w, d)
        for chunk in slices.split(self.chunk):
            image = box[chunk][:, None]
            plane = slice_position(chunk.to(volume.dtype), d).view(-1, 1, 1, 1).expand_as(image)
            with torch.autocast(volume.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                pred = network(torch.cat([image, plane], 1))
            pred = pred.to(volume.dtype)
            channels = anomaly_channels(pred, location) if self.output == "anomaly" else pred
            result[:, r0:r1, c0:c1, chunk] = channels.permute(1, 2, 3, 0)
        return fill_outside(result, inside) if self.output == "anomaly" else result * inside

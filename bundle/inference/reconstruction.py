"""Pixel-wise methods beside the localiser: networks that see slices and give a map of the voxels."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import nn

from bundle.data.files import AUTO, of_contrast
from bundle.networks import load_weights
from bundle.scoring import LESION_SIGN
from bundle.transforms import slabs

from .precision import autocast

_DIVISIBLE = 16  # slices are padded to a multiple of it: networks halve them up to four times


class SliceMapd(MapTransform):
    """Base: run a network over the slices that hold brain and add its map. Adds nothing where there is no model.

    Args:
        keys: normalised volume ``[1, H, W, D]``, 0 outside the brain (one key).
        network: from slices ``[B, C, H, W]`` to ``[B, 1, H, W]``.
        model_file: its weights, a flat state dict; read when the first scan comes. For the contrast "auto" each
            scan's own (`of_contrast`).
        contrast: of the scan; "auto" takes the item's.
        device: to run on.
        output_key: where the map ``[1, H, W, D]`` goes, 0 outside the brain.
        precision: "float32", "bfloat16" or "auto", see `autocast`.

    Raises:
        InputError: weights that cannot be read or are of another network.
    """

    name = ""
    # of tensors; which one is fast depends on the network, on CPUs
    layout: torch.memory_format = torch.contiguous_format
    neighbours = 0  # slices on each side that the network sees

    def __init__(
        self,
        keys: KeysCollection,
        network: nn.Module,
        model_file: str,
        contrast: str,
        device: torch.device | str = "cpu",
        output_key: str = "",
        precision: str = "float32",
    ) -> None:
        super().__init__(keys)
        self.network, self.model_file, self.device = network, Path(model_file), device
        self.contrast, self.output_key = contrast, output_key or self.name
        self.precision, self._loaded = precision, ""
        self.facts: Mapping[str, Any] = {}

    def inputs(self, volume: torch.Tensor, contrast: str) -> list[torch.Tensor]:
        """The volumes ``[1, H, W, D]`` of whose slices, and ``neighbours``, the network sees; ``facts`` are what its
        weights tell of themselves.
        """
        return [volume]

    def result(self, inputs: torch.Tensor, predicted: torch.Tensor, contrast: str) -> torch.Tensor:
        """The map of the slices, ``[B, 1, H, W]``: what the network says, unless a subclass makes more of it."""
        return predicted

    @torch.no_grad()
    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        contrast = d["contrast"] if self.contrast == AUTO else self.contrast
        model_file = of_contrast(self.model_file, contrast)
        if self._loaded != model_file:
            if not Path(model_file).is_file():
                return d
            self.facts = load_weights(self.network, model_file)
            self.network.to(self.device, memory_format=self.layout).eval()  # type: ignore[call-overload]
            self._loaded = model_file
        image = d[self.keys[0]]
        volume = image.as_tensor().cpu().float()
        volumes, found = self.inputs(volume, contrast), torch.zeros_like(volume)
        for slices in torch.nonzero((volume[0] > 0).any(0).any(0))[:, 0].split(16):
            batch = slabs(volumes, slices, self.neighbours)
            height, width = batch.shape[2:]
            padded = F.pad(batch, (0, -width % _DIVISIBLE, 0, -height % _DIVISIBLE))
            try:
                with autocast(self.precision, self.device):
                    predicted = self.network(padded.to(self.device, memory_format=self.layout))
            except torch.cuda.OutOfMemoryError:
                warnings.warn(f"GPU memory exhausted: the {self.name} goes on on the CPU, which takes longer")
                self.device = "cpu"
                predicted = self.network.cpu()(padded)
            found[..., slices] = self.result(batch, predicted[..., :height, :width].float().cpu(), contrast).permute(
                1, 2, 3, 0
            )
        d[self.output_key] = MetaTensor(found * (volume > 0)).copy_meta_from(image)
        return d


class ReconstructionMapd(SliceMapd):
    """Add what a denoising autoencoder, trained on healthy slices, takes away: ``image - reconstruction``, signed so
    that lesions are high (dark on T1w, bright on T2w and FLAIR). See `SliceMapd`.
    """

    name = "reconstruction"

    def result(self, inputs: torch.Tensor, predicted: torch.Tensor, contrast: str) -> torch.Tensor:
        return LESION_SIGN[contrast] * (inputs - predicted)

"""A pixel-wise method beside the localiser: what a denoising autoencoder, trained on healthy slices, takes away."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import nn

from bundle.data.files import AUTO, of_contrast
from bundle.networks import load_weights
from bundle.scoring import LESION_SIGN


class ReconstructionMapd(MapTransform):
    """Add the residual of a reconstruction, slice by slice: ``image - reconstruction``, signed so that lesions are high
    (dark on T1w, bright on T2w and FLAIR). Adds nothing where there is no model.

    Args:
        keys: normalised volume ``[1, H, W, D]``, 0 outside the brain (one key).
        network: from slices ``[B, 1, H, W]`` to slices.
        model_file: its weights, a flat state dict; read when the first scan comes. For the contrast "auto" each
            scan's own (`of_contrast`).
        contrast: of the scan; "auto" takes the item's.
        device: to run on.
        output_key: where the residual ``[1, H, W, D]`` goes, 0 outside the brain.

    Raises:
        InputError: weights that cannot be read or are of another network.
    """

    def __init__(
        self,
        keys: KeysCollection,
        network: nn.Module,
        model_file: str,
        contrast: str,
        device: torch.device | str = "cpu",
        output_key: str = "reconstruction",
    ) -> None:
        super().__init__(keys)
        self.network, self.model_file, self.device = network, Path(model_file), device
        self.contrast, self.output_key = contrast, output_key
        self._loaded = ""

    @torch.no_grad()
    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        contrast = d["contrast"] if self.contrast == AUTO else self.contrast
        model_file = of_contrast(self.model_file, contrast)
        if self._loaded != model_file:
            if not Path(model_file).is_file():
                return d
            load_weights(self.network, model_file)
            self.network.to(self.device).eval()
            self._loaded = model_file
        image = d[self.keys[0]]
        volume = image.as_tensor().cpu().float()
        filled = torch.nonzero((volume[0] > 0).any(0).any(0))[:, 0]
        residual = torch.zeros_like(volume)
        for slices in filled.split(16):
            batch = volume[..., slices].permute(3, 0, 1, 2)
            try:
                pred = self.network(batch.to(self.device))
            except torch.cuda.OutOfMemoryError:
                warnings.warn("GPU memory exhausted: the reconstruction goes on on the CPU, which takes longer")
                self.device = "cpu"
                pred = self.network.cpu()(batch)
            residual[..., slices] = (batch - pred.float().cpu()).permute(1, 2, 3, 0)
        residual *= LESION_SIGN[contrast] * (volume > 0)
        d[self.output_key] = MetaTensor(residual).copy_meta_from(image)
        return d

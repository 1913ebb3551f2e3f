"""Where the brain is."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import FillHoles, KeepLargestConnectedComponent, MapTransform, ResampleToMatch
from scipy import ndimage

from bundle.errors import InputError

# A stripped scan is mostly zeros, and what is left has the size of a brain. Zeros alone prove nothing: scanners blank
# the air around a whole head too.
_STRIPPED_BACKGROUND = 0.3
_LARGEST_BRAIN_ML = 2200.0


def close_mask(mask: torch.Tensor, voxel_mm: np.ndarray, close_mm: float) -> torch.Tensor:
    """Morphological closing of ``[1, X, Y, Z]`` with a ball of radius ``close_mm``: an anatomical label map becomes
    a brain with its sulci.
    """
    pad = np.ceil(close_mm / voxel_mm).astype(int) + 1
    inside = np.pad(mask[0].cpu().numpy() > 0, [(p, p) for p in pad])
    near = ndimage.distance_transform_edt(~inside, sampling=voxel_mm) <= close_mm
    closed = ndimage.distance_transform_edt(near, sampling=voxel_mm) > close_mm
    core = tuple(slice(p, -p) for p in pad)
    return torch.as_tensor((closed | inside)[core], dtype=torch.float32)[None]


class BrainMaskd(MapTransform):
    """Make sure that there is a brain mask: the one given with the scan, or the scan's own outline if it is stripped.

    Leaves in ``mask_key`` a float ``[1, X, Y, Z]`` of 0 and 1 on the scan's grid.

    Args:
        keys: the scan (one key).
        mask_key: where a given mask is found and the result is put. A given mask may be any label map (> 0 is brain)
            on any grid that shares the scan's world.
        close_mm: radius by which a given mask is closed; 0 takes it as it is. Label maps of tissue need some.

    Raises:
        InputError: an empty mask, or a whole head without one.
    """

    def __init__(self, keys: str = "image", mask_key: str = "brain_mask", close_mm: float = 0.0) -> None:
        super().__init__(keys)
        self.mask_key, self.close_mm = mask_key, float(close_mm)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        image = d[self.keys[0]]
        name = image.meta.get("filename_or_obj", "scan")
        if self.mask_key in d:
            mask = self._given(d[self.mask_key], image)
        else:
            mask = self._outline(image, name)
        if not mask.any():
            given = d[self.mask_key].meta.get("filename_or_obj", "brain mask") if self.mask_key in d else name
            raise InputError(f"{given}: the brain mask is empty on the grid of {name}; give its own mask")
        # the mask moves with the scan from here on: same affine, same history
        d[self.mask_key] = MetaTensor(mask).copy_meta_from(image)
        return d

    def _given(self, mask: Any, image: MetaTensor) -> torch.Tensor:
        if mask.shape[1:] != image.shape[1:] or not torch.allclose(mask.affine, image.affine, atol=1e-3):
            mask = ResampleToMatch(mode="nearest", padding_mode="zeros")(mask, img_dst=image)
        inside = (mask.as_tensor() > 0).float()
        if self.close_mm:
            voxel = np.linalg.norm(np.asarray(image.affine, float)[:3, :3], axis=0)
            inside = torch.as_tensor(FillHoles()(close_mask(inside, voxel, self.close_mm)))
        return inside

    @staticmethod
    def _outline(image: MetaTensor, name: str) -> torch.Tensor:
        brain = image.as_tensor() != 0
        volume_ml = brain.sum().item() * abs(float(np.linalg.det(np.asarray(image.affine, float)[:3, :3]))) / 1000
        if 1 - brain.float().mean() < _STRIPPED_BACKGROUND or volume_ml > _LARGEST_BRAIN_ML:
            raise InputError(
                f"{name}: not skull-stripped and no brain mask given; strip it, or pass its mask with --brain_mask FILE"
            )
        largest: Any = KeepLargestConnectedComponent()(brain.float())
        return torch.as_tensor(FillHoles()(largest)).float()

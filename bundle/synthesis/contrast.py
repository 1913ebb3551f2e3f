"""Contrast: how bright each tissue is in a sequence, drawn anew for every scan."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable
from numpy.random import RandomState

from bundle.errors import InputError

from .tissue import REGION_NAMES, TISSUES

# from dark to bright; deep grey matter holds myelin and iron and lies between cortex and white matter
TISSUE_ORDER = {
    "t1": ("csf", "grey", "deep_grey", "white"),
    "t2": ("white", "deep_grey", "grey", "csf"),
    "flair": ("csf", "white", "deep_grey", "grey"),
}
# How much brighter than the rest of its tissue a region is, in units of the range from the darkest to the brightest
# tissue: as measured on eight real FLAIR scans of five people, but of the caudate a third, since fluid beside it blurs
# that measure (docs/results.md). Limbic cortex has little myelin, primary cortex much, the pallidum iron. T2w scans
# differ less, and not alike.
REGION_BRIGHTNESS: dict[str, dict[str, float]] = {
    "flair": {
        "ventral_striatum": 0.3,
        "amygdala": 0.2,
        "limbic": 0.15,
        "caudate": 0.1,
        "pallidum": -0.3,
        "thalamus": -0.1,
        "primary": -0.12,
    }
}
# between which shares of that a scan shows it: scans of other scanners show less, or nothing
_SHOWN = (0.3, 1.3)


def draw_brightness(contrast: str, random: RandomState) -> dict[str, float]:
    """Brightness of each tissue, the brightest 1, in the order that the sequence's physics gives (`TISSUE_ORDER`).

    The ratios are wide: those of sequences and scanners in use, and some beyond, so that a network learns the order
    and not the number.

    Args:
        contrast: "t1", "t2" or "flair".
        random: draws.
    """
    between = random.uniform(0.1, 0.9)
    if contrast == "t1":
        white, grey = 1.0, random.uniform(0.55, 0.8)
        csf = grey * random.uniform(0.1, 0.6)
    elif contrast == "t2":
        csf, grey = 1.0, random.uniform(0.35, 0.7)
        white = grey * random.uniform(0.55, 0.88)
    elif contrast == "flair":
        grey, white = 1.0, random.uniform(0.65, 0.92)
        csf = white * random.uniform(0.05, 0.5)
    else:
        raise InputError(f"contrast '{contrast}' is unknown: use one of {', '.join(TISSUE_ORDER)}")
    return {"csf": csf, "grey": grey, "deep_grey": white + between * (grey - white), "white": white}


class RandTissueContrastd(MapTransform, Randomizable):
    """Paint tissue shares in a contrast: ``image`` ``[1, X, Y, Z]``, 0 outside the brain.

    Every tissue gets its drawn brightness, changed by up to ``variation`` over a few centimetres (myelin, iron, coils),
    mixed by its share of the voxel. On FLAIR regions differ from the rest of their tissue, each by a drawn share of its
    `REGION_BRIGHTNESS`. The scan's own texture comes on top, strengthened, weakened or inverted, and so says no more
    than that brains are not smooth.

    Args:
        keys: tissue shares ``[4, X, Y, Z]`` of `TissueFractionsd`, a `MetaTensor` as all here. Its ``regions`` and
            ``texture`` are used if they are there.
        contrast: one of `TISSUE_ORDER`.
        variation: relative, of a tissue's brightness from place to place.
        texture: largest weight of ``texture``, if there is one.
        image_key: result.
    """

    def __init__(
        self,
        keys: str = "tissue",
        contrast: str = "t1",
        variation: float = 0.08,
        texture: float = 0.7,
        image_key: str = "image",
    ) -> None:
        super().__init__(keys)
        draw_brightness(contrast, RandomState(0))  # an unknown contrast is told at once
        self.contrast, self.variation, self.texture, self.image_key = contrast, variation, texture, image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        share = d[self.keys[0]].as_tensor()
        brightness = draw_brightness(self.contrast, self.R)
        coarse = torch.as_tensor(self.R.uniform(-1, 1, (1, len(TISSUES), 4, 4, 4)), dtype=share.dtype)
        field = F.interpolate(coarse.to(share.device), share.shape[1:], mode="trilinear", align_corners=True)[0]
        mean = torch.tensor([brightness[t] for t in TISSUES], dtype=share.dtype, device=share.device)
        image = (share * (mean.view(-1, 1, 1, 1) * (1 + self.variation * field))).sum(0, keepdim=True)
        scale = max(mean) - min(mean)
        weight = self.R.uniform(-self.texture, self.texture)
        if "texture" in d:
            image = image + weight * d["texture"].as_tensor() * scale
        if "regions" in d and self.contrast in REGION_BRIGHTNESS:
            full = torch.tensor([REGION_BRIGHTNESS[self.contrast][name] for name in REGION_NAMES])
            brighter = full * torch.as_tensor(self.R.uniform(*_SHOWN, len(full)))
            image = image + scale * torch.tensordot(brighter.to(share), d["regions"].as_tensor(), 1)[None]
        inside = share.sum(0, keepdim=True) > 0
        image = torch.where(inside, image.clamp(min=1e-3), 0.0)
        d[self.image_key] = MetaTensor(image).copy_meta_from(d[self.keys[0]])
        return d

"""A pixel-wise method beside the localiser: a network that learned to mark made-up anomalies in healthy volumes."""

from __future__ import annotations

from typing import Any

import torch

from bundle.data.files import of_contrast
from bundle.transforms import load_normative, with_normative

from .reconstruction import SliceMapd


class SegmentationMapd(SliceMapd):
    """Add the logit of a segmentation that was trained on made-up anomalies (`bundle.transforms.RandAnomaliesd`), from
    each slice, its neighbours, and the z-scores of both (`bundle.transforms.with_normative`). See `SliceMapd`.

    Args:
        normative: JSON file of the normative map; of the contrast "auto" each scan's own (`of_contrast`).
        neighbours: slices on each side that the network sees.

    Raises:
        InputError: there are weights, but no such normative map.
    """

    name = "segmentation"
    layout = torch.channels_last

    def __init__(self, *args: Any, normative: str, neighbours: int = 2, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.normative, self.neighbours = normative, neighbours

    def inputs(self, volume: torch.Tensor, contrast: str) -> list[torch.Tensor]:
        normative = load_normative(of_contrast(self.normative, contrast))
        return with_normative(volume, normative, contrast, self.facts.get("intensities") == "held")

"""Scoring as a dictionary transform, for the configs' postprocessing."""

from __future__ import annotations

from typing import Hashable, Mapping

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from bundle.errors import InputError

from .calibration import SCORES, Calibration


class AnomalyHeatmapd(MapTransform):
    """Turn anomaly channels into the heatmap of a named score (see `Calibration.heatmap`).

    Args:
        keys: anomaly channels ``[2, H, W, D]`` (one key), a `MetaTensor` as all here.
        score: one of `bundle.scoring.SCORES`.
        calibration: of the model and contrast.
        image_key: the normalised image on the same grid.
        output_key: where the heatmap ``[1, H, W, D]`` goes, with the image's geometry and history.
    """

    def __init__(
        self,
        keys: KeysCollection,
        score: str,
        calibration: Calibration,
        image_key: str = "image",
        output_key: str = "heatmap",
    ) -> None:
        super().__init__(keys)
        if score not in SCORES:
            raise InputError(f"score '{score}' is unknown: use one of {', '.join(SCORES)}")
        self.score, self.calibration = score, calibration
        self.image_key, self.output_key = image_key, output_key

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        d = dict(data)
        image = d[self.image_key]
        channels, values = (t.as_tensor().cpu().float() for t in (d[self.keys[0]], image))
        heatmap = self.calibration.heatmap(self.score, channels, values)
        d[self.output_key] = MetaTensor(heatmap).copy_meta_from(image)
        return d

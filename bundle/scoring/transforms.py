"""Scoring as dictionary transforms, for the configs' postprocessing."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, RemoveSmallObjects

from bundle.errors import InputError

from .calibration import SCORES, CalibrationFile


def check_score(score: str) -> str:
    """Return ``score`` if there is one of that name.

    Raises:
        InputError: there is none.
    """
    if score not in SCORES:
        raise InputError(f"score '{score}' is unknown: use one of {', '.join(SCORES)}")
    return score


class AnomalyHeatmapd(MapTransform):
    """Turn anomaly channels into the heatmap of a named score (see `Calibration.score`).

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
        calibration: CalibrationFile,
        image_key: str = "image",
        output_key: str = "heatmap",
    ) -> None:
        super().__init__(keys)
        self.score, self.calibration = check_score(score), calibration
        self.image_key, self.output_key = image_key, output_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        image = d[self.image_key]
        channels, values = (t.as_tensor().cpu().float() for t in (d[self.keys[0]], image))
        heatmap = self.calibration.load().score(self.score, channels, values)
        d[self.output_key] = MetaTensor(heatmap).copy_meta_from(image)
        return d


class FindLesionsd(MapTransform):
    """Cut a heatmap at a threshold and remove what is too small to be called a lesion.

    Args:
        keys: the heatmap ``[1, H, W, D]`` (one key).
        score: that the heatmap shows.
        calibration: of the model and contrast; holds the thresholds.
        quantile: of the healthy scores, above which a voxel is lesion.
        threshold: score to use instead of the calibration's.
        min_lesion_mm3: connected components (26 neighbours) below this volume are removed, mm^3.
        output_key: where the mask (float 0 and 1) goes.
    """

    def __init__(
        self,
        keys: KeysCollection,
        score: str,
        calibration: CalibrationFile,
        quantile: float,
        threshold: float | None = None,
        min_lesion_mm3: float = 0.0,
        output_key: str = "lesion",
    ) -> None:
        super().__init__(keys)
        self.score, self.calibration, self.quantile = check_score(score), calibration, quantile
        self.fixed_threshold, self.output_key = threshold, output_key
        self.remove_small = RemoveSmallObjects(int(min_lesion_mm3), connectivity=3, by_measure=True)

    def threshold(self) -> float:
        """The score above which a voxel is lesion; `InputError` if the calibration holds no such quantile."""
        if self.fixed_threshold is not None:
            return self.fixed_threshold
        return self.calibration.load().threshold(self.score, self.quantile)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        heatmap = d[self.keys[0]]
        lesion = MetaTensor((heatmap.as_tensor() > self.threshold()).float()).copy_meta_from(heatmap)
        d[self.output_key] = self.remove_small(lesion) if lesion.any() else lesion
        return d

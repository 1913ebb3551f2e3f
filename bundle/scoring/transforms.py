"""Scoring as dictionary transforms, for the configs' postprocessing."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, RemoveSmallObjects

from bundle.data.atlas import contrast_doubt, load_atlas
from bundle.data.own_volume import own_voxel_mm3
from bundle.errors import InputError, flag

from .calibration import SCORES, Calibration, CalibrationFile
from .paper import PAPER_SCORES


def chosen_threshold(text: str | float | None) -> float | None:
    """The threshold that a user gave, or None for that of the calibration ("calibrated", or nothing).

    Raises:
        InputError: not a number.
    """
    if text is None or str(text).strip() in ("", "calibrated"):
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"threshold '{text}': give a number, or 'calibrated'")
    return value


def check_score(score: str, extra_maps: Sequence[str] = ()) -> str:
    """Return ``score`` if there is one of that name.

    Raises:
        InputError: there is none.
    """
    known = (*SCORES, *PAPER_SCORES, "fusion", *extra_maps)
    if score not in known:
        raise InputError(f"score '{score}' is unknown: use one of {', '.join(known)}")
    return score


def score_of(
    name: str, calibration: Calibration, data: Mapping[Hashable, Any], channels_key: Hashable, image_key: Hashable
) -> MetaTensor:
    """Score map ``[1, H, W, D]`` of one scan, with the image's geometry and history; see `Calibration.score`. The maps
    of other methods are found under their names.
    """
    image = data[image_key]
    maps = {key: data[key].as_tensor().cpu().float() for key in calibration.extra_maps if key in data}
    channels, values = (t.as_tensor().cpu().float() for t in (data[channels_key], image))
    return MetaTensor(calibration.score(name, channels, values, maps)).copy_meta_from(image)


class CheckLikenessd(MapTransform):
    """Flag a scan that is not what its calibration knows: tissues ordered as in another contrast (`contrast_doubt`), or
    too much of the brain far from the intensities of healthy people.

    With the shipped calibrations at most a tenth of the brain lies beyond 3 spreads in healthy scans and in those of
    patients with strokes of up to 175 ml; a scan of another contrast has a third or more.

    Args:
        keys: the normalised image ``[1, H, W, D]`` on the atlas grid (one key).
        calibration: of the model and contrast.
        atlas: that scans are aligned to, see `load_atlas`; tissues are looked for in the default one only.
        largest_share: of the brain, beyond 3 spreads.
    """

    def __init__(
        self, keys: KeysCollection, calibration: CalibrationFile, atlas: str | None = None, largest_share: float = 0.25
    ) -> None:
        super().__init__(keys)
        self.calibration, self.atlas, self.largest_share = calibration, atlas, largest_share

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d, calibration = dict(data), self.calibration.load()
        image = d[self.keys[0]]
        volume = image.as_tensor().cpu().float()
        share = float((calibration.standardise("intensity", volume).abs()[volume > 0] > 3).float().mean())
        doubts = [contrast_doubt(image, calibration.contrast, load_atlas(None))] if self.atlas is None else []
        if share > self.largest_share:
            doubts.append(f"{share:.0%} of its brain is unlike healthy {calibration.contrast} scans")
        for doubt in filter(None, doubts):
            d = flag(d, doubt)
        return d


class AnomalyHeatmapd(MapTransform):
    """Turn anomaly channels into the heatmap of a named score (see `Calibration.score`).

    Args:
        keys: anomaly channels ``[2, H, W, D]`` (one key), a `MetaTensor` as all here.
        score: one of `bundle.scoring.SCORES`, "fusion", or a map that scans bring along.
        calibration: of the model and contrast.
        extra_maps: names of maps that scans may bring along.
        image_key: the normalised image on the same grid.
        output_key: where the heatmap ``[1, H, W, D]`` goes, with the image's geometry and history.
    """

    def __init__(
        self,
        keys: KeysCollection,
        score: str,
        calibration: CalibrationFile,
        extra_maps: Sequence[str] = ("reconstruction", "segmentation"),
        image_key: str = "image",
        output_key: str = "heatmap",
    ) -> None:
        super().__init__(keys)
        self.score, self.calibration = check_score(score, extra_maps), calibration
        self.image_key, self.output_key = image_key, output_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        d[self.output_key] = score_of(self.score, self.calibration.load(), d, self.keys[0], self.image_key)
        return d


class FindLesionsd(MapTransform):
    """Cut a heatmap at a threshold and remove what is too small to be called a lesion.

    Args:
        keys: the heatmap ``[1, H, W, D]`` (one key).
        score: that the heatmap shows.
        calibration: of the model and contrast; holds the thresholds.
        quantile: of the healthy scores, above which a voxel is lesion.
        threshold: score to use instead of the calibration's; see `chosen_threshold`.
        min_lesion_mm3: connected components (26 neighbours) below this volume are removed, mm^3 of the scan itself,
            also where the heatmap lies on the atlas.
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
        self.score, self.calibration, self.quantile = score, calibration, quantile
        self.fixed_threshold, self.output_key = chosen_threshold(threshold), output_key
        self.min_lesion_mm3 = float(min_lesion_mm3)

    def threshold(self) -> float:
        """The score above which a voxel is lesion; `InputError` if the calibration holds no such quantile."""
        if self.fixed_threshold is not None:
            return self.fixed_threshold
        return self.calibration.load().threshold(self.score, self.quantile)

    def cut(self, heatmap: MetaTensor, threshold: float, to_atlas: Any = None) -> MetaTensor:
        """Mask (float 0 and 1) of the voxels above ``threshold``, without what is too small; ``to_atlas`` as in
        `own_voxel_mm3`.
        """
        lesion = MetaTensor((heatmap.as_tensor() > threshold).float()).copy_meta_from(heatmap)
        voxels = self.min_lesion_mm3 / own_voxel_mm3(heatmap, to_atlas)
        least = math.ceil(voxels * (1 - 1e-6))  # what is just as large as the limit stays
        return MetaTensor(RemoveSmallObjects(least, connectivity=3)(lesion)) if lesion.any() else lesion

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        lesion = self.cut(data[self.keys[0]], self.threshold(), data.get("to_atlas"))
        return {**data, self.output_key: lesion}

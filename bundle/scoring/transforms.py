"""Scoring as dictionary transforms, for the configs' postprocessing."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage

from bundle.data.atlas import contrast_doubt, load_atlas
from bundle.data.own_volume import own_voxel_mm3
from bundle.errors import InputError, flag

from .calibration_file import CalibrationFile
from .operating import FINDING_MM3, POINTS, require_point
from .paper import PAPER_SCORES
from .scores import SCORES, Calibration


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
        d, calibration = dict(data), self.calibration.load(data.get("contrast"))
        image = d[self.keys[0]]
        volume = image.as_tensor().cpu().float()
        share = float((calibration.intensity_z(volume).abs()[volume > 0] > 3).float().mean())
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
        extra_maps: Sequence[str] = (),
        image_key: str = "image",
        output_key: str = "heatmap",
    ) -> None:
        super().__init__(keys)
        self.score, self.calibration = check_score(score, extra_maps), calibration
        self.image_key, self.output_key = image_key, output_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        calibration = self.calibration.load(d.get("contrast"))
        d[self.output_key] = score_of(self.score, calibration, d, self.keys[0], self.image_key)
        return d


class FindLesionsd(MapTransform):
    """Cut a heatmap at a threshold and remove what is too small to be called a lesion.

    Args:
        keys: the heatmap ``[1, H, W, D]`` (one key).
        score: that the heatmap shows.
        calibration: of the model and contrast; holds the thresholds.
        quantile: of the healthy scores, above which a voxel is lesion; None: the operating point decides.
        threshold: score to use instead of the calibration's; see `chosen_threshold`.
        operating_point: one of `bundle.scoring.POINTS`.
        min_lesion_mm3: connected components (26 neighbours) below this volume are removed, mm^3 of the scan itself,
            also where the heatmap lies on the atlas.
        output_key: where the mask (float 0 and 1) goes.
    """

    def __init__(
        self,
        keys: KeysCollection,
        score: str,
        calibration: CalibrationFile,
        quantile: float | None = None,
        threshold: float | None = None,
        min_lesion_mm3: float = 0.0,
        output_key: str = "lesion",
        operating_point: str = "specific",
    ) -> None:
        super().__init__(keys)
        self.score, self.calibration, self.quantile = score, calibration, quantile
        self.fixed_threshold, self.output_key = chosen_threshold(threshold), output_key
        self.min_lesion_mm3, self.operating_point = float(min_lesion_mm3), require_point(operating_point)

    def threshold(self, method: str | None = None, contrast: str | None = None) -> float:
        """The score above which a voxel is lesion.

        Args:
            method: another score than this, as healthy scans give it.
            contrast: of the scan, where there are several calibrations.

        Raises:
            InputError: the calibration holds no such quantile or operating point.
        """
        if method is None and self.fixed_threshold is not None:
            return self.fixed_threshold
        calibration, name = self.calibration.load(contrast), self.score if method is None else method
        if self.quantile is None:
            return calibration.point(name, self.operating_point)
        return calibration.threshold(name, self.quantile)

    def rule(self) -> str:
        """How healthy scans give the threshold, in words."""
        if self.quantile is not None:
            return f"quantile {self.quantile:g} of the brain voxels of healthy scans held out for calibration"
        return (
            f"operating point '{self.operating_point}': healthy scans held out for calibration have at most "
            f"{POINTS[self.operating_point]:g} findings above {FINDING_MM3:g} mm3 on average"
        )

    def cut(self, heatmap: MetaTensor, threshold: float, to_atlas: Any = None) -> MetaTensor:
        """Mask (float 0 and 1) of the voxels above ``threshold``, without what is too small; ``to_atlas`` as in
        `own_voxel_mm3`.
        """
        voxels = self.min_lesion_mm3 / own_voxel_mm3(heatmap, to_atlas)
        least = math.ceil(voxels * (1 - 1e-6))  # what is just as large as the limit stays
        regions, _ = ndimage.label((heatmap.as_tensor()[0] > threshold).cpu().numpy(), np.ones((3, 3, 3)))
        kept = np.bincount(regions.ravel()) >= least  # MONAI's RemoveSmallObjects sorts all voxels first
        kept[0] = False
        lesion = torch.as_tensor(kept[regions], dtype=torch.float32, device=heatmap.device)
        return MetaTensor(lesion[None]).copy_meta_from(heatmap)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        lesion = self.cut(data[self.keys[0]], self.threshold(contrast=data.get("contrast")), data.get("to_atlas"))
        return {**data, self.output_key: lesion}


class IfNeededd(MapTransform):
    """Apply a transform that adds a map, where the score needs that map: one of weight 0 in the fusion costs no time.

    Args:
        keys: the map that it adds (one key).
        transform: dictionary transform.
        score: that is going to be made.
        calibration: of the model and contrast.
    """

    def __init__(
        self,
        keys: KeysCollection,
        transform: Callable[[Mapping[Hashable, Any]], dict[Hashable, Any]],
        score: str,
        calibration: CalibrationFile,
    ) -> None:
        super().__init__(keys)
        self.transform, self.score, self.calibration = transform, score, calibration

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        needed = self.calibration.load(data.get("contrast")).needed_maps(self.score)
        return self.transform(data) if self.keys[0] in needed else dict(data)

"""The scores: a line of `SCORES` for each, and the way from a scan's maps to a score, in the order of the steps.

The raw maps depend on where one looks: cortex and skull base always localise worse than the ventricles. Healthy people
tell, for every place of the atlas, the usual value of a map and its spread; a score counts how many spreads a scan lies
above it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from bundle.errors import InputError
from bundle.transforms.normative import ALL, LESION_SIGN, NormativeMap, hold

from .anomaly import fill_outside, smooth_inside
from .fusion import Fusion
from .paper import PAPER_SCORES, paper_score

# Sigma of the Gaussian that each map passes first, mm: what single patches add by chance averages out over 3 mm, as a
# patch of 16 mm is no sharper; voxel-wise maps lose small lesions to it (docs/results.md). Other maps pass `OTHER_MM`.
FILTER_MM = {
    **{"squared_error": 3.0, "variance": 3.0, "embedding": 3.0},
    **{"z": 2.0, "asymmetry": 2.0, "reconstruction": 2.0, "segmentation": 1.0, "intensity": 0.0},
}
OTHER_MM = 3.0
# a z-score of a voxel far beyond the healthy ones says no more than one just beyond: two wrong voxels are no lesion
_Z_RANGE = (-4.0, 10.0)
# voxels so many spreads above a scan's level are none of its healthy ones; how often level and spread are found anew
_INLIERS, _ROUNDS = 2.5, 8


@dataclass(frozen=True)
class Score:
    """What a score is made of.

    Attributes:
        maps: of the scan, filtered (`FILTER_MM`); several are added.
        by_place: each map as a z-score against healthy brains at its place, and so the sum of several; else as it is.
        centred: brought to the scan's own level, see `within_scan`.
        tail: what is above grows by the logarithm only, so that one map cannot drown the others of a fusion.
        sign: -1 turns the map over.
    """

    maps: tuple[str, ...]
    by_place: bool = True
    centred: bool = True
    tail: float = 5.0
    sign: float = 1.0


_RAW: dict[str, Any] = {"by_place": False, "centred": False, "tail": math.inf}
SCORES = {
    "location": Score(("squared_error", "variance", "embedding")),
    "embedding": Score(("embedding",)),
    "error_and_variance": Score(("squared_error", "variance")),
    "squared_error": Score(("squared_error",)),
    "variance": Score(("variance",)),
    "uncalibrated": Score(("squared_error", "variance"), **_RAW),
    "atlas_z": Score(("z",), by_place=False),
    "asymmetry": Score(("asymmetry",)),
    "reconstruction": Score(("reconstruction",)),
    # the network has seen the z-score, and so the place; by place once more, its certainty would count twice
    "segmentation": Score(("segmentation",), by_place=False),
    "intensity": Score(("intensity",), **_RAW),
    "intensity_opposite": Score(("intensity",), **_RAW, sign=-1.0),
}
# scores that need no network: the baselines that every table must show
INTENSITY_SCORES = ("atlas_z", "intensity", "intensity_opposite")
# maps that every scan has; others it brings along
OWN_MAPS = ("squared_error", "variance", "z", "asymmetry", "intensity")


def definition(name: str) -> Score:
    """The line of a score; that of another method's map is like the reconstruction's."""
    return SCORES.get(name, Score((name,)))


def raw_maps(
    channels: torch.Tensor,
    image: torch.Tensor,
    maps: Mapping[str, torch.Tensor],
    contrast: str,
    normative: NormativeMap,
    telling: tuple[float, float] = ALL,
) -> dict[str, torch.Tensor]:
    """The maps of one scan by name, ``[1, H, W, D]`` each, before any filter: `OWN_MAPS`, and ``maps``.

    "z" is the z-score of the intensity at its place, "asymmetry" the difference to the intensity at the mirrored place
    and "intensity" the intensity, all signed so that lesions are high. The mirror stands in the middle of the grid,
    where the atlas' hemispheres meet; what has no brain opposite is as bright as its opposite. The asymmetry is that of
    intensities held to ``telling``: no two sides have fluid in the very same places.
    """
    sign = LESION_SIGN[contrast]
    held = hold(image, telling)
    opposite = held.flip(1)
    own = {
        "squared_error": channels[:1],
        "variance": channels[1:2],
        "z": normative.z(image, contrast, telling=True).clamp(*_Z_RANGE),
        "asymmetry": sign * torch.where((held > 0) & (opposite > 0), held - opposite, 0.0),
        "intensity": sign * image,
    }
    return {**own, **maps}


def within_scan(score: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Take off the scan's own level and, where its scores spread more than healthy ones do, divide by their spread.

    Another scanner makes all patches a little harder to place. A lesion must count for nothing, however large: the
    level is the median of the voxels less than 2.5 spreads above it, the spread 1.4826 times the median distance of
    those below it; both are found by turns. A scan of the calibrated kind has 0 and 1 already.

    Args:
        score: calibrated, ``[1, H, W, D]``.
        inside: ``[1, H, W, D]`` bool.
    """
    values = score[inside]
    values = values[:: max(1, len(values) // 50_000)]  # as many tell a median as millions do
    usual = values
    for _ in range(_ROUNDS):
        level = usual.median()
        spread = 1.4826 * (level - usual[usual <= level]).median()
        usual = values[values < level + _INLIERS * spread.clamp(min=1e-6)]
    return (score - level) / spread.clamp(min=1.0)


@dataclass(frozen=True)
class Calibration:
    """What is usual among healthy people, in atlas space, and the scores that it makes of a scan.

    Attributes:
        contrast: of the scans.
        mean, spread: of the filtered maps, and of sums of several (by the name of the score): name ->
            ``[1, h, w, d]``; may be coarser than the grid, of the same extent.
        quantiles: name of a score -> {quantile as text: score}, of the brain voxels of the median healthy scan, each
            person left out of the maps.
        filter_sigma: name of a map -> sigma of the Gaussian that it passes first, voxels of the grid.
        provenance: number of subjects, hashes of the models, grid.
        normative: how bright healthy people are at every place.
        fusion: what "fusion" means.
        points: name of a score -> {name of an operating point: threshold}, see `bundle.scoring.operating`.
        location: the maps of the score "location" on this contrast.
        telling: lowest and highest intensity that the asymmetry tells apart.
    """

    contrast: str
    mean: Mapping[str, torch.Tensor]
    spread: Mapping[str, torch.Tensor]
    quantiles: Mapping[str, Mapping[str, float]]
    filter_sigma: Mapping[str, float]
    provenance: Mapping[str, Any]
    normative: NormativeMap | None = None
    fusion: Fusion | None = None
    points: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    location: tuple[str, ...] = ("squared_error", "variance")
    telling: tuple[float, float] = ALL

    @property
    def extra_maps(self) -> list[str]:
        """Names of the maps beyond `OWN_MAPS`: those of other methods, which each scan must bring along."""
        return [name for name in self.filter_sigma if name not in OWN_MAPS]

    def needed_maps(self, name: str) -> set[str]:
        """Names of the maps that a score is made of."""
        if name == "fusion":
            return set().union(*(self.needed_maps(part) for part in (self.fusion.weights if self.fusion else ())))
        if name in PAPER_SCORES:
            return {"squared_error", "variance"}
        return set(self._maps_of(name))

    def _maps_of(self, name: str) -> list[str]:
        return list(self.location if name == "location" else definition(name).maps)

    def in_spreads(self, name: str, volume: torch.Tensor) -> torch.Tensor:
        """(volume - mean) / spread of what is called ``name``, for ``[1, H, W, D]`` on the atlas grid."""
        mean, spread = (
            F.interpolate(m[None].to(volume), volume.shape[1:], mode="trilinear", align_corners=False)[0]
            for m in (self.mean[name], self.spread[name])
        )
        return (volume - mean) / spread

    def intensity_z(self, image: torch.Tensor) -> torch.Tensor:
        """Healthy spreads by which intensities ``[1, H, W, D]`` lie above the usual of their place."""
        if self.normative is None:
            raise InputError("the calibration has no normative map")
        mean, spread, _ = self.normative.on(image.shape[1:])
        return (image - mean) / spread

    def score(
        self, name: str, channels: torch.Tensor, image: torch.Tensor, maps: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Score map ``[1, H, W, D]``, larger is more abnormal; outside the brain the lowest score inside.

        Args:
            name: in `SCORES` or `extra_maps`, "fusion" (of any of these), or in `PAPER_SCORES`.
            channels: anomaly channels ``[2, H, W, D]``.
            image: normalised intensities ``[1, H, W, D]``, 0 outside the brain.
            maps: of other methods ``[1, H, W, D]``, by name.

        Raises:
            InputError: a score that there is none of, or a map that the scan or the calibration lacks.
        """
        if name in PAPER_SCORES:
            return paper_score(name, channels, image > 0)
        if self.normative is None:
            raise InputError("the calibration has no normative map")
        inside = image > 0
        raw = raw_maps(channels, image, maps or {}, self.contrast, self.normative, self.telling)
        filtered = {
            m: smooth_inside(raw[m], inside, self.filter_sigma[m])
            for m in self.needed_maps(name)
            if m in raw and m in self.filter_sigma
        }
        return self.score_filtered(name, filtered, inside)

    def score_filtered(self, name: str, filtered: Mapping[str, torch.Tensor], inside: torch.Tensor) -> torch.Tensor:
        """`score` of maps that have passed their Gaussians."""
        if name == "fusion":
            if self.fusion is None:
                raise InputError("score 'fusion' needs a rule and weights (fusion_rule, fusion_weights)")
            parts = {part: self.score_filtered(part, filtered, inside) for part in self.fusion.weights}
            return fill_outside(self.fusion(parts, inside), inside)
        score, maps = definition(name), self._maps_of(name)
        for m in maps:
            if m not in self.filter_sigma:
                raise InputError(f"no map '{m}' in the calibration: run the calibration again with it")
            if m not in filtered:
                raise InputError(f"the map '{m}' is missing for this scan")
        if score.by_place:
            total = torch.stack([self.in_spreads(m, filtered[m]) for m in maps]).sum(0)
            if len(maps) > 1:
                total = self.in_spreads(name, total)
        else:
            total = score.sign * torch.stack([filtered[m] for m in maps]).sum(0)
        if score.centred:
            total = within_scan(total, inside)
        beyond = (total - score.tail).clamp(min=0)
        return fill_outside(torch.where(beyond > 0, score.tail + beyond.log1p(), total), inside)

    def threshold(self, name: str, quantile: float) -> float:
        """Score that ``quantile`` of healthy brain voxels do not exceed.

        Raises:
            InputError: a score or quantile that was not stored.
        """
        return self._stored(self.quantiles, name, f"{quantile:g}", "quantile")

    def point(self, name: str, operating_point: str) -> float:
        """Threshold of a score at an operating point.

        Raises:
            InputError: a score or point that was not stored.
        """
        return self._stored(self.points, name, operating_point, "operating point")

    def _stored(self, table: Mapping[str, Mapping[str, float]], name: str, key: str, kind: str) -> float:
        try:
            return table[name][key]
        except KeyError as error:
            if name == "fusion" and name not in table:
                raise InputError(
                    f"the calibration holds no threshold of the fusion '{self.fusion}': run the calibration with the "
                    "same fusion_rule and fusion_weights, or give --threshold"
                ) from error
            if name not in table:
                raise InputError(
                    f"the calibration of {self.contrast} holds no score '{name}', but {', '.join(table)}: run the "
                    "calibration with what makes it (docs/options.md)"
                ) from error
            stored = ", ".join(table[name])
            raise InputError(
                f"no threshold of score '{name}' at {kind} {key}: stored are {stored}; run the calibration "
                "again where an older version made it"
            ) from error

"""Fusion: several calibrated maps of a scan combined into one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from scipy import stats

from bundle.errors import InputError

# chosen on planted lesions (docs/results.md): the maps that every scan has, and the one that needs a second network
_WEIGHTS, _RECONSTRUCTION = {"location": 1.0, "atlas_z": 1.0}, {"reconstruction": 2.0}
_RAW = ("uncalibrated", "intensity", "intensity_opposite")
RULES = ("sum", "product", "maximum", "rank")


@dataclass(frozen=True)
class Fusion:
    """A rule, and the weight of each map that it combines.

    With maps z (healthy spreads above the usual) and weights w that are brought to a sum of 1:

    - "sum": the weighted mean of z; one map can make up for another.
    - "product": of upper tails, the weighted geometric mean of max(z, 0); 0 wherever one map sees nothing unusual.
    - "maximum": the largest of w z, in units of the largest weight; one map is enough.
    - "rank": the weighted mean of each voxel's rank among the scan's brain voxels, in [0, 1], equal values sharing
      theirs. It knows the order alone: as much is found in a healthy scan as in any other.

    Attributes:
        rule: one of `RULES`.
        weights: name of a score (`bundle.scoring.SCORES`, "reconstruction", "segmentation" or a `fusion_maps` name) -> weight > 0.

    Raises:
        InputError: an unknown rule, no maps, a map that is no z-score for a rule that needs them, or a weight that is
            not above 0.
    """

    rule: str = "sum"
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise InputError(f"fusion_rule '{self.rule}' is unknown: use one of {', '.join(RULES)}")
        if not self.weights or "fusion" in self.weights:
            raise InputError("fusion_weights must name the maps to be fused, each with its weight")
        raw = [name for name in self.weights if name in _RAW and self.rule != "rank"]
        if raw:
            raise InputError(f"fusion_weights: '{raw[0]}' is no z-score; only fusion_rule 'rank' takes it")
        for name, weight in self.weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
                raise InputError(f"fusion_weights: the weight of '{name}' must be a number above 0, not {weight!r}")

    def __str__(self) -> str:
        return f"{self.rule} of " + ", ".join(f"{weight:g} {name}" for name, weight in self.weights.items())

    def __call__(self, maps: Mapping[str, torch.Tensor], inside: torch.Tensor) -> torch.Tensor:
        """Combine maps ``[1, H, W, D]``, inside the brain ``[1, H, W, D]`` (bool); 0 outside.

        Raises:
            InputError: a map is missing.
        """
        missing = [name for name in self.weights if name not in maps]
        if missing:
            raise InputError(f"fusion needs the map '{missing[0]}', which this scan does not have")
        values = torch.stack([maps[name][inside].double() for name in self.weights])
        weights = torch.tensor([float(w) for w in self.weights.values()], dtype=torch.float64)[:, None]
        share = weights / weights.sum()
        if self.rule == "sum":
            fused = (share * values).sum(0)
        elif self.rule == "product":
            fused = (values.clamp(min=0) ** share).prod(0)
        elif self.rule == "maximum":
            fused = (values * weights / weights.max()).max(0).values
        else:
            ranks = torch.as_tensor(stats.rankdata(values.numpy(), axis=1))
            fused = (share * (ranks - 1) / max(values.shape[1] - 1, 1)).sum(0)
        result = torch.zeros(inside.shape)
        result[inside] = fused.float()
        return result


def usual_weights(reconstruction_path: str | Path) -> dict[str, float]:
    """Weights of the fusion that is used if none is named: location, the atlas z-score and, where its network's weights
    are there, the reconstruction residual. A calibration holds the thresholds of one fusion, so that nobody loses or
    gains that file without being told.
    """
    return {**_WEIGHTS, **(_RECONSTRUCTION if Path(reconstruction_path).is_file() else {})}

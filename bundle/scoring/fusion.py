"""Fusion: several calibrated maps of a scan combined into one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from scipy import stats

from bundle.errors import InputError

from .model_folder import PARTS, part_file

_RAW = ("uncalibrated", "intensity", "intensity_opposite")
# What one map finds less unusual than usual must not take away what another has found: values below 0 count so little
# in a sum, which keeps their order.
_BELOW = 0.05
RULES = ("sum", "product", "maximum", "rank")


@dataclass(frozen=True)
class Fusion:
    """A rule, and the weight of each map that it combines.

    With z-scores z and weights w that are brought to a sum of 1:

    - "sum": the weighted mean of z, of which a twentieth counts below 0; one map can make up for another, but nothing
      takes away what another has found.
    - "product": of upper tails, the weighted geometric mean of max(z, 0); 0 wherever one map sees nothing unusual.
    - "maximum": the largest of w z, in units of the largest weight; one map is enough.
    - "rank": the weighted mean of each voxel's rank among the scan's brain voxels, in [0, 1], equal values sharing
      theirs. It knows the order alone: as much is found in a healthy scan as in any other.

    Attributes:
        rule: one of `RULES`.
        weights: name of a score (`bundle.scoring.SCORES`, or a `fusion_maps` name) -> weight; of weight 0: left out.

    Raises:
        InputError: an unknown rule, no maps, a map that is no z-score for a rule that needs them, or a negative weight.
    """

    rule: str = "sum"
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise InputError(f"fusion_rule '{self.rule}' is unknown: use one of {', '.join(RULES)}")
        raw = [name for name in self.weights if name in _RAW and self.rule != "rank"]
        if raw:
            raise InputError(f"fusion_weights: '{raw[0]}' is no z-score; only fusion_rule 'rank' takes it")
        for name, weight in self.weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
                raise InputError(f"fusion_weights: the weight of '{name}' must be a number, at least 0, not {weight!r}")
        object.__setattr__(self, "weights", {name: weight for name, weight in self.weights.items() if weight > 0})
        if not self.weights or "fusion" in self.weights:
            raise InputError("fusion_weights must name the maps to be fused, each with its weight")

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
            fused = (share * torch.where(values < 0, _BELOW * values, values)).sum(0)
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


def usual_weights(weights: Mapping[str, float], ckpt_dir: str | Path, contrast: str) -> dict[str, float]:
    """Those of ``weights`` whose maps can be made: not of networks, or an embedding, that do not lie in ``ckpt_dir``. A
    calibration keeps the fusion that it was made with, so that nobody loses or gains such a file without being told.
    """
    return {n: w for n, w in weights.items() if n not in PARTS or Path(part_file(n, ckpt_dir, contrast)).is_file()}


def replaced(stored: Fusion | None, rule: str | None, weights: Mapping[str, float] | None) -> Fusion | None:
    """The fusion of a calibration, with another rule or other weights where they are given."""
    if rule is None and weights is None:
        return stored
    usual = Fusion(weights={"location": 1.0}) if stored is None else stored
    return Fusion(rule or usual.rule, usual.weights if weights is None else weights)

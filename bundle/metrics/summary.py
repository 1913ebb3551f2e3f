"""From cases to a cohort: means with their uncertainty, pooled figures, lesions by size, healthy scans."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from .case import CASE_METRICS, CaseMeasures
from .curves import ScoreCurve, best_threshold

# lesions by volume, ml: from, to
SIZE_CLASSES = {
    "below 0.1 ml": (0.0, 0.1),
    "0.1 to 1 ml": (0.1, 1.0),
    "1 to 10 ml": (1.0, 10.0),
    "above 10 ml": (10.0, math.inf),
}


@dataclass(frozen=True)
class Case:
    """All methods on one scan.

    Attributes:
        name: of the scan.
        person: whose it is; scans of one person are not independent.
        purpose: "test", "tuning" or "healthy", see `bundle.data.evaluation_items`.
        methods: name -> measures.
    """

    name: str
    person: str
    purpose: str
    methods: Mapping[str, CaseMeasures]

    @classmethod
    def of(cls, record: Case | Mapping[str, Any]) -> Case:
        """A case, or one that was read from a record (`bundle.shards.from_bytes`)."""
        if isinstance(record, Case):
            return record
        measures = {
            name: CaseMeasures(**{**part, "curve": ScoreCurve(**part["curve"])})
            for name, part in record["methods"].items()
        }
        return cls(**{**record, "methods": measures})


def number(value: float) -> float | None:
    """For JSON: None instead of what is no number (a figure that is not defined)."""
    return float(value) if math.isfinite(value) else None


def bootstrap_interval(values: Sequence[float], people: Sequence[str], seed: int = 0) -> list[float | None]:
    """95 % interval of the mean over people, by resampling people 5,000 times (percentiles).

    Args:
        values: of each case; NaN are left out.
        people: whose case it is; a person with several counts with their mean.
        seed: of the resampling.

    Returns:
        lower and upper end; None for fewer than two people.
    """
    groups: dict[str, list[float]] = {}
    for value, person in zip(values, people):
        if not math.isnan(value):
            groups.setdefault(person, []).append(value)
    means = np.array([np.mean(v) for v in groups.values()])
    if len(means) < 2:
        return [None, None]
    generator = np.random.default_rng(seed)
    found = stats.bootstrap((means,), np.mean, n_resamples=5000, method="percentile", random_state=generator)
    return [float(end) for end in found.confidence_interval]


def tuned_thresholds(cases: Sequence[Case]) -> dict[str, float]:
    """Per method, the threshold of the highest mean Dice on the tuning scans; empty where none has lesions."""
    tuning = [c for c in cases if c.purpose == "tuning"]
    if not any(m.curve.positive.sum() for c in tuning for m in c.methods.values()):
        return {}
    return {name: best_threshold([c.methods[name].curve for c in tuning]) for name in tuning[0].methods}


def summarise(cases: Sequence[Case], score: str) -> dict[str, Any]:
    """All that ``metrics.json`` tells about a cohort.

    Args:
        cases: of all purposes.
        score: the method that the others are compared with.

    Returns:
        ``methods`` (each of `CASE_METRICS` as ``_mean``, ``_sd``, ``_ci95``, what is ``_pooled``, ``tuned_threshold``,
        ``lesions`` by size, ``healthy``, and ``auprc_gain_of_score_ci95`` where it is not the score itself), ``cases``,
        ``cases_with_lesions``, ``cases_without_lesions``, ``tuning_cases``, ``healthy_cases``.
    """
    thresholds = tuned_thresholds(cases)
    test = [c for c in cases if c.purpose == "test"]
    people = [c.person for c in test]
    names = list(test[0].methods)
    rows = {c.name: {m: _values(c.methods[m], thresholds.get(m)) for m in names} for c in test}
    empty = [c for c in test if not c.methods[names[0]].curve.positive.sum()]
    without = [*empty, *(c for c in cases if c.purpose == "healthy")]
    methods: dict[str, dict[str, Any]] = {}
    for name in names:
        figures: dict[str, Any] = {}
        for metric in CASE_METRICS:
            values = np.array([rows[c.name][name][metric] for c in test])
            known = values[~np.isnan(values)]
            figures[f"{metric}_mean"] = number(known.mean()) if known.size else None
            figures[f"{metric}_sd"] = number(known.std(ddof=1)) if known.size > 1 else None
            figures[f"{metric}_ci95"] = bootstrap_interval(values.tolist(), people)
        figures["hausdorff95_cases"] = int(sum(not math.isnan(rows[c.name][name]["hausdorff95_mm"]) for c in test))
        curve = ScoreCurve.pooled([c.methods[name].curve for c in test])
        figures |= {"auprc_pooled": number(curve.auprc()), "auroc_pooled": number(curve.auroc())}
        figures["tuned_threshold"] = thresholds.get(name)
        figures["lesions"] = _by_size([c.methods[name] for c in test])
        figures["healthy"] = _healthy([c.methods[name] for c in without])
        if name != score:
            gains = [rows[c.name][score]["auprc"] - rows[c.name][name]["auprc"] for c in test]
            figures["auprc_gain_of_score_ci95"] = bootstrap_interval(gains, people)
        methods[name] = figures
    return {
        "methods": methods,
        "cases": {c: {m: {k: number(v) for k, v in r.items()} for m, r in by.items()} for c, by in rows.items()},
        "cases_with_lesions": len(test) - len(empty),
        "cases_without_lesions": [c.name for c in empty],
        "tuning_cases": sum(c.purpose == "tuning" for c in cases),
        "healthy_cases": sum(c.purpose == "healthy" for c in cases),
    }


def _values(measures: CaseMeasures, tuned: float | None) -> dict[str, float]:
    values = dict(measures.values)
    if tuned is not None:
        values["dice_tuned"] = float(measures.curve.dice(np.array([tuned]))[0])
        values["dice_best"] = max(values["dice_best"], values["dice_tuned"])
    return values


def _by_size(measures: Sequence[CaseMeasures]) -> dict[str, dict[str, Any]]:
    volumes = np.concatenate([m.lesion_ml for m in measures])
    found = np.concatenate([m.lesion_found for m in measures]).astype(bool)
    classes = {}
    for name, (low, high) in {"all": (0.0, math.inf), **SIZE_CLASSES}.items():
        inside = (volumes >= low) & (volumes < high)
        total, hit = int(inside.sum()), int((inside & found).sum())
        classes[name] = {"lesions": total, "found": hit, "recall": hit / total if total else None}
    return classes


def _healthy(measures: Sequence[CaseMeasures]) -> dict[str, Any]:
    """False alarms in scans without lesions."""
    if not measures:
        return {"scans": 0}
    false = [m.false_findings for m in measures]
    return {
        "scans": len(measures),
        "false_findings_per_scan": float(np.mean(false)),
        "scans_with_findings": float(np.mean(np.array(false) > 0)),
        "marked_share_of_brain": float(np.mean([m.marked_share for m in measures])),
    }

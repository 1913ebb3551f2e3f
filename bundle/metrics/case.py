"""One method on one scan: everything that is measured there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance

from .auprc import average_precision
from .curves import ScoreCurve
from .lesions import match_lesions

# of each case, with lesions; in this order in every table
CASE_METRICS = (
    "auprc",
    "auroc",
    "dice",
    "dice_tuned",
    "dice_best",
    "sensitivity",
    "precision",
    "volumetric_similarity",
    "hausdorff95_mm",
    "lesion_recall",
    "false_findings",
)


@dataclass(frozen=True)
class CaseMeasures:
    """What one method did on one scan.

    Attributes:
        values: name -> figure, NaN where it is not defined; see docs/evaluation.md. ``dice_tuned`` comes later, when
            the threshold is known.
        curve: counts per score.
        lesion_ml: volume of each lesion, ml of the scan itself.
        lesion_found: whether it was found, bool.
        false_findings: number of findings that touch no lesion.
        marked_share: of the brain's voxels, those in the mask.
    """

    values: dict[str, float]
    curve: ScoreCurve
    lesion_ml: np.ndarray
    lesion_found: np.ndarray
    false_findings: int
    marked_share: float


def measure_case(
    heatmap: np.ndarray,
    found: np.ndarray,
    label: np.ndarray,
    brain: np.ndarray,
    spacing: Sequence[float],
    voxel_ml: float | None = None,
) -> CaseMeasures:
    """Measure a heatmap and its lesion mask against the truth.

    What counts are the brain's voxels, and the lesion voxels outside it: they are missed, and rank last. Voxels
    labelled below 0 are left out. Without a lesion, whatever compares with one is NaN, and what is found is false.
    Sensitivity, precision and volumetric similarity as in Taha & Hanbury 2015 (doi:10.1186/s12880-015-0068-x).

    Args:
        heatmap, found, label, brain: ``[X, Y, Z]``: scores (outside the brain the lowest), mask, truth, mask.
        spacing: of the voxels, mm.
        voxel_ml: what a voxel holds of the scan itself, where that is not what its edges say, as on the atlas.
    """
    lesion = label > 0
    keep = (brain | lesion) & (label >= 0)
    found = found & brain & keep
    scores = np.where(brain, heatmap, heatmap[brain].min() if brain.any() else 0.0)[keep]
    curve = ScoreCurve.of(scores, lesion[keep])
    true, positive, marked = int((found & lesion).sum()), int(lesion.sum()), int(found.sum())
    sizes, hit, false = match_lesions(found, lesion)
    values = dict.fromkeys(CASE_METRICS, math.nan) | {"false_findings": float(false)}
    if positive:
        dice = 2 * true / (positive + marked)
        values |= {
            "auprc": average_precision(torch.as_tensor(scores), torch.as_tensor(lesion[keep])),
            "auroc": curve.auroc(),
            "dice": dice,
            "dice_best": max(dice, curve.best_dice()),
            "sensitivity": true / positive,
            "precision": true / marked if marked else math.nan,
            "volumetric_similarity": 1 - abs(marked - positive) / (marked + positive),
            "lesion_recall": float(hit.mean()),
        }
        if marked:
            pred, truth = (torch.as_tensor(m)[None, None] for m in (found, lesion))
            distance = compute_hausdorff_distance(pred, truth, True, percentile=95, spacing=list(spacing))
            values["hausdorff95_mm"] = float(distance)
    voxel_ml = float(np.prod(spacing)) / 1000 if voxel_ml is None else voxel_ml
    return CaseMeasures(values, curve, sizes * voxel_ml, hit, false, marked / max(int((brain & keep).sum()), 1))

"""What a viewer shows of a scan: a label map, and a few figures beside it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from skimage.measure import label as connected
from skimage.measure import regionprops

from bundle.data.own_volume import own_voxel_mm3, scan_to_atlas
from bundle.errors import InputError
from bundle.scoring import FindLesionsd
from bundle.transforms import NOT_EXAMINED

LABELS = {"background": 0, "mild": 1, "moderate": 2, "strong": 3, "lesion": 4, "not_examined": 5}
LABEL_MAPS = ("graded", "lesion", "heatmap")


def chosen(options: Any) -> Any:
    """What a user chose from the options that MONAI Label displays: the first of a list, if nothing was chosen."""
    return options[0] if isinstance(options, list) else options


def describe_findings(
    heatmap: MetaTensor,
    lesion: MetaTensor,
    brain_mask: torch.Tensor,
    to_atlas: Any = None,
    aligned: np.ndarray | None = None,
) -> dict[str, Any]:
    """A scan in figures, all plain numbers: ``max_score`` and ``mean_score`` of its brain, ``lesion_volume_ml``, and
    ``lesions`` (26 neighbours), the strongest first, with ``volume_ml``, ``max_score``, and where they are (mm, RAS):
    ``center_mm``, ``peak_mm`` (of the highest score) and ``center_atlas_mm`` (the centre, in the atlas).

    Args:
        heatmap, lesion, brain_mask: ``[1, X, Y, Z]`` on one grid.
        to_atlas: of the scan's item, if it has one, see `own_voxel_mm3`: volumes are the scan's own.
        aligned: 4x4 matrix from the heatmap's world to the atlas (RAS mm); None if it lies there.
    """
    scores, found = heatmap[0].numpy(), lesion[0].numpy() > 0
    inside = scores[np.asarray(brain_mask[0]) > 0]
    affine = np.asarray(heatmap.affine)
    to_place = affine if aligned is None else aligned @ affine
    ml = own_voxel_mm3(heatmap, to_atlas) / 1000
    lesions = [
        {
            "volume_ml": float(region.area * ml),
            "max_score": float(region.intensity_max),
            "center_mm": _place(affine, region.centroid),
            "peak_mm": _place(affine, region.coords[np.argmax(scores[tuple(region.coords.T)])]),
            "center_atlas_mm": _place(to_place, region.centroid),
        }
        for region in regionprops(connected(found, connectivity=3), intensity_image=scores)
    ]
    return {
        "max_score": float(inside.max()),
        "mean_score": float(inside.mean()),
        "lesion_volume_ml": float(found.sum() * ml),
        "lesions": sorted(lesions, key=lambda found: -found["max_score"]),
    }


def _place(affine: np.ndarray, voxel: Any) -> list[float]:
    return [round(float(v), 1) for v in (affine @ [*voxel, 1.0])[:3]]


class LabelMapd(MapTransform):
    """Add what MONAI Label sends to a viewer, under the names it looks for: ``pred``, a label map on the scan's grid,
    and ``result``, figures (see `describe_findings`, the ``threshold``, the ``contrast``, ``not_examined_percent`` of
    the brain, and ``flags`` where there are doubts).

    Args:
        keys: the heatmap ``[1, X, Y, Z]`` on the scan's own grid (one key).
        find_lesions: what made the lesion mask; tells the thresholds.
        label_map: "graded" (1 mild, 2 moderate, 3 strong, which is the lesion mask), "lesion" (4), both with what of
            the brain was not looked at (5), or "heatmap" (the scores themselves, float).
        grades: shares of healthy voxels below which a voxel is not yet mild, or moderate. Regions that are too small
            for a lesion are too small for these as well.
        lesion_key, mask_key, coverage_key: lesion, brain and coverage mask (see `MarkCoveraged`; may be missing) on the
            same grid.

    Raises:
        InputError: an unknown ``label_map``; grades that the calibration does not hold.
    """

    def __init__(
        self,
        keys: KeysCollection,
        find_lesions: FindLesionsd,
        label_map: str = "graded",
        grades: Sequence[float] = (0.995, 0.998),
        lesion_key: str = "lesion",
        mask_key: str = "brain_mask",
        coverage_key: str = "coverage",
    ) -> None:
        super().__init__(keys)
        if label_map not in LABEL_MAPS:
            raise InputError(f"label_map '{label_map}' is unknown: use one of {', '.join(LABEL_MAPS)}")
        self.find_lesions, self.label_map, self.grades = find_lesions, label_map, grades
        self.lesion_key, self.mask_key, self.coverage_key = lesion_key, mask_key, coverage_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        contrast = d.get("contrast")
        heatmap, lesion = d[self.keys[0]].cpu(), d[self.lesion_key].cpu()
        aligned = scan_to_atlas(d["image"]) if "image" in d else None
        result = describe_findings(heatmap, lesion, d[self.mask_key].cpu(), d.get("to_atlas"), aligned)
        d["result"] = {
            **result,
            "score": self.find_lesions.score,
            "threshold": self.find_lesions.threshold(contrast=contrast),
        }
        if contrast:
            d["result"]["contrast"] = contrast
        d["result"]["not_examined_percent"] = 100 * float(d.get("not_examined", 0.0))
        if d.get("flags"):
            d["result"]["flags"] = d["flags"]
        if self.label_map == "heatmap":
            d["pred"] = heatmap.clone()
            return d
        marked = torch.zeros(heatmap.shape, dtype=torch.uint8)
        if self.coverage_key in d:
            marked[d[self.coverage_key].as_tensor().cpu() == NOT_EXAMINED] = LABELS["not_examined"]
        if self.label_map == "graded":
            for value, threshold in zip((LABELS["mild"], LABELS["moderate"]), self._grades(contrast)):
                marked[self.find_lesions.cut(heatmap, threshold, d.get("to_atlas")).as_tensor() > 0] = value
        marked[lesion.as_tensor() > 0] = LABELS["strong" if self.label_map == "graded" else "lesion"]
        d["pred"] = MetaTensor(marked).copy_meta_from(heatmap)
        return d

    def _grades(self, contrast: str | None) -> list[float]:
        """Thresholds of the grades; none where the calibration holds none of this score, and one was given."""
        calibration, score = self.find_lesions.calibration.load(contrast), self.find_lesions.score
        if self.find_lesions.fixed_threshold is not None and score not in calibration.quantiles:
            return []
        return [calibration.threshold(score, grade) for grade in self.grades]

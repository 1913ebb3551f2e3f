"""Which contrast a scan is of, told from the scan."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from scipy.stats import spearmanr

from bundle.data.dicom import named_contrast, names_agent
from bundle.data.files import AUTO, calibrated_contrasts, require_contrast
from bundle.data.formats import stem
from bundle.errors import InputError, flag

from .normative import load_normative, normative_file

_LEAST_SHARE = 0.1  # of healthy people that have brain at a place, as for `NormativeMap.match`
# correlation below which a scan is like none; and a lead below which a name that says otherwise is believed
_LEAST_LIKENESS, _CLEAR_LEAD = 0.2, 0.05


def contrast_likeness(image: torch.Tensor, ckpt_dir: str | Path, contrasts: list[str]) -> dict[str, float]:
    """How a scan's brightness goes with that of healthy people at the same places: Spearman's correlation with each
    contrast's normative mean, which neither scaling nor a curve of the brightness changes.

    Args:
        image: ``[1, H, W, D]`` on the atlas grid, without shading; 0 outside the brain.
        ckpt_dir: folder of the normative maps.
        contrasts: to compare with.

    Raises:
        InputError: a normative map is missing or damaged.
    """
    likeness = {}
    values = torch.as_tensor(image).cpu()
    for contrast in contrasts:
        mean, _, share = load_normative(normative_file(ckpt_dir, contrast)).on(values.shape[1:])
        known = (values > 0) & (share >= _LEAST_SHARE)
        thin = max(1, int(known.sum()) // 50_000)
        pairs = values[known][::thin].numpy(), mean[known][::thin].numpy()
        likeness[contrast] = (
            float(spearmanr(*pairs).statistic) if min(len(set(p[:1000].tolist())) for p in pairs) > 1 else 0.0
        )
    return likeness


class TellContrastd(MapTransform):
    """Write into each item, and into the ``meta`` of its scan, which ``contrast`` it is of: the one that is given, else
    the one that its list names, else the one whose healthy people it goes with best (`contrast_likeness`).

    What a file's name or a DICOM series' description says decides only between two that fit about as well; where it
    says otherwise than the scan, the scan counts, and is flagged. Flagged, too, is a scan that goes with none, and one
    whose name or header tells of a contrast agent.

    Args:
        keys: the scan ``[1, H, W, D]`` on the atlas grid (one key), without shading.
        contrast: "t1", "t2" or "flair"; "auto" tells it from the scan.
        ckpt_dir: folder of the models; contrasts that it has no calibration of cannot be told.
        mask_key: brain mask on the same grid.

    Raises:
        InputError: an unknown contrast, or one named by the list that there is no model of.
    """

    def __init__(self, keys: KeysCollection, contrast: str, ckpt_dir: str | Path, mask_key: str = "brain_mask") -> None:
        super().__init__(keys)
        require_contrast(contrast)
        self.contrast, self.ckpt_dir, self.mask_key = contrast, ckpt_dir, mask_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        image = d[self.keys[0]]
        contrast = self.contrast
        if contrast == AUTO:
            known = calibrated_contrasts(self.ckpt_dir)
            contrast = d.get("contrast", AUTO)
            if contrast == AUTO:
                d, contrast = self._tell(d, known)
            elif contrast not in known:
                name = image.meta.get("filename_or_obj", self.keys[0])
                raise InputError(f"{name}: is {contrast} by its list, and {self.ckpt_dir} has {', '.join(known)} only")
        if image.meta.get("contrast_agent") or names_agent(stem(str(image.meta.get("filename_or_obj", "")))):
            d = flag(d, "its name or header tells of a contrast agent; the models know scans without")
        d["contrast"] = contrast
        d[self.keys[0]] = image.clone()
        d[self.keys[0]].meta["contrast"] = contrast
        return d

    def _tell(self, d: dict[Hashable, Any], known: list[str]) -> tuple[dict[Hashable, Any], str]:
        image = d[self.keys[0]]
        if len(known) == 1:
            return d, known[0]
        inside = image.as_tensor() * (d[self.mask_key].as_tensor() > 0)
        likeness = contrast_likeness(inside, self.ckpt_dir, known)
        best = max(known, key=lambda contrast: likeness[contrast])
        named = image.meta.get("named_contrast") or named_contrast(stem(str(image.meta.get("filename_or_obj", ""))))
        if named in likeness and named != best:
            if likeness[best] - likeness[named] < _CLEAR_LEAD:
                best = named
            else:
                d = flag(d, f"its name says {named}, its tissues {best}, and it was taken for that")
        if likeness[best] < _LEAST_LIKENESS:
            told = ", ".join(f"{contrast} {value:.2f}" for contrast, value in likeness.items())
            d = flag(d, f"is like none of the contrasts (correlation: {told}), and was taken for {best}")
        return d, best

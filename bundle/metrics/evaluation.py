"""The methods that an evaluation compares, on the atlas grid or in the scan's own space."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, MaskIntensityd, ResampleToMatch
from monai.utils import ensure_tuple

from bundle.data.own_volume import own_voxel_mm3
from bundle.errors import InputError
from bundle.scoring import INTENSITY_SCORES, CalibrationFile, FindLesionsd, score_of
from bundle.scoring.operating import require_point
from bundle.scoring.paper import MASKED
from bundle.scoring.scores import OWN_MAPS
from bundle.transforms import FillOutsided, IgnoreLabelsd, KeepVolumed, LoadScand

from .case import CaseMeasures, measure_case

# what every table shows beside the method: anything else may be worse than doing nothing
BASELINES = (*INTENSITY_SCORES, "all_positive")
SPACES = ("atlas", "native")


class CompareMethodsd(MapTransform):
    """Add ``heatmap_NAME`` and ``lesion_NAME`` of every method that the score is compared with.

    These are the location score, the parts of a fusion and the asymmetry, other maps that are calibrated and there, and
    `BASELINES`: ``intensity`` (dark is abnormal on T1w, bright on T2w and FLAIR), ``intensity_opposite`` (its other
    tail), ``atlas_z`` (unusually dark or bright for its place), ``all_positive`` (the whole brain, whose AUPRC is the
    lesions' share of it). Each is cut by the same rule on healthy scans and cleaned of small findings, as the score is.

    Args:
        keys: anomaly channels ``[2, H, W, D]`` (one key).
        find_lesions: cuts the score's heatmap.
        calibration: of the model and contrast.
        image_key: the normalised image.
        points: operating points that the score is cut at, too: each a method ``SCORE_POINT`` with the score's heatmap.
    """

    def __init__(
        self,
        keys: KeysCollection,
        find_lesions: FindLesionsd,
        calibration: CalibrationFile,
        image_key: str = "image",
        points: str | Sequence[str] = (),
    ) -> None:
        super().__init__(keys)
        self.points = [require_point(point) for point in ensure_tuple(points)]
        self.find_lesions, self.calibration, self.image_key = find_lesions, calibration, image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        calibration, score = self.calibration.load(), self.find_lesions.score
        for point in self.points:
            lesion = self.find_lesions.cut(d["heatmap"], calibration.point(score, point), d.get("to_atlas"))
            d |= {f"heatmap_{score}_{point}": d["heatmap"], f"lesion_{score}_{point}": lesion}
        parts = [*calibration.fusion.weights, "asymmetry"] if score == "fusion" and calibration.fusion else []
        if calibration.needed_maps("location") <= {*OWN_MAPS, *map(str, d)}:
            parts.insert(0, "location")
        brought = [name for name in calibration.extra_maps if name in d]
        for name in dict.fromkeys([*parts, *brought, *BASELINES]):
            if name == score:
                continue
            if name == "all_positive":
                brain = MetaTensor((d[self.image_key].as_tensor().cpu() > 0).float()).copy_meta_from(d[self.image_key])
                d[f"heatmap_{name}"] = d[f"lesion_{name}"] = brain
            else:
                d[f"heatmap_{name}"] = score_of(name, calibration, d, self.keys[0], self.image_key)
                cut = self.find_lesions.threshold(name)
                d[f"lesion_{name}"] = self.find_lesions.cut(d[f"heatmap_{name}"], cut, d.get("to_atlas"))
        return d


def method_keys(data: Mapping[Hashable, Any], score: str) -> dict[str, tuple[str, str]]:
    """Method -> keys of its heatmap and its lesion mask, the score's own first."""
    others = [str(key).removeprefix("heatmap_") for key in data if str(key).startswith("heatmap_")]
    return {score: ("heatmap", "lesion"), **{n: (f"heatmap_{n}", f"lesion_{n}") for n in others}}


class ToSpaced(MapTransform):
    """Bring heatmaps, masks and the image from the atlas grid to where the metrics are taken.

    "atlas": they stay. "native": to the voxels of the scan's own label (of the scan itself where there is none), which
    is loaded anew and replaces ``label``. That scan is the one that a prepared item was made from (its ``source``, by
    the inverse of ``to_atlas``), or, prepared elsewhere, the item's own file.

    Args:
        keys: any heatmap (one key); all others of `method_keys` come along.
        space: one of `SPACES`.
        min_lesion_mm3: see `bundle.transforms.KeepVolumed`; as in inference, whose masks are judged.

    Raises:
        InputError: another space, or a source that is not there any more.
    """

    def __init__(self, keys: KeysCollection, space: str, min_lesion_mm3: float = 0.0) -> None:
        super().__init__(keys)
        if space not in SPACES:
            raise InputError(f"space '{space}' is unknown: use one of {', '.join(SPACES)}")
        self.space, self.min_lesion_mm3, self.load = space, min_lesion_mm3, LoadScand("scan")
        self.resample = ResampleToMatch(mode="bilinear", padding_mode="zeros")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = {key: value for key, value in data.items() if value is not None}  # MONAI's engine gives label None if none
        if self.space == "atlas":
            return d
        of = "label" if "label" in d else "image"
        file = d["source"][of] if "source" in d else d[of].meta["filename_or_obj"]
        if not Path(file).exists():
            raise InputError(f"{file}: the scan as it was is gone; evaluate with --space atlas or prepare it again")
        target = self.load({"scan": file})["scan"]
        to_atlas = np.asarray(d.get("to_atlas", np.eye(4)) if "source" in d else np.eye(4), float)
        methods = method_keys(d, "score").values()
        heatmaps, lesions = ([keys[i] for keys in methods] for i in (0, 1))
        d["brain"] = MetaTensor((d["image"].as_tensor().cpu() > 0).float()).copy_meta_from(d["image"])
        d |= MaskIntensityd(heatmaps, mask_key="brain")(d)
        for key in ("image", "brain", *heatmaps, *lesions):
            affine = np.linalg.inv(to_atlas) @ d[key].affine.numpy()
            d[key] = self.resample(MetaTensor(d[key].as_tensor().cpu().float(), affine=affine), img_dst=target)
        d = KeepVolumed(lesions, self.min_lesion_mm3)(FillOutsided(heatmaps, "brain")(d))
        d["image"] = d["image"].clamp(min=1e-3) * d["brain"]
        if "source" in d:
            d |= {"to_atlas": np.eye(4), "native_to_atlas": to_atlas}  # undone; still tells where a finding lies
        return IgnoreLabelsd("label")({**d, "label": target}) if of == "label" else d


def measure_methods(data: Mapping[Hashable, Any], score: str) -> dict[str, CaseMeasures]:
    """All methods of one scan measured; its brain is where ``image`` is above 0, no ``label`` means no lesion. Volumes
    are the scan's own, by its item's ``to_atlas`` (see `own_voxel_mm3`). The paper's masked score is judged on all of
    the grid's voxels.
    """
    image = data["image"]
    brain = image.as_tensor().cpu().numpy()[0] > 0
    label = data["label"].as_tensor().cpu().numpy()[0] if "label" in data else np.zeros(brain.shape)
    spacing = np.linalg.norm(np.asarray(image.affine)[:3, :3], axis=0).tolist()
    voxel_ml = own_voxel_mm3(image, data.get("to_atlas")) / 1000
    volumes = {
        key: data[key].as_tensor().cpu().numpy()[0] for keys in method_keys(data, score).values() for key in keys
    }
    everywhere = np.ones_like(brain)
    return {
        name: measure_case(
            volumes[heatmap], volumes[lesion] > 0, label, everywhere if name == MASKED else brain, spacing, voxel_ml
        )
        for name, (heatmap, lesion) in method_keys(data, score).items()
    }

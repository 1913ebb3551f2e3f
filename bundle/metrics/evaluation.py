"""The methods that an evaluation compares, and the metrics it takes of each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from ignite.metrics import Metric
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.handlers import IgniteMetricHandler
from monai.metrics import DiceMetric
from monai.transforms import MapTransform

from bundle.errors import InputError
from bundle.parallel import gather
from bundle.scoring import INTENSITY_SCORES, CalibrationFile

from .auprc import AUPRCMetric

# what every table shows beside the method: anything else may be worse than doing nothing
BASELINES = (*INTENSITY_SCORES, "all_positive")


class BaselineMapsd(MapTransform):
    """Add ``heatmap_NAME`` and ``lesion_NAME`` of each of `BASELINES`.

    ``intensity``: bright (T2w, FLAIR) or dark (T1w) is abnormal; ``atlas_z``: unusually bright or dark for its place;
    ``all_positive``: the whole brain is lesion, whose AUPRC is the lesions' share of the brain. The first two are cut
    at the same quantile of healthy scans as the method, without further clean-up.

    Args:
        keys: anomaly channels ``[2, H, W, D]`` (one key).
        calibration: of the model and contrast.
        quantile: of healthy scores, the threshold.
        image_key: the normalised image.
    """

    def __init__(
        self, keys: KeysCollection, calibration: CalibrationFile, quantile: float, image_key: str = "image"
    ) -> None:
        super().__init__(keys)
        self.calibration, self.quantile, self.image_key = calibration, quantile, image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        channels, image = (d[k].as_tensor().cpu().float() for k in (self.keys[0], self.image_key))
        calibration = self.calibration.load()
        for name in BASELINES:
            if name == "all_positive":
                heatmap = (image > 0).float()
                threshold = 0.5
            else:
                heatmap = calibration.score(name, channels, image)
                threshold = calibration.threshold(name, self.quantile)
            d[f"heatmap_{name}"] = MetaTensor(heatmap).copy_meta_from(d[self.image_key])
            d[f"lesion_{name}"] = MetaTensor((heatmap > threshold).float()).copy_meta_from(d[self.image_key])
        return d


class CaseMetricHandler(IgniteMetricHandler):
    """MONAI's metric handler for cases of which all may have failed: NaN then, instead of an error."""

    def compute(self) -> Any:
        empty = gather([self.metric_fn._buffers is None])
        if all(empty):
            return float("nan")
        if any(empty):  # MONAI's metrics would wait for that process for ever
            raise InputError(f"{sum(empty)} of {len(empty)} processes had no scan to measure; start fewer")
        return super().compute()


def inside_brain(key: str) -> Callable[[Sequence[Mapping[str, Any]]], tuple[list, list]]:
    """Output transform for a metric: ``key`` and the label at the brain voxels of each case, ``[1, N]`` each.

    Brain is where the image is above 0. Lesion voxels outside it, but on the grid, are kept, with whatever low value
    ``key`` has there: they count as missed, not as if they did not exist. Labels below 0 are ignored; failed scans are
    left out.
    """

    def extract(output: Sequence[Mapping[str, Any]]) -> tuple[list, list]:
        y_pred, y = [], []
        for case in output:
            if "failure" in case:
                continue
            truth = case["label"].as_tensor().cpu()
            label = truth > 0
            keep = ((case["image"].as_tensor().cpu() > 0) | label) & (truth >= 0)
            y_pred.append(case[key].as_tensor().cpu()[keep][None])
            y.append(label[keep][None].float())
        return y_pred, y

    return extract


def comparison_metrics() -> dict[str, Metric]:
    """AUPRC (per case and pooled) and Dice of the method and of each baseline, for an evaluator's metrics.

    Named ``auprc``, ``auprc_pooled``, ``dice``, and the same with ``_NAME`` for a baseline.
    """
    metrics: dict[str, Any] = {}
    for suffix in ("", *(f"_{name}" for name in BASELINES)):
        heatmap, lesion = inside_brain(f"heatmap{suffix}"), inside_brain(f"lesion{suffix}")
        metrics[f"auprc{suffix}"] = CaseMetricHandler(AUPRCMetric(), output_transform=heatmap)
        metrics[f"auprc_pooled{suffix}"] = CaseMetricHandler(AUPRCMetric(pooled=True), output_transform=heatmap)
        metrics[f"dice{suffix}"] = CaseMetricHandler(DiceMetric(), output_transform=lesion)
    return metrics

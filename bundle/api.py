"""The bundle from Python, without files: an array and its affine in, heatmap, lesion mask and figures out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor

from bundle.errors import InputError, find_input_error

_ROOT = Path(__file__).resolve().parents[1]


class Findings(NamedTuple):
    """What was found in a scan.

    Attributes:
        heatmap: float32 ``[X, Y, Z]`` on the scan's voxels, z-score against healthy brains.
        lesion: uint8 ``[X, Y, Z]``, 1 is lesion.
        summary: as `bundle.reports.viewer.describe_findings` makes it, with ``threshold``, ``contrast`` and
            ``not_examined_percent``.
        coverage: uint8 ``[X, Y, Z]``, 0 not brain, 1 brain that was looked at, 2 brain that was not.
    """

    heatmap: np.ndarray
    lesion: np.ndarray
    summary: dict[str, Any]
    coverage: np.ndarray


@contextmanager
def _plainly() -> Iterator[None]:
    """Raise the `InputError` that MONAI has wrapped into others."""
    try:
        yield
    except Exception as error:
        known = find_input_error(error)
        if known is None or known is error:
            raise
        raise known from error


class LesionFinder:
    """The inference of ``configs/inference.json``, for arrays.

    Args:
        contrast: "t1", "t2" or "flair"; "auto" tells it from each scan.
        root: of the bundle; the folder that holds this package unless given.
        overrides: keys of the config and their values, such as ``device="cpu"`` or ``score="location"``.

    Raises:
        InputError: a model or calibration that is missing or does not fit; an override of what the config has not.

    Example::

        from bundle.api import LesionFinder
        find = LesionFinder(contrast="flair")
        found = find(array, affine)  # a whole head or a stripped one, [X, Y, Z], affine to RAS mm
        found.heatmap, found.lesion, found.summary["lesion_volume_ml"]
    """

    def __init__(self, contrast: str = "auto", root: str | Path = _ROOT, **overrides: Any) -> None:
        config = ConfigParser()
        config.read_config(str(Path(root) / "configs/inference.json"))
        for name in overrides:
            if name.split("#")[0] not in config.get():
                raise InputError(f"{name}: nothing of that name in configs/inference.json")
        config.update({"bundle_root": str(root), "contrast": contrast, **overrides})
        parts = ("device", "preprocessing", "network", "inferer", "postprocessing", "calibration")
        with _plainly():
            parsed = [config.get_parsed_content(name) for name in parts]
            self.device, self.preprocessing, self.network, self.inferer, self.postprocessing, calibration = parsed
            calibration.each()
        self.network.eval()

    def __call__(self, image: np.ndarray | torch.Tensor, affine: np.ndarray) -> Findings:
        """Find lesions in one scan.

        Args:
            image: ``[X, Y, Z]``.
            affine: voxels to RAS mm, ``[4, 4]``.

        Raises:
            InputError: a scan that cannot be used, such as one without a brain.
        """
        with _plainly():
            if isinstance(image, np.ndarray):
                if image.dtype.kind not in "biuf":
                    raise InputError(f"an array of {image.dtype}: a scan has one grey value per voxel")
                image = np.ascontiguousarray(image, np.float32)  # any order of bytes: FreeSurfer's files have the other
            scan = MetaTensor(torch.as_tensor(image), affine=torch.as_tensor(affine, dtype=torch.float64))
            data = self.preprocessing({"image": scan})
            data["pred"] = self.inferer(data["image"][None].to(self.device), self.network)[0]
            data = self.postprocessing(data)
        heatmap, lesion, coverage = (data[key][0].numpy() for key in ("heatmap", "lesion", "coverage"))
        return Findings(heatmap.astype(np.float32), lesion.astype(np.uint8), data["result"], coverage.astype(np.uint8))

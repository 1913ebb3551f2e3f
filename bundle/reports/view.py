"""A scan on its own voxels, with what was found in it: what pictures and pages are made of."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from monai.transforms import ResampleToMatch

from bundle.transforms import LoadScand


@dataclass(frozen=True)
class View:
    """Volumes ``[X, Y, Z]`` of a scan, on one grid whose axes run to the right, front and top as nearly as the voxels
    do: they are turned by whole axes, never resampled.

    Attributes:
        image, heatmap: scan and scores, float32.
        brain, found: masks.
        truth: mask of the true lesions, if known.
        affine: 4x4, voxel to RAS mm of the scan's world.
    """

    image: np.ndarray
    heatmap: np.ndarray
    brain: np.ndarray
    found: np.ndarray
    truth: np.ndarray | None
    affine: np.ndarray

    @classmethod
    def of(cls, image: MetaTensor, heatmap: Any, brain: Any, found: Any, truth: Any = None) -> View:
        """From ``[1, X, Y, Z]`` volumes on the grid of ``image``; masks are where a volume is above 0."""
        affine = np.asarray(image.affine, float)

        def turned(volume: Any) -> Any:
            array = np.asarray(volume[0].cpu(), np.float32)
            return nib.as_closest_canonical(nib.Nifti1Image(array, affine))

        straight = turned(image)
        scan = np.nan_to_num(straight.get_fdata(dtype=np.float32), posinf=0.0, neginf=0.0)

        def mask(volume: Any) -> Any:
            return None if volume is None else turned(volume).get_fdata(dtype=np.float32) > 0

        scores = turned(heatmap).get_fdata(dtype=np.float32)
        return cls(scan, scores, mask(brain), mask(found), mask(truth), straight.affine)

    @classmethod
    def of_result(cls, output: Mapping[str, Any]) -> View:
        """From what inference has of a scan: ``heatmap``, ``lesion`` and ``coverage`` on the scan's grid, and ``image``
        and (optional) ``label``, whose files are read again.

        Args:
            output: of the evaluator, for one scan; its ``contrast`` tells of several DICOM series in a folder which.
        """
        files: dict[Hashable, Any] = {
            key: output[key].meta["filename_or_obj"] for key in ("image", "label") if output.get(key) is not None
        }
        # what a series is called has chosen it, not what was told from it
        contrast = output["image"].meta.get("named_contrast") or output.get("contrast")
        scan = LoadScand(list(files), contrast=contrast)(files)
        label = scan.get("label")
        if label is not None and (
            label.shape != scan["image"].shape or not np.allclose(label.affine, scan["image"].affine)
        ):
            label = ResampleToMatch(mode="nearest", padding_mode="zeros")(label, img_dst=scan["image"])
        return cls.of(scan["image"], output["heatmap"], output["coverage"], output["lesion"], label)

    @property
    def spacing(self) -> np.ndarray:
        """Edges of a voxel along its axes, mm."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def grey_range(self) -> tuple[float, float]:
        """Brightness of black and white: what is in the brain, and a little beyond."""
        inside = self.image[self.brain] if self.brain.any() else self.image
        low, high = (float(v) for v in np.percentile(inside, (0.5, 99.8)))
        low = min(low, max(0.0, float(np.min(self.image))))
        return low, max(high + 0.1 * (high - low), low + 1e-3)

    def voxel(self, place_mm: Any) -> tuple[int, int, int]:
        """Voxel at a place (RAS mm of the scan's world), the nearest inside the volume."""
        index = np.linalg.solve(self.affine, [*place_mm, 1.0])[:3].round().astype(int)
        x, y, z = np.clip(index, 0, np.array(self.image.shape) - 1)
        return int(x), int(y), int(z)


def describe_place(place_mm: Any) -> str:
    """A place of the atlas (RAS mm) in words: "32 left, 12 back, 20 up", whole mm."""
    names = (("right", "left"), ("front", "back"), ("up", "down"))
    return ", ".join(f"{abs(v):.0f} {names[axis][int(v < 0)]}" for axis, v in enumerate(np.round(place_mm)))

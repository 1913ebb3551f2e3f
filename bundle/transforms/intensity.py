"""Intensity: every brain on one scale, and 0 kept for what is not brain."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable

from bundle.data.atlas import from_sitk, to_sitk
from bundle.data.files import model_file, of_contrast, read_json, write_json
from bundle.errors import InputError

from .normative import load_normative

PERCENTILES = (1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 99)

# The lowest value of a brain voxel. 0 is kept for the outside, so that a volume carries its own brain mask
# through the inferer (whose signature has no room for a second volume).
LOWEST_BRAIN_INTENSITY = 1e-3
# Where the lower percentile goes: what is darker, a lesion say, keeps its order above the lowest value.
DARKEST_TISSUE = 0.1


class NormalizeBrainIntensityd(MapTransform):
    """Bring every brain to one scale, linearly, and everything outside the brain to 0.

    Two percentiles of the brain are mapped to 0.1 and 1. Where the normative map of a model is there, what looks
    healthy in the scan is then matched to it (`NormativeMap.match`), since percentiles follow a large lesion.

    Brain voxels are clipped to [0.001, ``highest``]: never 0, and so far beyond healthy tissue that lesions keep their
    order. Doing it twice changes nothing that matters, so prepared data may go through it again.

    With landmarks (see `learn_landmarks`) the percentiles between the two are brought to the cohort's instead, linearly
    in between and straight on above: Nyul & Udupa's histogram standardisation (2000, doi:10.1109/42.836373).

    Args:
        keys: volumes ``[1, X, Y, Z]``.
        mask_key: brain mask on the same grid.
        lower, upper: percentiles.
        highest: upper clip.
        landmarks: JSON file of the landmarks; used if it is there, so that a model that was trained with landmarks
            (they lie beside it) never runs without them.
        normative: JSON file of the normative map, see `load_normative`; None: percentiles alone. Both files may be of
            the contrast "auto": then they are those of the item's ``contrast``.

    Raises:
        InputError: the brain holds no two different intensities, or values that are not finite; no such normative map.
    """

    def __init__(
        self,
        keys: KeysCollection,
        mask_key: str = "brain_mask",
        lower: float = 1.0,
        upper: float = 99.0,
        highest: float = 4.0,
        landmarks: str | None = None,
        normative: str | None = None,
    ) -> None:
        super().__init__(keys)
        self.mask_key, self.lower, self.upper, self.highest = mask_key, lower, upper, highest
        self.landmarks, self.normative = landmarks, normative

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        landmarks, normative = (f and of_contrast(f, d.get("contrast")) for f in (self.landmarks, self.normative))
        # plain tensors: an operation on two MetaTensors would give the image the mask's history
        inside = d[self.mask_key].as_tensor() > 0
        for key in self.key_iterator(d):
            name = d[key].meta.get("filename_or_obj", key)
            image = d[key].as_tensor()
            values = image[inside].float().cpu().numpy()
            if values.size == 0:
                raise InputError(
                    f"{name}: no brain in the field of the atlas grid; check its orientation and alignment"
                )
            if not np.isfinite(values).all():
                raise InputError(f"{name}: {np.sum(~np.isfinite(values))} brain voxels are not finite; repair the scan")
            low, high = np.percentile(values, [self.lower, self.upper])
            if high - low <= 1e-6 * abs(high):
                raise InputError(f"{name}: the brain has one constant intensity ({low:g}); not an image")
            scaled = (image - low) / (high - low) * (1 - DARKEST_TISSUE) + DARKEST_TISSUE
            if landmarks and Path(landmarks).is_file():
                scaled = match_landmarks(scaled, scaled[inside], *read_landmarks(landmarks))
            elif normative:
                scaled = load_normative(normative).match(scaled, inside)
            scaled = scaled.clamp(LOWEST_BRAIN_INTENSITY, self.highest)
            d[key] = MetaTensor(torch.where(inside, scaled, 0.0)).copy_meta_from(d[key])
        return d


def match_landmarks(
    image: torch.Tensor, brain: torch.Tensor, percents: np.ndarray, standard: np.ndarray
) -> torch.Tensor:
    """Map the ``percents`` of the values ``brain`` to ``standard``, linearly in between; beyond the last one with the
    slope of the last piece, so that what is brighter than all healthy tissue stays so.
    """
    own = np.percentile(brain.float().cpu().numpy(), percents)
    own = np.maximum.accumulate(own + 1e-6 * np.arange(len(own)))  # np.interp wants them to rise
    slope = (standard[-1] - standard[-2]) / (own[-1] - own[-2])
    values = image.float().cpu().numpy()
    mapped = np.interp(values, own, standard) + slope * np.maximum(values - own[-1], 0)
    return torch.as_tensor(mapped, dtype=image.dtype, device=image.device)


def read_landmarks(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles and their standard intensities, from the file that `learn_landmarks` writes.

    Raises:
        InputError: not such a file.
    """
    content = read_json(path, "landmarks of the intensities")
    try:
        percents, standard = (np.asarray(content[k], float) for k in ("percentiles", "intensities"))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged landmarks ({error!r}); learn them again") from error
    if percents.shape != standard.shape or len(percents) < 2 or (np.diff(percents) <= 0).any():
        raise InputError(f"{path}: damaged landmarks; learn them again")
    return percents, standard


def learn_landmarks(
    dataset: Sequence[Mapping[str, torch.Tensor]],
    path: str,
    percents: Sequence[float] = PERCENTILES,
    keep: bool = False,
) -> None:
    """Average the percentiles of a cohort's brains, each scaled to 0.1 and 1 at the first and last, and write them.

    Args:
        dataset: its ``image`` is normalised by `NormalizeBrainIntensityd` without landmarks, 0 outside the brain.
        path: of the JSON file.
        percents: rising, in [0, 100].
        keep: a file that is there, as when a training goes on.

    Raises:
        InputError: no scans, or a model of the contrast beside ``path``, which would see other intensities than it was
            trained on.
    """
    if keep and Path(path).is_file():
        return
    if len(dataset) == 0:
        raise InputError("no scans to learn landmarks from: name a prepared dataset with --dataset_dir")
    model = Path(model_file(Path(path).parent, Path(path).stem.removeprefix("landmarks_")))
    if model.exists():
        raise InputError(f"{model}: was trained without these landmarks; choose another --ckpt_dir")
    found = []
    for volume in (dataset[i]["image"] for i in range(len(dataset))):
        own = np.percentile(volume[volume > 0].cpu().numpy(), percents)
        found.append((own - own[0]) / (own[-1] - own[0]))
    intensities = (np.mean(found, 0) * (1 - DARKEST_TISSUE) + DARKEST_TISSUE).round(5).tolist()
    write_json(path, {"percentiles": list(percents), "intensities": intensities, "subjects": len(found)})
    print(f"{path}: landmarks of {len(found)} scans")


class CurvatureFlowd(MapTransform):
    """Curvature-flow smoothing (ITK's), which the paper applies: evens out noise and keeps edges.

    Args:
        keys: volumes ``[1, X, Y, Z]``.
        iterations: 0 leaves the scan as it is. Items of a prepared dataset (``prepared``) are left too.
        time_step: of each iteration.
    """

    def __init__(self, keys: KeysCollection, iterations: int = 0, time_step: float = 0.125) -> None:
        super().__init__(keys)
        self.iterations, self.time_step = iterations, time_step

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if self.iterations and not d.get("prepared"):
            for key in self.key_iterator(d):
                smooth = sitk.CurvatureFlow(to_sitk(d[key]), self.time_step, self.iterations)
                d[key] = MetaTensor(from_sitk(smooth).as_tensor()).copy_meta_from(d[key])
        return d


class RandCoarseNoised(MapTransform, Randomizable):
    """Add smooth random blobs to the brain of a slice or volume: what a denoising autoencoder learns to take away, as
    it later does with lesions (Kascenas et al. 2022, "Denoising autoencoders for unsupervised anomaly detection in
    brain MRI").

    Normal noise on a coarse lattice, shifted at random and interpolated linearly.

    Args:
        keys: slices ``[1, H, W]`` or volumes ``[1, H, W, D]``, 0 outside the brain; brain voxels stay at least 0.001.
        std: of the noise on the lattice, intensities.
        cell: width of the lattice's cells, voxels; 1 for noise of the single voxel.
    """

    def __init__(self, keys: KeysCollection, std: float = 0.2, cell: int = 8) -> None:
        super().__init__(keys)
        self.std, self.cell = std, cell

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = d[key]
            size, mode = image.shape[1:], "bilinear" if image.ndim == 3 else "trilinear"
            lattice = torch.as_tensor(self.R.normal(0, self.std, [n // self.cell + 3 for n in size])).to(image)
            noise = F.interpolate(lattice[None, None], scale_factor=self.cell, mode=mode, align_corners=False)
            starts = self.R.randint(self.cell, 2 * self.cell, len(size))
            noise = noise[0]
            for axis, (start, n) in enumerate(zip(starts, size), start=1):
                noise = noise.narrow(axis, int(start), n)
            d[key] = torch.where(image > 0, (image + noise).clamp(min=0.001), image)
        return d

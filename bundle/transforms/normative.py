"""How bright healthy people are at every place, and what a scan's intensities are matched to."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from nibabel.filebasedimages import ImageFileError

from bundle.data.datalist import CHAIN
from bundle.data.files import claim_folder, numbered_folder, read_json, write_json
from bundle.data.population import coarse_affine, coarsen, coarsening, population_maps, read_maps, write_maps
from bundle.errors import InputError
from bundle.parallel import is_main

from .bias import neighbourhood_deviation

# version of `NormativeMap.match`: another one scales scans otherwise, so a calibration holds for one only
MATCHING = 3
# sign of the intensity change that most lesions show
LESION_SIGN = {"t1": -1.0, "t2": 1.0, "flair": 1.0}
# brightness between which a difference tells: fluid is darker on T1w, and brighter on T2w, than most lesions, so that
# beyond it z-scores follow how much fluid an old brain has (chosen on planted tuning scans, docs/results.md)
TELLING = {"t1": (0.35, 10.0), "t2": (0.0, 0.9)}
ALL = (0.0, math.inf)
# smoothing of mean and spread: more spreads cortex over white matter (docs/results.md)
MEAN_MM, SPREAD_MM = 1.0, 1.6
# voxels within so many spreads of what is expected at their place are taken for healthy
_INLIERS, _ROUNDS = 2.5, 7
# which of a scan's quantiles are taken for the ends of its healthy tissue at first: all, or all but a large lesion,
# bright or dark; the start that ends with the most inliers is kept
_STARTS = ((0.05, 0.95), (0.05, 0.7), (0.3, 0.95))
# a normal distribution in five equal parts
_NORMAL = np.array([-1.2816, -0.5244, 0.0, 0.5244, 1.2816])
# how often the match is made again without unusual neighbourhoods, their width and limit, on which lattice; a voxel
# counts so many spreads at most
_LOOKS, _AROUND_MM, _UNUSUAL, _LATTICE_MM, _FAR = 2, 8.0, 2.5, 4.0, 4.0
# of the subjects that must have brain at a place before it counts
_LEAST_SHARE = 0.1


def hold(image: torch.Tensor, telling: Sequence[float]) -> torch.Tensor:
    """Hold the brain's intensities to a range; 0 is outside the brain, and stays. Beyond the range they tell more of
    the person than of a lesion: how much fluid an old brain has, which is bright on T2w and dark on FLAIR, say.
    """
    return torch.where(image > 0, image.clamp(*telling), image)


def as_range(telling: Any, option: str) -> tuple[float, float]:
    """Lowest and highest intensity that are told apart, as ``option`` names them.

    Raises:
        InputError: that is no range.
    """
    try:
        lowest, highest = map(float, telling)
    except (TypeError, ValueError):
        lowest = highest = math.nan
    if not 0 <= lowest < highest:
        raise InputError(f"{option}: {telling} is no range; name its ends, as in [0.2,0.6]")
    return lowest, highest


@dataclass(frozen=True)
class NormativeMap:
    """Mean and spread of healthy intensities in atlas space.

    Attributes:
        mean, spread: ``[1, h, w, d]``, of intensities as `NormalizeBrainIntensityd` scales them by percentiles.
        share: of the subjects that have brain there, ``[1, h, w, d]``, in [0, 1].
        facts: contrast, number of subjects, grid, version of the chain; ``telling``: see `TELLING`.
        telling_mean, telling_spread: of intensities that are held to ``telling``; None: ``mean`` and ``spread``.
    """

    mean: torch.Tensor
    spread: torch.Tensor
    share: torch.Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)
    telling_mean: torch.Tensor | None = None
    telling_spread: torch.Tensor | None = None

    def on(self, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean, spread and share on a grid ``[H, W, D]`` of the same extent."""
        mean, spread, share = _on([self.mean, self.spread, self.share], shape)
        return mean, spread, share

    def z(self, image: torch.Tensor, contrast: str, telling: bool = False) -> torch.Tensor:
        """Healthy spreads by which each voxel of ``[1, H, W, D]`` lies to the lesions' side of its place's mean; 0
        outside the brain. With ``telling`` intensities are held to the range in which a difference tells (`TELLING`).
        """
        usual, inside = [self.mean, self.spread], image > 0
        if telling and self.telling_mean is not None and self.telling_spread is not None:
            usual, image = [self.telling_mean, self.telling_spread], image.clamp(*self.telling)
        mean, spread = (m.to(image) for m in _on(usual, image.shape[1:]))
        return LESION_SIGN[contrast] * (image - mean) / spread * inside

    @property
    def telling(self) -> tuple[float, float]:
        """The range of the intensities in which a difference tells; all where the contrast has none."""
        lowest, highest = self.facts.get("telling", ALL)
        return lowest, highest

    def match(self, image: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """Scale a scan linearly so that what looks healthy in it is as bright as in healthy people.

        What looks healthy are voxels within 2.5 spreads of the mean of their place; their mean and standard deviation
        (T1w: two quantiles) are brought to those that such voxels are expected to have, and both is repeated. Of a
        large, faint lesion many voxels look healthy each on its own; so the match is made again without the places
        whose neighbourhood, over 8 mm, lies more than 2.5 robust standard deviations to the lesions' side (a stricter
        limit leaves out the fluid that tells the scale). So a lesion counts for next to nothing, however large, where
        percentiles of the whole brain follow it.

        Args:
            image: ``[1, H, W, D]``, on the scale of the mean more or less (scaled by percentiles).
            inside: ``[1, H, W, D]`` bool.
        """
        grid, maps = self.facts["grid"], self.on(image.shape[1:])
        spacing = grid["spacing"] * grid["spatial_size"][0] / image.shape[1]
        # on a lattice of 4 mm: an eighth of the voxels tells two quantiles as well
        step = max(1, round(_LATTICE_MM / spacing))
        sparse = (0, *(slice(None, None, step),) * 3)
        known = (inside.cpu() & (maps[2] >= _LEAST_SHARE))[sparse].numpy()
        volume, mean, spread = (v.cpu()[sparse].double().numpy() for v in (image, *maps[:2]))
        if not known.any():
            return image
        values, expected, spreads = volume[known], mean[known], spread[known]
        contrast = self.facts["contrast"]
        scale, sign = _healthy_scale(values, expected, spreads, contrast), LESION_SIGN[contrast]
        if scale is None:  # nothing in it is like healthy people; CheckLikenessd tells
            return image
        for _ in range(_LOOKS):
            unexpected = ((scale[0] * volume + scale[1] - mean) / spread).clip(-_FAR, _FAR) * known
            deviation = neighbourhood_deviation(unexpected, known, _AROUND_MM / (step * spacing))[known]
            usual = sign * deviation <= _UNUSUAL
            scale = _healthy_scale(values[usual], expected[usual], spreads[usual], contrast) or scale
        return scale[0] * image + scale[1]


def _healthy_scale(
    values: np.ndarray, mean: np.ndarray, spread: np.ndarray, contrast: str
) -> tuple[float, float] | None:
    """Slope and offset that bring what looks healthy of a scan to what is expected there, from the one of `_STARTS`
    that ends with the most voxels that look healthy; None if from none of them a hundred do.
    """
    best, scale, ends = 0, None, np.quantile(mean, [0.05, 0.95])
    for window in _STARTS:
        slope, offset = _scale(np.quantile(values, window), ends)
        for _ in range(_ROUNDS):
            healthy = np.abs(slope * values + offset - mean) < _INLIERS * spread
            if healthy.sum() < 100:
                break
            slope, offset = _MATCHES[contrast](values[healthy], mean[healthy], spread[healthy])
        else:
            if healthy.sum() > best:
                best, scale = int(healthy.sum()), (slope, offset)
    return scale


def _by_moments(values: np.ndarray, mean: np.ndarray, spread: np.ndarray) -> tuple[float, float]:
    """Slope and offset that bring mean and standard deviation of voxels to what is expected of them.

    A voxel weighs by the inverse cube of its place's spread. Least squares would take the square, but where healthy
    people differ much, as in sulci, a lesion passes for healthy (docs/results.md).
    """
    weight = spread**-3.0
    own, likely = (np.average(v, weights=weight) for v in (values, mean))
    variance = np.average((values - own) ** 2, weights=weight)
    slope = np.sqrt(np.average((mean - likely) ** 2 + spread**2, weights=weight) / max(variance, 1e-12))
    return float(slope), float(likely - slope * own)


def _by_quantiles(values: np.ndarray, mean: np.ndarray, spread: np.ndarray) -> tuple[float, float]:
    """Slope and offset that bring the 15th and 85th percentile of voxels to what is expected of them."""
    expected = mean + spread * _NORMAL[:, None]
    return _scale(np.quantile(values, (0.15, 0.85)), np.quantile(expected, (0.15, 0.85)))


def _scale(own: np.ndarray, likely: np.ndarray) -> tuple[float, float]:
    """Slope and offset that bring two brightnesses of a scan to two others."""
    slope = float((likely[1] - likely[0]) / max(own[1] - own[0], 1e-6))
    return slope, float(likely[0] - slope * own[0])


# what was measured to be better (docs/results.md): quantiles move with a large lesion on T2w and FLAIR
_MATCHES = {"t1": _by_quantiles, "t2": _by_moments, "flair": _by_moments}


def _on(maps: Sequence[torch.Tensor], shape: Sequence[int]) -> Sequence[torch.Tensor]:
    """Maps ``[1, h, w, d]`` on a grid ``[H, W, D]`` of the same extent."""
    if tuple(shape) == tuple(maps[0].shape[1:]):
        return maps
    return F.interpolate(torch.stack(list(maps)), tuple(shape), mode="trilinear", align_corners=False).unbind()


def normative_file(ckpt_dir: str | Path, contrast: str) -> str:
    """The normative map of a contrast in a folder of models."""
    return str(Path(ckpt_dir) / f"normative_{contrast}.json")


def fit_normative(
    dataset: Sequence[Mapping[str, torch.Tensor]],
    path: str | Path,
    contrast: str,
    grid: Mapping[str, Any],
    mean_mm: float = MEAN_MM,
    spread_mm: float = SPREAD_MM,
    keep: bool = False,
) -> None:
    """Fit the normative map to healthy scans and write it, unless the very same lies there already. Another one that
    lies there is copied to ``checkpoints/earlier_maps_K`` first, with what was calibrated with it.

    Nothing is trained on it by gradient, so every healthy scan belongs in it but those that thresholds come from.

    Args:
        dataset: ``image`` ``[1, H, W, D]``, scaled by percentiles (or landmarks), 0 outside the brain.
        path: of the JSON file; the maps go to ``.nii.gz`` beside it.
        contrast: of the scans.
        grid: ``spacing`` (mm), ``spatial_size``, ``center``; stored.
        mean_mm, spread_mm: sigma of the Gaussian over mean and spread.
        keep: the map that lies there, of whatever scans, as for a network that joins others in a folder.

    Raises:
        InputError: fewer than three scans; none to keep.
    """
    if keep:
        load_normative(path)
        return
    if is_main():
        if len(dataset) < 3:
            raise InputError(f"{path}: a normative map needs at least 3 healthy scans, got {len(dataset)}")
        claim_folder(Path(path).parent)
        factor, spacing = coarsening(float(grid["spacing"])), float(grid["spacing"])
        volumes = [torch.as_tensor(dataset[i]["image"]).cpu() for i in range(len(dataset))]
        values = torch.stack([coarsen(v, v > 0, factor) for v in volumes])
        telling = {"telling": TELLING[contrast]} if contrast in TELLING else {}
        made = [contrast, CHAIN, mean_mm, spread_mm, *telling.values(), dict(grid)]
        digest = hashlib.sha256(json.dumps(made).encode())
        digest.update(values.numpy().tobytes())
        facts = {"contrast": contrast, "chain": CHAIN, "subjects": len(values), "grid": dict(grid), **telling}
        facts |= {"mean_mm": mean_mm, "spread_mm": spread_mm, "made_from": digest.hexdigest()}
        if not _is_whole(path, facts["made_from"]):
            sigmas = mean_mm / spacing / factor, spread_mm / spacing / factor
            maps = dict(zip(("mean", "spread"), population_maps(values, *sigmas)))
            maps["share"] = (~values.isnan()).float().mean(0, keepdim=True)
            for between in telling.values():
                held = population_maps(values.clamp(*between), *sigmas)
                maps |= zip(("telling_mean", "telling_spread"), held)
            affine = coarse_affine(np.asarray(dataset[0]["image"].affine), factor)  # type: ignore[attr-defined]
            _set_aside(Path(path), contrast)
            index = write_maps(Path(path).with_suffix(".nii.gz"), maps, affine)
            write_json(path, {**facts, "maps": index})
        print(f"{path}: how bright {len(values)} healthy {contrast} scans are at every place", flush=True)
    if dist.is_initialized():
        dist.barrier()


def _set_aside(path: Path, contrast: str) -> None:
    """Copy a map that will be replaced, with calibration and embedding, without which a model is of no use."""
    if not path.is_file():
        return
    away = numbered_folder(path.parent / "checkpoints", "earlier_maps")
    for kind in ("normative", "calibration", "embedding"):
        for file in path.parent.glob(f"{kind}_{contrast}*"):
            shutil.copy2(file, away / file.name)
    print(f"{away}: a copy of the normative map that this one replaces, and of what was calibrated with it", flush=True)


def _is_whole(path: str | Path, made_from: Any) -> bool:
    """Whether a map that was made from that lies there, with all its files."""
    try:
        return load_normative(path).facts["made_from"] == made_from
    except (InputError, KeyError):
        return False


@lru_cache(maxsize=4)
def _read(path: str, _time: int) -> NormativeMap:
    content = read_json(path, "normative map")
    if not isinstance(content, dict) or content.get("chain") != CHAIN:
        raise InputError(f"{path}: of an older version's preparation; prepare the scans and train again")
    try:
        maps = read_maps(Path(path).with_suffix(".nii.gz"), content["maps"])
        return NormativeMap(**maps, facts=content)
    except (KeyError, TypeError, ValueError, IndexError, OSError, EOFError, zlib.error, ImageFileError) as error:
        raise InputError(f"{path}: damaged normative map ({error!r}); run the training again") from error


def load_normative(path: str | Path) -> NormativeMap:
    """Read what `fit_normative` wrote.

    Raises:
        InputError: missing, damaged, or of another version of the chain.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no normative map beside the model; train it, or name its folder with --ckpt_dir")
    return _read(str(path), Path(path).stat().st_mtime_ns)

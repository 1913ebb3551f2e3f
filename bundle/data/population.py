"""What is usual among healthy people at every place: smooth, robust mean and spread, and how such maps are kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from .files import file_hash
from .volumes import write_volume

# of 16 bit, the last four are left 0: nobody knows such maps that finely, and the files are a quarter smaller
_CODES, _STEP = 65520, 16
_MAP_SPACING = 2.0


def coarsening(spacing: float, lattice: float = _MAP_SPACING) -> int:
    """Edge, in voxels of a grid of ``spacing`` mm, of the blocks that maps are kept in: ``lattice`` mm, or 1."""
    return max(1, round(lattice / spacing))


def coarsen(volume: torch.Tensor, inside: torch.Tensor, factor: int) -> torch.Tensor:
    """Mean over the brain voxels of each block of ``factor`` cubed; NaN where there are none. ``[1, H, W, D]`` to
    ``[h, w, d]``.
    """
    weight = F.avg_pool3d(inside[None].float(), factor, ceil_mode=True)
    total = F.avg_pool3d((volume * inside)[None].float(), factor, ceil_mode=True)
    return torch.where(weight > 0, total / weight, torch.nan)[0, 0]


def coarse_affine(affine: np.ndarray, factor: int) -> np.ndarray:
    """Affine of the blocks of `coarsen`: outer edges are shared, so the middle of the first one lies further in."""
    coarse = affine @ np.diag([factor, factor, factor, 1.0])
    coarse[:3, 3] = (affine @ np.array([*[(factor - 1) / 2] * 3, 1.0]))[:3]
    return coarse


def median_over_subjects(stack: torch.Tensor) -> torch.Tensor:
    """Median over the first dimension, ignoring NaN (the mean of the middle two); NaN where all are."""
    flat = stack.flatten(1)
    some = ~flat.isnan().all(0)  # two thirds of a grid are no brain
    result = flat.new_full(flat.shape[1:], torch.nan)
    if some.any():
        result[some] = torch.as_tensor(np.nanmedian(flat[:, some].numpy(), 0))
    return result.view(stack.shape[1:])


def population_maps(
    values: torch.Tensor, mean_sigma: float, spread_sigma: float | None = None, prior_subjects: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth, robust mean and spread over subjects at every voxel.

    The mean is the median over the subjects that have brain there, the spread 1.4826 times the median absolute
    deviation from the smoothed mean (so that what smoothing blurs counts as spread). Both are smoothed by a Gaussian
    weighted with the number of subjects, and drawn towards the whole brain's by ``prior_subjects`` subjects' weight,
    which decides where few brains have voxels. The spread is at least a quarter of the whole brain's.

    Args:
        values: ``[N, H, W, D]``, NaN outside each brain.
        mean_sigma, spread_sigma: of the Gaussians, voxels; the spread's is the mean's if it is not given.
        prior_subjects: see above.

    Returns:
        mean and spread, ``[1, H, W, D]`` each, finite everywhere.
    """
    count = (~values.isnan()).sum(0).to(values.dtype)

    def pooled(local: torch.Tensor, overall: torch.Tensor, sigma: float) -> torch.Tensor:
        def smooth(volume: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(ndimage.gaussian_filter(volume.numpy(), sigma, mode="constant"))

        total = smooth(local.nan_to_num() * count) + prior_subjects * overall
        return total / (smooth(count) + prior_subjects)

    local = median_over_subjects(values)
    mean = pooled(local, local[count > 0].median(), mean_sigma)
    deviation = 1.4826 * median_over_subjects((values - mean).abs())
    overall = deviation[count > 0].median().clamp(min=1e-6)
    squared = pooled(deviation**2, overall**2, mean_sigma if spread_sigma is None else spread_sigma)
    return mean[None], squared.sqrt().clamp(min=0.25 * float(overall))[None]


def write_maps(path: str | Path, maps: Mapping[str, torch.Tensor], affine: np.ndarray) -> dict[str, Any]:
    """Write maps ``[1, h, w, d]`` into one NIfTI file, as integers of 16 bit with a scale each: a tenth of the size,
    and finer than such maps are known.

    Returns:
        for each map its ``volume`` in the file, and the values ``lowest`` and ``highest`` of its codes: what
        `read_maps` needs; and the ``sha256`` of the file.
    """
    index: dict[str, Any] = {}
    codes = []
    for number, (name, volume) in enumerate(maps.items()):
        low, high = float(volume.min()), float(volume.max())
        index[name] = {"volume": number, "lowest": low, "highest": high}
        share = (volume[0] - low) / max(high - low, 1e-12)
        codes.append(((share * (_CODES // _STEP)).round() * _STEP).numpy().astype(np.uint16))
    write_volume(path, np.stack(codes, -1), affine)
    return {**index, "sha256": file_hash(path)}


def read_maps(path: str | Path, index: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The maps that `write_maps` wrote; errors are those of nibabel, NumPy and of a damaged ``index``.

    Raises:
        ValueError: another file than was written with the index: its codes would stand for other values. (Versions
            before 0.21.0 wrote no hash to tell by.)
    """
    if index.get("sha256") not in (None, file_hash(path)):
        raise ValueError(f"{Path(path).name} is not the file that was written with it")
    file: Any = nib.load(path)
    stored = np.asanyarray(file.dataobj).astype(np.float32)
    return {
        name: torch.from_numpy(stored[..., int(m["volume"])].copy())[None] / _CODES * (m["highest"] - m["lowest"])
        + m["lowest"]
        for name, m in index.items()
        if name != "sha256"
    }

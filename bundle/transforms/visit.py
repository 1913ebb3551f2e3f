"""Scans of one visit brought onto each other."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
import torch
from monai.data import MetaTensor

from bundle.data.atlas import LPS, to_sitk
from bundle.errors import InputError

_VOXEL_MM = 2.0  # finer ones are averaged first


def register_rigidly(
    moving: MetaTensor, moving_brain: MetaTensor, fixed: MetaTensor, fixed_brain: MetaTensor, seed: int = 0
) -> np.ndarray:
    """Rigid registration of one head to itself in another contrast, brain to brain, by Mattes mutual information.

    Two starts, the headers and the brains' centres, are tried at 8 mm; the better one goes on at 4 mm.

    Args:
        moving, fixed: scans ``[1, X, Y, Z]``, any contrast, any affine.
        moving_brain, fixed_brain: their brains, each on its scan's grid.
        seed: of the metric's random sampling.

    Returns:
        4x4 matrix (RAS mm) from the world of ``moving`` to that of ``fixed``.

    Raises:
        InputError: ITK found no overlap.
    """
    if not ((moving_brain > 0).any() and (fixed_brain > 0).any()):
        raise InputError("a scan of the visit has no brain")
    target, inside = _shrunken(fixed, fixed_brain)
    source, source_inside = _shrunken(moving, moving_brain)
    center, other = (_centroid(mask) for mask in (inside, source_inside))
    rim = [max(1, round(9.0 / s)) for s in inside.GetSpacing()]  # the brain's outline is a guide, too
    inside = sitk.BinaryDilate(inside > 0.5, rim)
    tried: list[tuple[float, sitk.Euler3DTransform]] = []
    for shift in (np.zeros(3), other - center):
        transform = sitk.Euler3DTransform(center.tolist(), 0.0, 0.0, 0.0, shift.tolist())
        try:
            tried.append((_optimise(target, inside, source, transform, 8.0, seed), transform))
        except RuntimeError:  # one start may fall off the brain
            continue
    if not tried:
        raise InputError("scans of the visit do not overlap; are they of one head?")
    _, found = min(tried, key=lambda t: t[0])
    _optimise(target, inside, source, found, 4.0, seed)
    matrix, to_moving = np.array(found.GetMatrix()).reshape(3, 3), np.eye(4)
    to_moving[:3, :3], to_moving[:3, 3] = matrix, np.array(found.GetTranslation()) + center - matrix @ center
    return np.linalg.inv(LPS @ to_moving @ LPS)


def _shrunken(scan: MetaTensor, brain: MetaTensor) -> tuple[sitk.Image, sitk.Image]:
    """The brain of a scan, and its mask (shares of voxels), in voxels of nearly 2 mm."""
    alone = MetaTensor(torch.where(brain.as_tensor() > 0, scan.as_tensor(), 0.0), affine=scan.affine)
    images = to_sitk(alone), to_sitk(MetaTensor((brain.as_tensor() > 0).float(), affine=scan.affine))
    factors = [max(1, int(_VOXEL_MM / s)) for s in images[0].GetSpacing()]
    return sitk.BinShrink(images[0], factors), sitk.BinShrink(images[1], factors)


def _centroid(mask: sitk.Image) -> np.ndarray:
    index = np.argwhere(sitk.GetArrayViewFromImage(mask) > 0.5).mean(0)[::-1]
    return np.array(mask.TransformContinuousIndexToPhysicalPoint(index.tolist()))


def _optimise(
    fixed: sitk.Image, mask: sitk.Image, moving: sitk.Image, transform: sitk.Transform, level_mm: float, seed: int
) -> float:
    """Improve ``transform`` (fixed to moving) in place, in voxels of ``level_mm``; the metric, lower is better."""
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)  # several add up in an order of their own
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricFixedMask(mask)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(0.5, seed + 1)  # SimpleITK takes 0 for the clock
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 60, relaxationFactor=0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([max(1, round(level_mm / max(fixed.GetSpacing())))])
    method.SetSmoothingSigmasPerLevel([level_mm / 2])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(fixed, moving)
    return method.GetMetricValue()

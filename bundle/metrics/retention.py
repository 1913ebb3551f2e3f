"""What a preprocessing leaves of a lesion, and of shading: measures on a scan and its twin.

A planted scan and its twin, the same scan without the lesion, lie on the same voxels at every step of a chain; so the
change that the lesion makes is known to the voxel, and is followed from step to step.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

SHELL_MM = (6.0, 15.0)


def shell_of(soft: np.ndarray, inside: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """What surrounds a lesion: the brain from 6 to 15 mm from it, ``[X, Y, Z]`` bool.

    Args:
        soft: share of lesion in every voxel, ``[X, Y, Z]``; what has less than a hundredth is none.
        inside: brain, bool.
        affine: voxels to mm.
    """
    voxel = np.linalg.norm(affine[:3, :3], axis=0)
    distance = ndimage.distance_transform_edt(soft < 0.01, sampling=voxel)
    return inside & (distance >= SHELL_MM[0]) & (distance <= SHELL_MM[1])


def robust_spread(values: np.ndarray) -> float:
    """Standard deviation by the median absolute deviation: what a lesion in a tenth of the values hardly moves."""
    return float(1.4826 * np.median(np.abs(values - np.median(values))))


def planted_contrast(
    planted: np.ndarray,
    twin: np.ndarray,
    soft: np.ndarray,
    inside: np.ndarray,
    affine: np.ndarray,
    spread: float | None = None,
) -> float:
    """Contrast of a planted lesion to its surroundings, in spreads of the healthy twin's brain.

    The change (planted minus twin) that exceeds the mean change of the surroundings is weighted by the lesion's share
    of each voxel: ``sum(soft * change) / sum(soft ** 2)``, the factor on ``soft`` that fits it best. So voxels that
    hold half a lesion, after resampling say, take nothing from the contrast, blurring does, and a field that darkens a
    lesion and its neighbourhood a little counts for that little, however thinly the lesions are spread. Voxels that are
    not ``inside`` any more add nothing but still count as lesion: they are lost. Any linear scale of the intensities
    gives the same.

    Args:
        planted, twin: ``[X, Y, Z]``.
        soft: share of lesion in every voxel, whether it is still inside or not.
        inside: what the step calls brain, bool.
        affine: voxels to mm.
        spread: what the contrast is divided by; None: the robust spread of the twin inside.

    Returns:
        the contrast, negative for a dark lesion; NaN where there is no lesion.
    """
    if not soft.any():
        return float("nan")
    shell = shell_of(soft, inside, affine)
    change = planted.astype(np.float64) - twin
    around = change[shell].mean() if shell.any() else 0.0
    share = soft.astype(np.float64)
    factor = (share * (change - around))[inside].sum() / (share**2).sum()
    return float(factor / (robust_spread(twin[inside]) if spread is None else spread))


def real_contrast(image: np.ndarray, lesion: np.ndarray, inside: np.ndarray, affine: np.ndarray) -> float:
    """Mean of a real lesion's voxels minus that of the brain from 6 to 15 mm from it, in robust spreads of the brain
    without the lesion; NaN where there is none.

    Args:
        image: ``[X, Y, Z]``.
        lesion, inside: bool.
        affine: voxels to mm.
    """
    shell = shell_of(lesion.astype(np.float32), inside, affine)
    if not (lesion & inside).any() or not shell.any():
        return float("nan")
    return float((image[lesion & inside].mean() - image[shell].mean()) / robust_spread(image[inside & ~lesion]))


def shading_removed(planted: np.ndarray, remaining: np.ndarray) -> float:
    """Share of a planted shading that a correction took away: 1 minus the standard deviation of the logarithm of what
    remains over that of what was planted. 1 is all, 0 nothing, less than 0 made worse.

    Args:
        planted, remaining: factors on the intensities of the same brain voxels, any shape.
    """
    return float(1 - np.log(remaining).std() / np.log(planted).std())


def variation(values: np.ndarray) -> float:
    """Coefficient of variation of a tissue, robust: spread over median."""
    return robust_spread(values) / float(np.median(values))

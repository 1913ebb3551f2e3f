"""The atlas: the MNI152 2009a anatomy that nilearn carries, and the grid in its space on which all is compared."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from monai.transforms import ResampleToMatch

# ITK counts to the left, back and up, NIfTI to the right, front and up
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def grid_affine(spacing: float, spatial_size: Sequence[int], center: Sequence[float]) -> np.ndarray:
    """Affine of an RAS grid of cubic voxels, centred in the atlas.

    Args:
        spacing: edge of a voxel, mm.
        spatial_size: voxels along right, anterior, superior.
        center: atlas coordinates (mm, RAS) of the middle of the grid. Grids of one extent and centre but different
            spacing share their outer edges, so that a coarse voxel covers whole fine ones.

    Returns:
        4x4 matrix, voxel index to mm.
    """
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = np.asarray(center, float) - (np.asarray(spatial_size, float) - 1) / 2 * spacing
    return affine


class Atlas(NamedTuple):
    """A template and its brain, on one grid, as ``[1, X, Y, Z]`` with affine in RAS mm."""

    template: MetaTensor
    brain_mask: MetaTensor


def _from_nifti(image: Any) -> MetaTensor:
    data = torch.as_tensor(np.asanyarray(image.dataobj, dtype=np.float32))[None]
    return MetaTensor(data, affine=torch.as_tensor(image.affine))


@lru_cache(maxsize=1)
def load_atlas() -> Atlas:
    """MNI152 2009a symmetric T1w and its brain mask at 2 mm, from the nilearn wheel."""
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

    return Atlas(_from_nifti(load_mni152_template(resolution=2)), _from_nifti(load_mni152_brain_mask(resolution=2)))


def atlas_overlap(brain_mask: MetaTensor, atlas: Atlas) -> float:
    """Dice of a brain mask ``[1, X, Y, Z]`` and the atlas' within the mask's field of view; 1 is perfect."""
    expected = ResampleToMatch(mode="nearest", padding_mode="zeros")(atlas.brain_mask, img_dst=brain_mask) > 0
    inside = brain_mask > 0
    return float(2 * (inside & expected).sum() / (inside.sum() + expected.sum()))


def to_sitk(image: Any, pixel_type: type = np.float32) -> sitk.Image:
    """``[1, X, Y, Z]`` with an RAS affine to an ITK image (LPS)."""
    affine = LPS @ np.asarray(image.affine, float)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    out = sitk.GetImageFromArray(np.ascontiguousarray(image[0].cpu().numpy().T.astype(pixel_type)))
    out.SetSpacing(spacing.tolist())
    out.SetOrigin(affine[:3, 3].tolist())
    out.SetDirection((affine[:3, :3] / spacing).flatten().tolist())
    return out

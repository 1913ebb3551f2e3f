"""The atlas: the MNI152 2009a anatomy that nilearn carries, and the grid in its space on which all is compared."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from monai.transforms import ResampleToMatch

from bundle.errors import InputError

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


@lru_cache(maxsize=4)
def load_atlas(template_file: str | None = None, mask_file: str | None = None, spacing: int = 2) -> Atlas:
    """The default atlas (MNI152 2009a symmetric T1w, from the nilearn wheel) or any skull-stripped template file.

    Args:
        template_file: NIfTI template of a head or a brain; None for MNI152.
        mask_file: its brain mask; None: every voxel of the template above zero.
        spacing: mm, of the default atlas only.

    Raises:
        InputError: the template file cannot be read.
    """
    if template_file is None:
        from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

        template = _from_nifti(load_mni152_template(resolution=spacing))
        return Atlas(template, _from_nifti(load_mni152_brain_mask(resolution=spacing)))
    try:
        template = _from_nifti(nib.load(template_file))
        mask = (
            _from_nifti(nib.load(mask_file))
            if mask_file
            else MetaTensor((template > 0).float()).copy_meta_from(template)
        )
    except (OSError, nib.filebasedimages.ImageFileError) as error:
        raise InputError(f"{template_file}: the atlas cannot be read ({error}); give a NIfTI template") from error
    return Atlas(template, mask)


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

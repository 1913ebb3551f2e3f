"""The atlas (by default the MNI152 2009a anatomy that nilearn carries), and the grid in its space on which all is
compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from monai.transforms import ResampleToMatch

from bundle.errors import InputError

from .formats import stem

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


def mni152_2mm(load: Callable[..., Any]) -> MetaTensor:
    """One of nilearn's MNI152 maps at 2 mm: every second voxel of it. nilearn's own way there comes to the same values
    by splines, in half a second.

    Args:
        load: of nilearn.datasets, such as ``load_mni152_template``.
    """
    return _from_nifti(load(resolution=1).slicer[::2, ::2, ::2])


@lru_cache(maxsize=2)
def load_atlas(template: str | None = None) -> Atlas:
    """A template to align scans to.

    Args:
        template: NIfTI file of a brain, skull-stripped or with its mask beside it (``NAME_brain_mask.nii.gz``), such
            as SRI24's; None takes the MNI152 2009a symmetric T1w at 2 mm from the nilearn wheel. Set ``grid_center``
            to the middle of the part of it that is to be looked at.

    Raises:
        InputError: not a readable 3D file, or a whole head without a mask.
    """
    if template is None:
        from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

        return Atlas(mni152_2mm(load_mni152_template), mni152_2mm(load_mni152_brain_mask))
    try:
        mask_file = Path(template).with_name(stem(template) + "_brain_mask.nii.gz")
        volume = _from_nifti(nib.squeeze_image(nib.load(template)))
        brain = _from_nifti(nib.load(mask_file)) if mask_file.is_file() else volume
        mask = brain.as_tensor() > 0
    except Exception as error:  # nibabel has many for what is no image
        raise InputError(f"{template}: atlas cannot be read as a NIfTI image; it must be a stripped brain") from error
    same_grid = mask.shape == volume.shape and torch.allclose(brain.affine, volume.affine, atol=1e-3)
    if volume.ndim != 4 or not same_grid or not 0 < mask.float().mean() < 0.7:
        raise InputError(f"{template}: an atlas must be one skull-stripped brain, or have {mask_file.name} beside it")
    return Atlas(volume, MetaTensor(mask.float(), affine=volume.affine))


def atlas_overlap(brain_mask: MetaTensor, atlas: Atlas) -> float:
    """Dice of a brain mask ``[1, X, Y, Z]`` and the atlas' within the mask's field of view; 1 is perfect.

    Fine voxels are looked at in steps of at most 3 mm: a large scan needs gigabytes otherwise, and of a brain's 1.9
    litres fifty thousand points tell the overlap to the third digit.
    """
    voxel = np.linalg.norm(np.asarray(brain_mask.affine, float)[:3, :3], axis=0)
    steps = [min(max(1, int(3.0 / v)), n) for v, n in zip(voxel, brain_mask.shape[1:])]
    affine = brain_mask.affine @ torch.diag(torch.tensor([*steps, 1.0], dtype=brain_mask.affine.dtype))
    few = brain_mask.as_tensor()[:, :: steps[0], :: steps[1], :: steps[2]]
    brain_mask = MetaTensor(few, affine=affine)
    expected = ResampleToMatch(mode="nearest", padding_mode="zeros")(atlas.brain_mask, img_dst=brain_mask) > 0
    inside = brain_mask > 0
    return float(2 * (inside & expected).sum() / (inside.sum() + expected.sum()))


def tissue_order(image: MetaTensor, atlas: Atlas) -> tuple[float, float]:
    """How a scan's tissues are ordered: medians of white matter and of fluid (CSF), each minus that of grey matter.

    Where the tissues lie is told by the atlas, whose template must be T1w: its darkest tenth is fluid, the brightest
    three tenths are white, from 0.35 to 0.55 of its voxels by brightness are grey matter.

    Args:
        image: normalised ``[1, H, W, D]`` in the atlas' world, 0 outside the brain.
        atlas: T1w.

    Raises:
        InputError: a tissue does not lie in the brain at all.
    """
    brain: Any = atlas.template * atlas.brain_mask
    template: Any = ResampleToMatch(mode="bilinear", padding_mode="zeros")(brain, img_dst=image)
    expected, scan = template.as_tensor().cpu(), image.as_tensor().cpu()
    limits = torch.quantile(expected[expected > 0][::4], torch.tensor([0.1, 0.35, 0.55, 0.7]))
    fluid = (expected > 0) & (expected < limits[0])
    grey, white = (expected > limits[1]) & (expected < limits[2]), expected > limits[3]
    values = [scan[(scan > 0) & tissue] for tissue in (fluid, grey, white)]
    if min(len(v) for v in values) == 0:
        raise InputError("the brain does not cover the atlas; check its orientation and alignment")
    fluid_level, grey_level, white_level = (float(v.median()) for v in values)
    return white_level - grey_level, fluid_level - grey_level


def contrast_doubt(image: MetaTensor, contrast: str, atlas: Atlas) -> str:
    """Why a scan does not look as its contrast should, in a few words; "" if it does.

    T1w: fluid < grey < white; T2w: white < grey < fluid; FLAIR: grey is at least as bright as white and fluid. The
    margins are those that all of 150 T1w scans (IXI), 300 synthetic T2w and FLAIR ones and a patient's of each keep.

    Args:
        image, atlas: see `tissue_order`.
        contrast: "t1", "t2" or "flair".
    """
    white, fluid = tissue_order(image, atlas)
    fits = {"t1": white > 0.02, "t2": white < 0.02 and fluid > 0.0, "flair": white < 0.02 and fluid < 0.08}
    if fits.get(contrast, True):
        return ""
    others = " or ".join(name for name, fit in fits.items() if fit)
    return f"its tissues are not as bright as in a {contrast} scan" + (f", but as in {others}" if others else "")


def to_sitk(image: Any, pixel_type: type = np.float32) -> sitk.Image:
    """``[1, X, Y, Z]`` with an RAS affine to an ITK image (LPS)."""
    affine = LPS @ np.asarray(image.affine, float)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    out = sitk.GetImageFromArray(np.ascontiguousarray(image[0].cpu().numpy().T.astype(pixel_type)))
    out.SetSpacing(spacing.tolist())
    out.SetOrigin(affine[:3, 3].tolist())
    out.SetDirection((affine[:3, :3] / spacing).flatten().tolist())
    return out


def from_sitk(image: sitk.Image) -> MetaTensor:
    """A 3D ITK image (LPS) to ``[1, X, Y, Z]``, float32, with an affine in RAS mm."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    data = torch.as_tensor(sitk.GetArrayFromImage(image).astype(np.float32).T.copy())[None]
    return MetaTensor(data, affine=torch.as_tensor(LPS @ affine))

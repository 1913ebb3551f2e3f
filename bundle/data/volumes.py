"""Writing volumes: NIfTI, or the format of the scan that a result answers to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
from monai.data import MetaTensor

from .atlas import to_sitk
from .files import atomic_path
from .formats import is_nifti

RESULT_ENDINGS = (".nii.gz", ".nrrd", ".mha")


def result_ending(scan: str | Path) -> str:
    """Ending of the volumes that answer to a scan: its own format where that can hold them, NIfTI otherwise."""
    name = str(scan).lower()
    if name.endswith((".nrrd", ".nhdr")):
        return ".nrrd"
    return ".mha" if name.endswith((".mha", ".mhd")) else ".nii.gz"


def write_result(path: Path, volume: np.ndarray, affine: Any, header: nib.Nifti1Header | None = None) -> None:
    """Write a volume ``[X, Y, Z]``, atomically, in the format that the path's ending names (`result_ending`).

    Args:
        path: of the file.
        volume: its dtype is stored.
        affine: 4x4, voxel to RAS mm.
        header: of the scan, for NIfTI, see `write_volume`.
    """
    if path.name.endswith(".nii.gz"):
        return write_volume(path, volume, affine, header)
    image = to_sitk(MetaTensor(volume[None], affine=torch.as_tensor(np.asarray(affine, float))), volume.dtype.type)
    with atomic_path(path) as temporary:
        sitk.WriteImage(image, str(temporary), useCompression=True)


def write_volume(path: str | Path, volume: Any, affine: Any, header: nib.Nifti1Header | None = None) -> None:
    """Write a NIfTI volume atomically.

    Args:
        path: ends in .nii or .nii.gz.
        volume: ``[X, Y, Z]``; its dtype is stored.
        affine: 4x4, voxel to mm.
        header: of the scan that the volume answers to: its units and codes are kept.
    """
    array = np.asarray(volume)
    image = nib.Nifti1Image(array, np.asarray(affine, float), header)
    image.set_data_dtype(array.dtype)
    image.header.set_slope_inter(1, 0)
    image.header["cal_min"] = image.header["cal_max"] = 0  # the scan's window is not that of its heatmap
    if header is None:
        image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        nib.save(image, temporary)


def nifti_header(path: str | Path) -> nib.Nifti1Header | None:
    """Header of a scan, for what answers to it: units and codes, without texts and extensions, which may tell who it
    is of. None where it has none (other formats).
    """
    image = nib.load(path) if is_nifti(path) and Path(path).is_file() else None
    if not isinstance(image, nib.Nifti1Image):
        return None
    header = image.header.copy()
    header.extensions.clear()
    for text in ("descrip", "aux_file", "intent_name", "db_name"):
        if text in header:
            header[text] = b""
    return header

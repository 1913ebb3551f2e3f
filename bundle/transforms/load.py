"""Reading a scan."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import LoadImage, MapTransform

from bundle.data.atlas import from_sitk
from bundle.errors import InputError, flag

from .brain import mask_volume_ml

# fewer slices cannot be registered, and a single one would be taken for a column through the whole head
_FEWEST_VOXELS = 4
# more, as float32, would fill 8 GiB; and no compression of a scan, nor gzip itself, does better than this
_MOST_VOXELS, _BEST_COMPRESSION = 2**31, 1100
_LARGEST_DIFFERENCE_MM = 2.0
_LONGEST_TAIL = 1 << 26  # bytes beside the voxels
_LARGEST_LESION_ML = 1000.0


class LoadScand(MapTransform):
    """Load NIfTI files, or folders with one DICOM series each, as ``[1, X, Y, Z]`` (`MetaTensor`, float32, voxels as
    the file has them).

    A 4D file is accepted if it holds one volume, and so is a `MetaTensor` in the place of a path, ``[X, Y, Z]`` or with
    a channel before.

    Args:
        keys: paths.

    Raises:
        InputError: not a readable volume, not one volume in three dimensions, or a header that cannot be trusted
            (`check_header`).
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.load = LoadImage(reader="NibabelReader", image_only=True, ensure_channel_first=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            if isinstance(d[key], MetaTensor):
                file, image = d[key].meta.get("filename_or_obj", key), d[key]
                image = MetaTensor(image if image.ndim > 3 else image[None], dtype=torch.float32)
                image.meta.setdefault("original_affine", image.affine.numpy())
                image.meta.setdefault("spatial_shape", np.array(image.shape[1:]))
                d[key] = _check(image, file)
            else:
                file = str(d[key])
                if Path(file).is_dir():
                    d[key] = read_dicom(file)
                else:
                    doubt = check_header(file)
                    d[key] = self._read(file)
                    if doubt:
                        d = flag(d, f"{Path(file).name}: {doubt}")
            if min(d[key].shape[1:]) < _FEWEST_VOXELS:
                raise InputError(f"{file}: has {'x'.join(map(str, d[key].shape[1:]))} voxels; a scan has more slices")
        return d

    def _read(self, file: str) -> MetaTensor:
        try:
            image = self.load(file)
        except Exception as error:  # nibabel, zlib and NumPy each have their own for a broken file
            raise InputError(f"{file}: cannot be read as a NIfTI image; is the file complete?") from error
        return _check(image[..., 0] if image.ndim == 5 and image.shape[0] == 1 else image, file)


def check_header(file: str) -> str:
    """Look at a NIfTI header before its voxels are read: a broken one may ask for more memory than there is.

    Returns:
        a doubt to be flagged: sform and qform disagree by more than 2 mm somewhere in the volume (the sform counts, as
        for nibabel and ITK). "" if there is none.

    Raises:
        InputError: not a NIfTI file, colours, impossible sizes, no orientation, or two that mirror each other.
    """
    try:
        image = nib.load(file)
        header, shape = image.header, image.shape  # type: ignore[attr-defined]
        voxels, dtype = int(np.prod(shape, dtype=object)), image.get_data_dtype()  # type: ignore[attr-defined]
        if not isinstance(image, (nib.Nifti1Image, nib.Nifti2Image)):
            return ""
    except Exception as error:  # nibabel, zlib and NumPy each have their own for a broken file
        raise InputError(f"{file}: cannot be read as a NIfTI image; is the file complete?") from error
    if dtype.fields is not None or dtype.kind == "c":
        raise InputError(f"{file}: holds colours or complex numbers; a scan has one grey value per voxel")
    size = Path(file).stat().st_size * (_BEST_COMPRESSION if file.lower().endswith(".gz") else 1)
    if min(shape, default=0) < 1 or voxels * dtype.itemsize > size:
        raise InputError(f"{file}: its header tells of {'x'.join(map(str, shape))} voxels, which it cannot hold")
    if voxels > _MOST_VOXELS:
        raise InputError(f"{file}: has {'x'.join(map(str, shape))} voxels; no scan of a head is that large")
    if file.lower().endswith(".gz") and not _is_whole(file, voxels * dtype.itemsize):
        raise InputError(f"{file}: cannot be read as it was written (its checksum does not fit); is the file complete?")
    forms = [f for f in (_form(header, "sform"), _form(header, "qform")) if f is not None]
    if not forms:
        raise InputError(f"{file}: its header has no orientation (sform and qform are not set); set one")
    if not _usable(forms[0]):  # MONAI's reader would make one up
        raise InputError(f"{file}: its header has no usable orientation (affine); repair it")
    if len(forms) == 2 and all(_usable(f) for f in forms):
        if np.linalg.det(forms[0][:3, :3]) * np.linalg.det(forms[1][:3, :3]) < 0:
            raise InputError(f"{file}: sform and qform mirror each other, so left and right are unknown; set one right")
        corners = np.array([[*c, 1.0] for c in np.ndindex(2, 2, 2)]) * [*np.subtract(shape[:3], 1), 1]
        apart = np.linalg.norm((corners @ (forms[0] - forms[1]).T)[:, :3], axis=1).max()
        if apart > _LARGEST_DIFFERENCE_MM:
            return f"sform and qform differ by up to {apart:.0f} mm; the sform was used"
    return ""


def _is_whole(file: str, size: int) -> bool:
    """Whether a gzip file has the checksum that it ends with: who reads only the voxels, ``size`` bytes, never gets
    there. A file that goes on and on is left at that.
    """
    left = size + _LONGEST_TAIL
    try:
        with gzip.open(file) as stream:
            while left > 0 and (piece := stream.read(1 << 20)):
                left -= len(piece)
    except (OSError, EOFError, zlib.error):
        return False
    return True


def _form(header: Any, which: str) -> np.ndarray | None:
    try:
        matrix, code = getattr(header, f"get_{which}")(coded=True)
    except Exception:  # a quaternion that is none
        return np.full((4, 4), np.nan)
    return matrix if code else None


def _usable(affine: np.ndarray) -> bool:
    """Whether an affine has three directions, and voxels between a micrometre and a metre."""
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-9:
        return False
    voxel = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(((voxel > 1e-3) & (voxel < 1e3)).all() and np.isfinite(nib.io_orientation(affine)).all())


def _check(image: MetaTensor, file: str) -> MetaTensor:
    """The image, if it is one volume with an affine."""
    if image.ndim != 4:
        raise InputError(f"{file}: has {image.ndim - 1} dimensions; a scan has three")
    if image.shape[0] != 1:
        raise InputError(f"{file}: holds {image.shape[0]} volumes; split it and give one")
    if not _usable(np.asarray(image.affine)):
        raise InputError(f"{file}: its header has no usable orientation (affine); repair it")
    return image


class CheckLabelsd(MapTransform):
    """Refuse masks of lesions that cannot be any: they would be measured all the same.

    Args:
        keys: label maps, 0 where there is no lesion.
        image_key: the scan.

    Raises:
        InputError: a value that is not finite; no 0 at all, or more than a litre marked; lesions of which none lies in
            the scan's field of view.
    """

    def __init__(self, keys: KeysCollection, image_key: str = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            label, file = d[key].as_tensor()[0], d[key].meta.get("filename_or_obj", key)
            if not label.isfinite().all():
                raise InputError(f"{file}: holds values that are not finite; a mask of lesions is 0 outside them")
            marked = label > 0
            volume_ml = mask_volume_ml(marked, d[key])
            if marked.all() or volume_ml > _LARGEST_LESION_ML:
                raise InputError(f"{file}: marks {volume_ml:.0f} ml; a mask of lesions is 0 outside them")
            if marked.any() and not _meet(marked, d[key].affine, d[self.image_key]):
                raise InputError(f"{file}: its lesions lie outside the scan; is it of the same person and space?")
        return d


def _meet(marked: torch.Tensor, affine: Any, image: MetaTensor) -> bool:
    """Whether a voxel of a mask ``[X, Y, Z]`` with ``affine`` lies in the field of view of ``image``."""
    where = np.argwhere(marked.numpy())
    to_image = np.linalg.inv(np.asarray(image.affine, float)) @ np.asarray(affine, float)
    index = where @ to_image[:3, :3].T + to_image[:3, 3]
    return bool(((index > -1) & (index < np.array(image.shape[1:]))).all(1).any())


class IgnoreLabelsd(MapTransform):
    """Set the voxels whose label an item lists in ``ignored_labels`` to -1: neither lesion nor healthy when methods
    are scored. Other items are left as they are.

    Args:
        keys: label maps.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        ignored = torch.as_tensor(d.get("ignored_labels", []))
        for key in self.key_iterator(d):
            d[key] = d[key].masked_fill(torch.isin(d[key].as_tensor(), ignored.to(d[key].dtype)), -1)
        return d


def read_dicom(folder: str) -> MetaTensor:
    """Read a folder with one DICOM series through ITK (GDCM), as ``[1, X, Y, Z]`` with its affine in RAS mm.

    Raises:
        InputError: no series, or more than one; slices missing or of different sizes; colours.
    """
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(folder)
    if len(series) != 1:
        raise InputError(f"{folder}: holds {len(series)} DICOM series; give a folder with one")
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(folder, series[0])
    try:
        gaps = np.diff(_slice_positions(files))
        image = sitk.ReadImage(files)
    except RuntimeError as error:
        raise InputError(f"{folder}: its DICOM series cannot be read; is it complete?") from error
    if gaps.size and np.abs(gaps - np.median(gaps)).max() > 0.1 * abs(np.median(gaps)):
        raise InputError(
            f"{folder}: slices lie {gaps.min():.2f} to {gaps.max():.2f} mm apart; some are missing or of another series"
        )
    if image.GetNumberOfComponentsPerPixel() != 1 or image.GetDimension() != 3:
        raise InputError(f"{folder}: its DICOM series is not one grey-scale volume")
    scan = from_sitk(image)
    scan.meta["filename_or_obj"] = folder
    return scan


def _slice_positions(files: Sequence[str]) -> np.ndarray:
    """Position of each file's slice along the normal of the slices, mm."""
    positions = []
    reader = sitk.ImageFileReader()
    for file in files:
        reader.SetFileName(file)
        reader.ReadImageInformation()
        normal = np.reshape(reader.GetDirection(), (3, 3))[:, 2]
        positions.append(float(normal @ np.array(reader.GetOrigin())))
    return np.array(positions)

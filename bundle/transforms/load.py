"""Reading a scan."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from nibabel.openers import ImageOpener

from bundle.data.dicom import read_dicom, read_dicom_zip
from bundle.data.files import AUTO
from bundle.data.formats import BEST_COMPRESSION, ITK_ENDINGS, MOST_VOXELS, analyze_pair
from bundle.data.itk_files import read_itk
from bundle.errors import InputError, flag

# fewer slices cannot be registered, and a single one would be taken for a column through the whole head
_FEWEST_VOXELS = 4
_LARGEST_DIFFERENCE_MM = 2.0
_LONGEST_TAIL = 1 << 26  # bytes beside the voxels


class LoadScand(MapTransform):
    """Load volumes as ``[1, X, Y, Z]`` (`MetaTensor`, float32, voxels as the file has them): NIfTI, MGZ and Analyze
    through nibabel, NRRD, MetaImage and DICOM series (in a folder or a zip) through ITK.

    A NIfTI file's affine is its sform, else its qform, as nibabel tells. (MONAI's reader takes another where the voxel
    size beside it is rounded, and loses the orientation.) A 4D file is accepted if it holds one volume, and so is a
    `MetaTensor` in the place of a path, ``[X, Y, Z]`` or with a channel before.

    Args:
        keys: paths.
        contrast: which of several DICOM series is wanted; None and "auto" take the item's own ``contrast``.

    Raises:
        InputError: not a readable volume, not one volume in three dimensions, or a header that cannot be trusted
            (`check_header`).
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False, contrast: str | None = None) -> None:
        super().__init__(keys, allow_missing_keys)
        self.contrast = None if contrast == AUTO else contrast

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            if isinstance(d[key], MetaTensor):
                file, image = d[key].meta.get("filename_or_obj", key), d[key]
                d[key] = _check(MetaTensor(image if image.ndim > 3 else image[None], dtype=torch.float32), file)
            else:
                file = str(d[key])
                if Path(file).is_dir() or file.lower().endswith(".zip"):
                    read = read_dicom if Path(file).is_dir() else read_dicom_zip
                    of = self.contrast or d.get("contrast")
                    d[key] = read(file, None if of == AUTO else of)
                elif file.lower().endswith(ITK_ENDINGS):
                    d[key] = _check(read_itk(file), file)
                    if doubt := d[key].meta.pop("doubt", ""):
                        d = flag(d, f"{Path(file).name}: {doubt}")
                else:
                    doubt = check_header(file)
                    d[key] = _read(file)
                    if doubt:
                        d = flag(d, f"{Path(file).name}: {doubt}")
            if min(d[key].shape[1:]) < _FEWEST_VOXELS:
                raise InputError(f"{file}: has {'x'.join(map(str, d[key].shape[1:]))} voxels; a scan has more slices")
        return d


def _read(file: str) -> MetaTensor:
    try:
        image: Any = nib.squeeze_image(nib.load(file))
        values = np.asanyarray(image.dataobj)
    except Exception as error:  # nibabel, zlib and NumPy each have their own for a broken file
        raise InputError(f"{file}: cannot be read as {_called(file)}; is the file complete?") from error
    volumes = np.moveaxis(values, -1, 0) if values.ndim == 4 else values[None]
    volume = MetaTensor(
        torch.as_tensor(np.ascontiguousarray(volumes, np.float32)),
        affine=torch.as_tensor(image.affine),
        meta={"filename_or_obj": file},
    )
    return _check(volume, file)


def check_header(file: str) -> str:
    """Look at the header of a NIfTI, FreeSurfer or Analyze file before its voxels are read: a broken one may ask for
    more memory than there is.

    Returns:
        a doubt to be flagged: sform and qform disagree by more than 2 mm somewhere in the volume (the sform counts, as
        for nibabel and ITK); an Analyze header, which knows no left and right. "" if there is none.

    Raises:
        InputError: not such a file, colours, impossible sizes, no orientation, or two that mirror each other.
    """
    pair = analyze_pair(file)
    if pair and not all(half.is_file() for half in pair):
        raise InputError(f"{file}: an Analyze image is a .hdr and a .img file; put the other beside it")
    try:
        image: Any = nib.load(file)
        header, shape = image.header, image.shape
        voxels, dtype = int(np.prod(shape, dtype=object)), image.get_data_dtype()
    except Exception as error:  # nibabel, zlib and NumPy each have their own for a broken file
        raise InputError(f"{file}: cannot be read as {_called(file)}; is the file complete?") from error
    if dtype.fields is not None or dtype.kind == "c":
        raise InputError(f"{file}: holds colours or complex numbers; a scan has one grey value per voxel")
    packed = file.lower().endswith((".gz", ".mgz"))
    size = (pair[1] if pair else Path(file)).stat().st_size * (BEST_COMPRESSION if packed else 1)
    if min(shape, default=0) < 1 or voxels * dtype.itemsize > size:
        raise InputError(f"{file}: its header tells of {'x'.join(map(str, shape))} voxels, which it cannot hold")
    if voxels > MOST_VOXELS:
        raise InputError(f"{file}: has {'x'.join(map(str, shape))} voxels; no scan of a head is that large")
    if packed and not _is_whole(file, voxels * dtype.itemsize):
        raise InputError(f"{file}: cannot be read as it was written (its checksum does not fit); is the file complete?")
    if isinstance(image, nib.MGHImage):
        with ImageOpener(file) as stream:
            if stream.read(30)[28:] == bytes(2):  # nibabel would make an orientation up
                raise InputError(f"{file}: its header has no orientation (goodRASFlag is 0); set one")
    if not isinstance(image, (nib.Nifti1Pair, nib.Nifti2Pair)):
        is_analyze = pair and not pair[1].with_suffix(".mat").is_file()
        return (
            "an Analyze header knows no left and right; its rows were taken to run from right to left"
            if is_analyze
            else ""
        )
    forms = [f for f in (_form(header, "sform"), _form(header, "qform")) if f is not None]
    if not forms:
        raise InputError(f"{file}: its header has no orientation (sform and qform are not set); set one")
    if not _usable(forms[0]):
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


def _called(file: str) -> str:
    """Name of the format that a file's ending tells."""
    named = {".mgz": "an MGZ image", ".mgh": "an MGZ image", ".hdr": "an Analyze image", ".img": "an Analyze image"}
    return named.get(Path(file).suffix.lower(), "a NIfTI image")


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

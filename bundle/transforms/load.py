"""Reading a scan."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import LoadImage, MapTransform

from bundle.data.atlas import from_sitk
from bundle.errors import InputError

# fewer slices cannot be registered, and a single one would be taken for a column through the whole head
_FEWEST_VOXELS = 4


class LoadScand(MapTransform):
    """Load NIfTI files, or folders with one DICOM series each, as ``[1, X, Y, Z]`` (`MetaTensor`, float32, voxels as
    the file has them).

    A 4D file is accepted if it holds one volume, and so is a `MetaTensor` in the place of a path, ``[X, Y, Z]`` or with
    a channel before.

    Args:
        keys: paths.

    Raises:
        InputError: not a readable volume, or not one volume in three dimensions.
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
                d[key] = read_dicom(file) if Path(file).is_dir() else self._read(file)
            if min(d[key].shape[1:]) < _FEWEST_VOXELS:
                raise InputError(f"{file}: has {'x'.join(map(str, d[key].shape[1:]))} voxels; a scan has more slices")
        return d

    def _read(self, file: str) -> MetaTensor:
        try:
            image = self.load(file)
        except Exception as error:  # nibabel, zlib and NumPy each have their own for a broken file
            raise InputError(f"{file}: cannot be read as a NIfTI image; is the file complete?") from error
        return _check(image[..., 0] if image.ndim == 5 and image.shape[0] == 1 else image, file)


def _check(image: MetaTensor, file: str) -> MetaTensor:
    """The image, if it is one volume with an affine."""
    if image.ndim != 4:
        raise InputError(f"{file}: has {image.ndim - 1} dimensions; a scan has three")
    if image.shape[0] != 1:
        raise InputError(f"{file}: holds {image.shape[0]} volumes; split it and give one")
    if not np.isfinite(np.asarray(image.affine)).all() or abs(np.linalg.det(np.asarray(image.affine))) < 1e-9:
        raise InputError(f"{file}: its header has no usable orientation (affine); repair it")
    return image


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

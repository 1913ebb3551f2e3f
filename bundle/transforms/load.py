"""Reading a scan."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import LoadImage, MapTransform

from bundle.errors import InputError


class LoadScand(MapTransform):
    """Load NIfTI volumes as ``[1, X, Y, Z]`` (`MetaTensor`, float32, voxels as the file has them).

    A 4D file is accepted if it holds one volume.

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
            d[key] = self._read(str(d[key]))
        return d

    def _read(self, file: str) -> MetaTensor:
        try:
            image = self.load(file)
        except Exception as error:  # nibabel, zlib and NumPy each have their own for a broken file
            raise InputError(f"{file}: cannot be read as a NIfTI image; is the file complete?") from error
        if image.ndim == 5 and image.shape[0] == 1:
            image = image[..., 0]
        if image.ndim != 4:
            raise InputError(f"{file}: has {image.ndim - 1} dimensions; a scan has three")
        if image.shape[0] != 1:
            raise InputError(f"{file}: holds {image.shape[0]} volumes; split it and give one")
        if not np.isfinite(np.asarray(image.affine)).all() or abs(np.linalg.det(np.asarray(image.affine))) < 1e-9:
            raise InputError(f"{file}: its header has no usable orientation (affine); repair it")
        return image

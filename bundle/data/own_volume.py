"""Volumes in the scan's own millilitres: on the atlas a brain is as large as the atlas', 1.3 to 2 times its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from monai.data import MetaTensor

from bundle.errors import InputError


def scan_to_atlas(volume: MetaTensor) -> np.ndarray:
    """4x4 matrix (RAS mm) from the world of the scan, as it was, to the one that ``volume`` lies in: what its
    registration left in the history; the identity where there was none, or where it has been undone.
    """
    steps = [step["extra_info"].get("scan_to_atlas") for step in volume.applied_operations if "extra_info" in step]
    return np.array(next((matrix for matrix in steps if matrix is not None), np.eye(4)), float)


def own_voxel_mm3(volume: MetaTensor, to_atlas: Any = None) -> float:
    """How much of the scanned person a voxel of ``volume`` ``[1, X, Y, Z]`` holds, mm^3.

    Args:
        volume: with the affine of where it lies now, and its history.
        to_atlas: 4x4 matrix from the scan's world to that of the file that ``volume`` was read from, which an item of a
            prepared dataset has; None for the identity.

    Raises:
        InputError: a matrix that flattens the scan, or is not 4x4.
    """
    prepared = np.eye(4) if to_atlas is None else np.asarray(to_atlas, float)
    if prepared.shape != (4, 4) or not np.isfinite(prepared).all():
        raise InputError("'to_atlas' of its item must be a 4x4 matrix of numbers")
    matrices = (volume.affine, scan_to_atlas(volume), prepared)
    voxel, *grown = (abs(float(np.linalg.det(np.asarray(matrix, float)[:3, :3]))) for matrix in matrices)
    if not np.prod(grown) > 0:
        raise InputError("'to_atlas' of its item flattens the scan; prepare it again")
    return float(voxel / np.prod(grown))

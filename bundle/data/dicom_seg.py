"""Found lesions as a DICOM Segmentation that refers to the series that was scanned."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import bundle
from bundle.errors import InputError

from .atlas import LPS
from .files import atomic_path

HINT = "no DICOM Segmentation is written beside the results: install highdicom for it (pip install highdicom)"
_FARTHEST = 0.1  # voxels, of a slice from where the volume has it

# of patient and study: must be there, even if empty; who takes names out often takes them out whole
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"),
)


def has_highdicom() -> bool:
    """Whether the optional package is there."""
    try:
        import highdicom  # noqa: F401
    except ImportError:
        return False
    return True


def slice_order(images: Sequence[Any], affine: Any) -> list[int]:
    """Slice of the volume that each frame of a series is.

    Args:
        images: data sets of the series, or one of many frames.
        affine: 4x4, voxel of the volume ``[column, row, slice]`` to RAS mm.

    Raises:
        InputError: a frame lies where the volume has no slice.
    """
    if len(images) == 1 and "PerFrameFunctionalGroupsSequence" in images[0]:
        images = [frame.PlanePositionSequence[0] for frame in images[0].PerFrameFunctionalGroupsSequence]
    positions = np.array([[*map(float, image.ImagePositionPatient), 1.0] for image in images])
    where = (positions @ np.linalg.inv(LPS @ np.asarray(affine, float)).T)[:, :3]
    if np.abs(where - where.round() * [0, 0, 1]).max() > _FARTHEST:
        raise InputError("its slices do not lie where the volume has them")
    return [int(k) for k in where[:, 2].round()]


def write_segmentation(
    path: str | Path, lesion: np.ndarray, affine: Any, files: Sequence[str], facts: Mapping[str, Any] | None = None
) -> None:
    """Write a DICOM Segmentation (binary, one segment), atomically: patient, study, frame of reference and positions
    are those of the series.

    Args:
        path: of the file.
        lesion: ``[X, Y, Z]``, above 0 is lesion, on the voxels of the series as ITK reads them: column, row, slice.
        affine: 4x4, voxel to RAS mm.
        files: of the series.
        facts: settings to be kept with the algorithm, plain numbers and text.

    Raises:
        InputError: the series does not fit the mask, or lacks what a Segmentation must repeat of it.
    """
    import highdicom as hd
    import pydicom
    from pydicom.sr.codedict import codes

    images = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
    for image in images:
        for tag in _MAY_BE_EMPTY:
            if tag not in image:
                setattr(image, tag, "")
    order = slice_order(images, affine)
    if (images[0].Columns, images[0].Rows, len(order)) != lesion.shape or sorted(order) != list(range(len(order))):
        raise InputError(f"its series is not of {'x'.join(map(str, lesion.shape))} voxels")
    frames = np.stack([lesion[:, :, k].T > 0 for k in order]).astype(np.uint8)
    algorithm = hd.AlgorithmIdentificationSequence(
        "Patch2Loc for MONAI",
        codes.DCM.ArtificialIntelligence,
        bundle.__version__,
        parameters={name: str(value) for name, value in (facts or {}).items()},
    )
    segment = hd.seg.SegmentDescription(
        1,
        "Lesion candidate",
        codes.SCT.MorphologicallyAbnormalStructure,
        codes.SCT.Lesion,
        hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm,
        anatomic_regions=[codes.SCT.Brain],
    )
    # the same answer has the same names
    seeds = [images[0].SeriesInstanceUID, bundle.__version__, hashlib.sha256(frames.tobytes()).hexdigest(), str(facts)]
    try:
        segmentation = hd.seg.Segmentation(
            images,
            frames,
            hd.seg.SegmentationTypeValues.BINARY,
            [segment],
            series_instance_uid=pydicom.uid.generate_uid(entropy_srcs=["series", *seeds]),
            series_number=int(images[0].get("SeriesNumber") or 0) + 1000,
            sop_instance_uid=pydicom.uid.generate_uid(entropy_srcs=["instance", *seeds]),
            instance_number=1,
            manufacturer="Patch2Loc for MONAI",
            manufacturer_model_name="patch2loc_brain_mri",
            software_versions=bundle.__version__,
            device_serial_number="0",
            content_label="LESIONS",
            content_description="Lesion candidates; research only",
            series_description="Lesion candidates (research only)",
        )
    except (AttributeError, TypeError, ValueError, KeyError) as error:  # each has its own for a tag that is not there
        raise InputError(f"its DICOM files lack what a Segmentation must repeat ({error})") from error
    with atomic_path(path) as temporary:
        segmentation.save_as(temporary)

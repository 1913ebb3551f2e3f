"""Shared fixtures: a phantom cohort on a grid so coarse that everything takes seconds."""

from __future__ import annotations

import gc
import io
import logging
import runpy
import subprocess
import sys
import warnings
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from monai.data import MetaTensor

from bundle.data.files import release_claims
from bundle.data.phantom import make_cohort

ROOT = Path(__file__).resolve().parents[1]
GRID = {"spacing": 6.0, "spatial_size": [32, 32, 16], "patch_size": 8}
CENTER = (0.0, -17.0, 5.0)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def grid_file(tmp_path_factory) -> Path:
    """An overlay like configs/grid_2mm.yaml, for the tests' grid."""
    file = tmp_path_factory.mktemp("grid") / "grid.yaml"
    file.write_text(yaml.safe_dump({**GRID, "dense_stride": 2, "min_lesion_mm3": 0.0}))
    return file


@pytest.fixture(scope="session")
def cohort(tmp_path_factory) -> Path:
    """A prepared dataset of phantoms: 6 to train on, 2, 4 and 2 with lesions."""
    folder = tmp_path_factory.mktemp("cohort")
    subjects = {"training": 6, "validation": 2, "calibration": 4, "test": 2}
    make_cohort(folder, subjects, GRID["spacing"], GRID["spatial_size"], CENTER, radii_mm=(14.0, 20.0))
    return folder


def run_bundle(run_id: str, config: str, grid_file: Path, *overrides: str, cwd: Path = ROOT, fresh: bool = False):
    """`python -m monai.bundle run`, as a user types it; returns the finished process. ``config`` may be "one+two".

    It runs in this process, whose imports are done, unless ``fresh`` asks for a process of its own.
    """
    files = [*(f"{ROOT}/configs/{name}.json" for name in config.split("+")), str(grid_file)]
    command = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", str(files), *map(str, overrides)]
    if fresh:
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    return run_here(command, cwd)


def run_here(command: list[str], cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """``python -m MODULE ...`` in this process, with what such a process would print and its exit code; what a run
    changes in a process (its folder, hooks, handlers of logs, claims of folders) is put back.
    """
    out, err = io.StringIO(), io.StringIO()
    root = logging.getLogger()
    handlers, level, factory = root.handlers[:], root.level, logging.getLogRecordFactory()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(cwd)
        patch.setattr(sys, "argv", command[2:])
        patch.setattr(sys, "path", sys.path[:])
        patch.setattr(sys, "excepthook", sys.__excepthook__)
        warnings.resetwarnings()
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.showwarning = lambda *told: sys.stderr.write(warnings.formatwarning(*told[:4]))
        with redirect_stdout(out), redirect_stderr(err):
            try:
                runpy.run_module(command[2], run_name="__main__", alter_sys=True)
                code = 0
            except SystemExit as ended:
                code = ended.code
            except BaseException as error:
                try:
                    sys.excepthook(type(error), error, error.__traceback__)
                    code = 1
                except SystemExit as ended:
                    code = ended.code
            finally:
                release_claims()
                root.handlers[:] = handlers
                root.setLevel(level)
                logging.setLogRecordFactory(factory)
    gc.collect()
    return subprocess.CompletedProcess(command, code or 0, out.getvalue(), err.getvalue())


def meta(array, affine=None) -> MetaTensor:
    """``[X, Y, Z]`` to a float MetaTensor with a channel."""
    affine = np.eye(4) if affine is None else affine
    return MetaTensor(torch.as_tensor(np.asarray(array, np.float32))[None], affine=torch.as_tensor(affine))


def write_nifti(path: Path, array, affine=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(array, np.float32), np.eye(4) if affine is None else affine), path)
    return path


def write_dicom(folder: Path, volume: np.ndarray, affine: np.ndarray, skip: tuple[int, ...] = ()) -> Path:
    """A series of MR slices: ``volume`` ``[X, Y, Z]`` of whole numbers, ``affine`` in RAS mm; ``skip`` are missing."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    voxel = np.linalg.norm(lps[:3, :3], axis=0)
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    for k in set(range(volume.shape[2])) - set(skip):
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        file = pydicom.dataset.Dataset()
        file.file_meta = meta
        file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        file.SeriesInstanceUID, file.StudyInstanceUID, file.FrameOfReferenceUID = series, study, frame
        file.Modality, file.PatientName, file.PatientID, file.InstanceNumber = "MR", "Phantom", "1", k + 1
        file.ImagePositionPatient = [float(v) for v in (lps @ [0, 0, k, 1])[:3]]
        file.ImageOrientationPatient = [float(v) for v in (lps[:3, :2] / voxel[:2]).T.ravel()]
        file.PixelSpacing, file.SliceThickness = [float(voxel[1]), float(voxel[0])], float(voxel[2])
        file.Rows, file.Columns = volume.shape[1], volume.shape[0]
        file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, "MONOCHROME2", 0
        file.BitsAllocated, file.BitsStored, file.HighBit = 16, 16, 15
        file.PixelData = np.ascontiguousarray(volume[:, :, k].T.astype("<u2")).tobytes()
        # numbered backwards: the order is in the header, not in the names
        file.save_as(folder / f"IM{volume.shape[2] - k:04d}", enforce_file_format=True)
    return folder


def ellipsoid(shape, radii, center=None) -> np.ndarray:
    """Float mask of an ellipsoid, radii in voxels."""
    center = [(n - 1) / 2 for n in shape] if center is None else center
    grid = np.indices(shape).astype(float)
    return (sum(((g - c) / r) ** 2 for g, c, r in zip(grid, center, radii)) <= 1).astype(np.float32)


FORMATS = ("nii.gz", "nrrd", "nhdr", "mha", "mhd", "mgz", "mgh", "hdr", "zip")


def write_scan(folder: Path, name: str, ending: str, volume: np.ndarray, affine: np.ndarray) -> Path:
    """A volume ``[X, Y, Z]`` in one of the formats; Analyze has its affine in a file beside it, as of SPM."""
    import SimpleITK as sitk

    from bundle.data.atlas import to_sitk

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.{ending}"
    if ending in ("nrrd", "nhdr", "mha", "mhd"):
        sitk.WriteImage(to_sitk(meta(volume, affine)), str(path), useCompression=True)
    elif ending == "zip":
        series = write_dicom(folder / f".{name}", volume, affine)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("notes/readme.txt", "no scan")
            for file in series.iterdir():
                archive.write(file, f"study/series/{file.name}")
    else:
        kind = {"hdr": nib.Spm2AnalyzeImage, "mgz": nib.MGHImage, "mgh": nib.MGHImage}.get(ending, nib.Nifti1Image)
        nib.save(kind(np.asarray(volume, np.float32), affine), path)
    return path

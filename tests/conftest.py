"""Shared fixtures: a phantom cohort on a grid so coarse that everything takes seconds."""

from __future__ import annotations

import gc
import io
import logging
import multiprocessing
import os
import runpy
import subprocess
import sys
import warnings
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import monai
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
import yaml
from monai.data import MetaTensor

from bundle.data.files import release_claims
from bundle.data.phantom import make_cohort

ROOT = Path(__file__).resolve().parents[1]
GRID = {"spacing": 6.0, "spatial_size": [32, 32, 16], "patch_size": 8}
CENTER = (0.0, -17.0, 5.0)
DATA = ROOT.parent / "shared" / "data"  # real scans, beside the checkout and never part of it
needs_real_scans = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real scans in {DATA}")

# the longest files: begun first, so that two workers (`make test`) end at about the same time
LONG_FILES = ("test_real_mri", "test_real_heads", "test_faults", "test_runner", "test_benchmarks", "test_parallel")
LONG_FILES += ("test_alignment", "test_shards", "test_bad_input", "test_scripts", "test_package", "test_cohort")
LONG_FILES += ("test_paper", "test_fuzz")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


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


def runner_command(run_id: str, config: str, grid_file: Path, *overrides: str) -> list[str]:
    files = [*(f"{ROOT}/configs/{name}.json" for name in config.split("+")), str(grid_file)]
    return [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", str(files), *map(str, overrides)]


def run_bundle(run_id: str, config: str, grid_file: Path, *overrides: str, cwd: Path = ROOT, fresh: bool = False):
    """`python -m monai.bundle run`, as a user types it; returns the finished process. ``config`` may be "one+two".

    It runs in this process, whose imports are done, unless ``fresh`` asks for a process of its own.
    """
    command = runner_command(run_id, config, grid_file, *overrides)
    if fresh:
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    return run_here(command, cwd)


def run_here(command: list[str], cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """``python -m MODULE ...`` or ``python SCRIPT ...`` in this process, with what such a process would print and its
    exit code; what a run changes in a process (its folder, environment, hooks, seed, threads of ITK, handlers of logs,
    claims of folders) is put back.
    """
    command = [str(word) for word in command]
    is_module = command[1] == "-m"
    out, err = io.StringIO(), io.StringIO()
    root, cudnn = logging.getLogger(), torch.backends.cudnn
    handlers, level, factory = root.handlers[:], root.level, logging.getLogRecordFactory()
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ), warnings.catch_warnings():
        patch.chdir(cwd)
        patch.setattr(sys, "argv", command[1 + is_module :])
        patch.setattr(sys, "path", sys.path[:])
        patch.setattr(sys, "excepthook", sys.__excepthook__)
        patch.setattr(monai.utils.misc, "_seed", None)
        # MONAI gives a logger its stream when it is made: the next run's must be made anew
        patch.setattr(logging.root.manager, "loggerDict", logging.root.manager.loggerDict.copy())
        for name in ("deterministic", "benchmark"):
            patch.setattr(cudnn, name, getattr(cudnn, name))
        warnings.resetwarnings()
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.showwarning = lambda *told: sys.stderr.write(warnings.formatwarning(*told[:4]))
        with redirect_stdout(out), redirect_stderr(err):
            try:
                if is_module:
                    runpy.run_module(command[2], run_name="__main__", alter_sys=True)
                else:
                    sys.path.insert(0, str(Path(command[1]).parent))
                    runpy.run_path(command[1], run_name="__main__")
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
                sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    gc.collect()
    gc.freeze()  # the next search leaves out what lives now: imports above all, a quarter of a second
    return subprocess.CompletedProcess(command, code or 0, out.getvalue(), err.getvalue())


def output_of(result: subprocess.CompletedProcess) -> str:
    """What a run that has to end well said."""
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def succeed(*args, **kwargs) -> str:
    """`run_bundle`, which has to end well; what it said."""
    return output_of(run_bundle(*args, **kwargs))


@pytest.fixture(scope="session")
def models(cohort, grid_file, tmp_path_factory) -> Path:
    """A model trained for a few epochs, and its calibration; nobody changes them."""
    folder = tmp_path_factory.mktemp("models")
    use = ("--dataset_dir", cohort, "--ckpt_dir", folder)
    out = succeed("training", "train", grid_file, *use, "--max_epochs", 6, "--val_interval", 3)
    assert "localisation_error_mm" in out
    assert "calibration: 4 healthy scans" in succeed("calibration", "calibrate", grid_file, *use)
    return folder


def end_as(command: list[str]) -> None:
    """Run a command in a process that was made for it."""
    result = run_here(command)
    sys.__stderr__.write(result.stderr[-1000:] if result.returncode else "")
    os._exit(result.returncode)


@pytest.fixture(scope="session")
def launch(grid_file):
    """Start MONAI's runner in a process of its own, which can be killed; it has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest", "monai.bundle", "bundle.reports", "bundle.inference"])

    def start(run_id: str, config: str, *overrides: str):
        process = context.Process(target=end_as, args=(runner_command(run_id, config, grid_file, *overrides),))
        process.start()
        return process

    return start


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

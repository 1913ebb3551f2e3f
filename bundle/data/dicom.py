"""Reading DICOM series, from a folder or a zip: which are there, which is the scan, and of which contrast."""

from __future__ import annotations

import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from monai.data import MetaTensor

from bundle.errors import InputError

from .atlas import from_sitk
from .formats import BEST_COMPRESSION, MOST_VOXELS, is_dicom
from .itk_files import is_number

_FEWEST_SLICES = 4
# words of a series' description, and times in ms where it has none
_NO_SCAN = {"loc", "localizer", "scout", "survey", "adc", "dwi", "dti", "trace", "swi", "perf", "asl", "bold", "mip"}
_NO_SCAN |= {"pd", "post", "mra", "tof", "t2star"}
_AGENT = {"gd", "gad", "gado", "gadolinium", "ce"}
# joined to the contrast, or after it or a plus; "km" is Kontrastmittel there, and anybody's initials elsewhere
_AGENT_AFTER = re.compile(
    rf"t1w?({'|'.join(_AGENT)}|km|c)(?![a-z])|(t1w?|flair)[\W_]+(post|km)(?![a-z])|\+\s*({'|'.join(_AGENT)}|km|c|contrast)(?![a-z])"
)
_NO_SCAN_MODALITIES = {"SEG", "RTSTRUCT", "SR", "PR", "KO"}
_T1_NAMES = {"mprage", "spgr", "fspgr", "bravo", "tfl", "tfe", "mp2rage"}


def read_dicom(folder: str, contrast: str | None = None, name: str | None = None) -> MetaTensor:
    """Read a DICOM series from a folder, as ``[1, X, Y, Z]`` with its affine in RAS mm.

    Args:
        folder: with the series, and others: then the one that its description (or its times) calls ``contrast``.
        contrast: "t1", "t2" or "flair"; None takes the only one that is of any of them.
        name: that messages and ``filename_or_obj`` give to the folder.

    Raises:
        InputError: no series, or none or several that can be the one; slices missing or of different sizes; colours.
    """
    name = name or folder
    files = _choose_series(folder, contrast, name)
    if _tag(files[0], "0028|0008") not in ("", "0", "1"):
        raise InputError(f"{name}: DICOM of many frames in a file; convert it to NIfTI, with dcm2niix for example")
    try:
        gaps = np.diff(_slice_positions(files))
        image = sitk.ReadImage(files)
    except RuntimeError as error:
        raise InputError(f"{name}: its DICOM series cannot be read; is it complete?") from error
    if gaps.size and np.abs(gaps - np.median(gaps)).max() > 0.1 * abs(np.median(gaps)):
        raise InputError(
            f"{name}: slices lie {gaps.min():.2f} to {gaps.max():.2f} mm apart; some are missing or of another series"
        )
    if image.GetNumberOfComponentsPerPixel() != 1 or image.GetDimension() != 3:
        raise InputError(f"{name}: its DICOM series is not one grey-scale volume")
    scan = from_sitk(image)
    scan.meta["filename_or_obj"] = name
    described, named = _describe_series(files)
    scan.meta["named_contrast"] = named or ""
    given = _tag(files[0], "0018|0010").lower()
    scan.meta["contrast_agent"] = names_agent(described) or given not in ("", "no", "none")
    return scan


def read_dicom_zip(file: str, contrast: str | None = None) -> MetaTensor:
    """As `read_dicom`, from a zip whose DICOM files lie in any folders; other files in it are left there.

    Raises:
        InputError: as of `read_dicom`; a zip that is damaged, locked, or grows beyond what can be a scan.
    """
    with _unpacked(file) as folder:
        return read_dicom(folder, contrast, file)


@contextmanager
def dicom_files(path: str, contrast: str | None = None) -> Iterator[Sequence[str]]:
    """Files of the series that `read_dicom` or `read_dicom_zip` reads, in the order of its slices."""
    if Path(path).is_dir():
        yield _choose_series(path, contrast, path)
    else:
        with _unpacked(path) as folder:
            yield _choose_series(folder, contrast, path)


@contextmanager
def _unpacked(file: str) -> Iterator[str]:
    """A folder with the DICOM files of a zip, for a while."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(file) as archive:
                members = [m for m in archive.infolist() if not m.is_dir()]
                size = sum(m.file_size for m in members)
                if size > min(4 * MOST_VOXELS, Path(file).stat().st_size * BEST_COMPRESSION):
                    raise InputError(f"{file}: holds {size / 2**30:.0f} GiB; no scan of a head is that large")
                for number, member in enumerate(members):
                    place = Path(folder) / f"{number:06d}{'.dir' if member.filename.endswith('DICOMDIR') else ''}"
                    with archive.open(member) as source, place.open("wb") as target:
                        shutil.copyfileobj(source, target)
                    if place.suffix or not is_dicom(place):
                        place.unlink()
        except (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{file}: cannot be unpacked; is it complete, and without a password?") from error
        yield folder


def is_dicom_scan(path: str | Path) -> bool:
    """Whether what `LoadScand` was given is a DICOM series: a folder or a zip."""
    return str(path).lower().endswith(".zip") or Path(path).is_dir()


def holds_dicom(file: str | Path) -> bool:
    """Whether a zip holds DICOM files; one that cannot be looked into is taken for one, and told of when it is read."""
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if not member.is_dir():
                    with archive.open(member) as source:
                        if source.read(132)[128:] == b"DICM":
                            return True
    except (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return True
    return False


def _choose_series(folder: str, contrast: str | None, name: str) -> Sequence[str]:
    """Files of the one series of a folder, or of the one that is of the contrast, sorted by position."""
    all_series = [
        sitk.ImageSeriesReader.GetGDCMSeriesFileNames(folder, uid)
        for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(folder)
    ]
    if len(all_series) > 1:  # what was said of the scan may lie beside it
        all_series = [files for files in all_series if _tag(files[0], "0008|0060") not in _NO_SCAN_MODALITIES]
    if len(all_series) == 1:
        return all_series[0]
    if not all_series:
        raise InputError(f"{name}: holds 0 DICOM series; give a folder or zip with one")
    told = [_describe_series(files) for files in all_series]
    fitting = [files for files, (_, of) in zip(all_series, told) if of and of == (contrast or of)]
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(
        f"'{text}' ({len(files)} files, {of or 'unknown'})" for files, (text, of) in zip(all_series, told)
    )
    which = f"{len(fitting)} of them {contrast}" if contrast else "of which one must be chosen"
    raise InputError(f"{name}: holds {len(all_series)} DICOM series, {which}: {listed}; give a folder with one")


def _tag(file: str, tag: str) -> str:
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    try:
        reader.ReadImageInformation()
        return reader.GetMetaData(tag).strip()
    except RuntimeError:  # no image, or no such tag
        return ""


def study_of(folder: str | Path) -> str:
    """UID of the study that the DICOM series in a folder is of; "" where there is none."""
    first = next((file for file in sorted(Path(folder).iterdir()) if is_dicom(file)), None)
    return "" if first is None else _tag(str(first), "0020|000d")


def named_contrast(text: str) -> str | None:
    """Contrast that a name or description tells: "t1", "t2", "flair"; None for any other, or none."""
    words = _words(text)
    if words & _NO_SCAN or names_agent(text):
        return None
    if words & _T1_NAMES or any(re.match(r"t1(?!\d)", word) for word in words):
        return "t1"
    if any(word.startswith(("flair", "tirm", "dark")) for word in words):
        return "flair"
    return "t2" if any(re.match(r"t2(?!\d)", word) for word in words) else None


def names_agent(text: str) -> bool:
    """Whether a name or description tells of a contrast agent: "T1 post Gd", "t1ce", "T1w +C"."""
    return bool(_words(text) & _AGENT or _AGENT_AFTER.search(text.lower()))


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower().replace("t2*", "t2star")))


def _describe_series(files: Sequence[str]) -> tuple[str, str | None]:
    """Description of a series, and the contrast it is of: "t1", "t2", "flair", or None where it is another or no scan
    of a head.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(files[0])
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return "", None
    tags = ("0008|103e", "0018|1030", "0018|0080", "0018|0081", "0018|0082")
    text, protocol, *times = (
        reader.GetMetaData(tag).encode("utf-8", "replace").decode().strip() if reader.HasMetaDataKey(tag) else ""
        for tag in tags
    )
    told, shown = f"{text} {protocol}", " ".join((text or protocol).split())[:60]
    if (
        _words(told) & _NO_SCAN
        or names_agent(told)
        or (len(files) < _FEWEST_SLICES and reader.GetSize()[2] < _FEWEST_SLICES)
    ):
        return shown, None
    if named := named_contrast(told):
        return shown, named
    repetition, echo, inversion = (float(v) if is_number(v) else 0.0 for v in times)
    if echo >= 60:
        return shown, "flair" if inversion > 1500 else "t2" if repetition >= 2000 else None
    is_t1 = 0 < echo < 30 and (0 < inversion < 1500 or 0 < repetition < 1500)
    return shown, "t1" if is_t1 else None


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

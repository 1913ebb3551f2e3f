"""Which files can hold a scan, by their names and first bytes."""

from __future__ import annotations

from glob import escape
from pathlib import Path

_NIFTI = (".nii.gz", ".nii")
ITK_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
SCAN_ENDINGS = (*_NIFTI, *ITK_ENDINGS, ".mgz", ".mgh", ".hdr", ".img", ".zip")
SCAN_FORMATS = "NIfTI, NRRD, MetaImage, MGZ, Analyze or a zip of DICOM files"
# more voxels, as float32, would fill 8 GiB; and no compression of a scan, nor gzip itself, does better than this
MOST_VOXELS, BEST_COMPRESSION = 2**31, 1100


def is_nifti(path: str | Path) -> bool:
    return str(path).lower().endswith(_NIFTI)


def is_scan(path: str | Path) -> bool:
    """Whether a file's name says that it can be a scan, see `SCAN_FORMATS`."""
    return str(path).lower().endswith(SCAN_ENDINGS)


def analyze_pair(path: str | Path) -> tuple[Path, Path] | None:
    """Header and voxels of an Analyze (or NIfTI) pair that ``path`` is either half of; None for any other file."""
    path = Path(path)
    halves = {".hdr": ".img", ".img": ".hdr"}
    if path.suffix.lower() not in halves:
        return None
    ending = halves[path.suffix.lower()]
    other = path.with_suffix(ending.upper() if path.suffix.isupper() else ending)
    return (other, path) if ending == ".hdr" else (path, other)


def files_of(path: str | Path) -> list[Path]:
    """All files that a scan is read from: of a folder those in it; of a header whose voxels lie in another file, those
    of its name; else the file itself. Empty if there is nothing.
    """
    path = Path(path)
    if path.is_dir():
        return sorted(f for f in path.iterdir() if f.is_file())
    if path.suffix.lower() in (".hdr", ".img", ".mhd", ".nhdr"):
        return sorted(f for f in path.parent.glob(f"{escape(path.stem)}.*") if f.is_file())
    return [path] if path.exists() else []


def is_dicom(path: str | Path) -> bool:
    """Whether a file has DICOM's mark; DICOMDIR, an index without an image, does not count."""
    path = Path(path)
    if path.name.upper() == "DICOMDIR" or is_nifti(path):
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def stem(path: str | Path) -> str:
    """File name without the ending of its format."""
    name = Path(path).name
    for suffix in SCAN_ENDINGS:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name

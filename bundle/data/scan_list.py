"""Which scans a path holds: a file, a folder of files and DICOM series, a BIDS or a prepared dataset."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bundle.errors import InputError

from .bids import find_bids_scans, is_bids
from .datalist import add_maps, load_datalist
from .dicom import holds_dicom
from .files import AUTO, is_there, visible_files
from .formats import SCAN_FORMATS, analyze_pair, is_dicom, is_scan, stem
from .names import named_uniquely

# a volume whose name ends so belongs to the scan of the same name and is no scan itself
COMPANIONS = {"_brain_mask": "brain_mask", "_mask": "brain_mask", "_lesion": "label", "_seg": "label"}


def list_scans(
    path: str | Path,
    brain_mask: str | Path | None = None,
    section: str = "test",
    contrast: str | None = None,
    maps: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Scans to run inference on.

    Items say whether they are prepared: ``prepared``. Those of a list that others made are scans like any other.

    Args:
        path: a file (`SCAN_FORMATS`); a prepared dataset, of which ``section`` is taken; a BIDS dataset, see
            `find_bids_scans`; or a folder with scans in it or below: files, where NAME_brain_mask and NAME_lesion
            belong to NAME, and a file called lesion to every scan of its folder; and folders with DICOM series.
        brain_mask: mask of the scan, for a single file.
        section, contrast, maps: as in `load_datalist`; "auto" keeps all contrasts.

    Raises:
        InputError: nothing there, or a mask for many scans.
    """
    if not path:
        return []
    path = Path(path)
    if (path / "datalist.json").is_file():
        items = load_datalist(path, section, None if contrast == AUTO else contrast, maps=maps, raw=True)
    elif is_bids(path):
        items = add_maps(find_bids_scans(path, None if contrast == AUTO else contrast), maps or {})
        if not items:
            wanted = "T1w, T2w or FLAIR scan" if contrast in (None, AUTO) else f"scan of contrast '{contrast}'"
            raise InputError(f"{path}: a BIDS dataset without a {wanted} in its sub-*/anat or sub-*/ses-*/anat")
    elif path.is_dir():
        items = add_maps(_list_folder(path), maps or {})
    elif not path.exists():
        raise InputError(f"{path}: not found; --dataset_dir takes a scan, a folder of scans or a prepared dataset")
    elif is_dicom(path):
        raise InputError(f"{path}: one DICOM file; name the folder that holds its series")
    elif not is_scan(path):
        raise InputError(f"{path}: not a scan; it must be {SCAN_FORMATS}")
    else:
        items = add_maps(named_uniquely([{"image": str(path)}]), maps or {})
    if brain_mask:
        if len(items) != 1:
            raise InputError(f"{brain_mask}: one brain mask cannot serve {len(items)} scans; run them one by one")
        if not Path(brain_mask).is_file():
            raise InputError(f"{brain_mask}: brain mask not found")
        items[0]["brain_mask"] = str(brain_mask)
    return items


def _list_folder(folder: Path) -> list[dict[str, Any]]:
    files: dict[str, Path] = {}
    series: dict[Path, None] = {}
    unread: list[Path] = []
    for file in visible_files(folder):
        if file.name.lower().endswith(".seg.dcm"):
            continue
        pair = analyze_pair(file)
        is_half = pair is not None and not (is_there(pair[0]) and is_there(pair[1]))
        if is_half or not is_scan(file):
            if file.parent not in series and is_dicom(file):
                series[file.parent] = None
            elif is_half and file.parent not in series:
                unread.append(file)
            continue
        if (pair and file != pair[0]) or (file.suffix.lower() == ".zip" and not holds_dicom(file)):
            continue
        base = str(file.with_name(stem(file)))
        if base in files:
            raise InputError(f"{file}: beside {files[base].name}; keep one of the two")
        files[base] = file
    if unread:
        warnings.warn(
            f"{unread[0]}: not read, like {len(unread)} such files; an Analyze image is a .hdr and a .img file"
        )
    for base in [b for b in files if b.endswith("_heatmap")]:  # results of an earlier run are no scans
        del files[base]
        for result in ("_lesion", "_coverage"):
            files.pop(base.removesuffix("_heatmap") + result, None)
    scans: dict[str, dict[str, Any]] = {}
    companions = []
    for base, file in files.items():
        ending = next((e for e in COMPANIONS if base.endswith(e) and base.removesuffix(e) in files), None)
        if ending:
            companions.append((base.removesuffix(ending), COMPANIONS[ending], file))
        else:
            scans[base] = {"image": str(file)}
    for base in [b for b in scans if Path(b).name == "lesion"]:  # of every scan of its folder
        beside = [other for other in scans if other != base and Path(other).parent == Path(base).parent]
        if beside:
            label = Path(scans.pop(base)["image"])
            companions += [(other, "label", label) for other in beside]
    for base, key, file in companions:
        if base not in scans:
            raise InputError(f"{file}: its name says that it belongs to {Path(base).name}, which is no scan; rename it")
        scans[base].setdefault(key, str(file))
    found = [*scans.values(), *({"image": str(s.resolve())} for s in series)]
    if not found:
        raise InputError(f"{folder}: no scan in it or below; it may hold DICOM series, {SCAN_FORMATS}")
    return named_uniquely(found)

"""Which scans there are: prepared datasets (``datalist.json``), single files, folders of files, DICOM series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bundle.errors import InputError

from .files import is_dicom, is_nifti, read_json, stem, write_volume

VOLUME_KEYS = ("image", "brain_mask", "label", "anatomy_label")
# a volume whose name ends so belongs to the scan of the same name and is no scan itself
COMPANIONS = {"_brain_mask": "brain_mask", "_mask": "brain_mask", "_lesion": "label", "_seg": "label"}


def require_dataset(dataset_dir: str | Path) -> None:
    """First step of every run. Without a dataset the configs parse all the same, so that a bundle can be looked at.

    Raises:
        InputError: none was named.
    """
    if not dataset_dir:
        raise InputError("no data: name it with --dataset_dir")


def load_datalist(
    dataset_dir: str | Path, section: str, contrast: str | None = None, require: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Items of one section of a prepared dataset, with absolute paths and a unique ``name``; other keys are kept.

    Args:
        dataset_dir: folder with ``datalist.json`` (MONAI's decathlon form); an empty name gives no items.
        section: "training", "validation", "calibration" or "test".
        contrast: keep the items of this contrast and those that name none; None keeps all.
        require: keys that every item must have, besides ``image``.

    Raises:
        InputError: no such list, an empty section, an item without what it needs, a file that is not there.
    """
    if not dataset_dir:
        return []
    file = Path(dataset_dir) / "datalist.json"
    if not Path(dataset_dir).is_dir():
        raise InputError(f"{dataset_dir}: not a folder; --dataset_dir needs a prepared dataset (with datalist.json)")
    content = read_json(file, "list of the dataset")
    if not isinstance(content, dict) or not isinstance(content.get(section, []), list):
        raise InputError(f"{file}: must be an object whose '{section}' is a list of items")
    items = []
    for number, entry in enumerate(content.get(section, [])):
        where = f"{file}: item {number} of '{section}'"
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise InputError(f"{where} has no path called 'image'")
        if contrast and entry.get("contrast", contrast) != contrast:
            continue
        item = {key: value for key, value in entry.items() if value is not None}
        missing = [key for key in require if key not in item]
        if missing:
            raise InputError(f"{where} has no '{missing[0]}', which this needs")
        for key in VOLUME_KEYS:
            if key not in item:
                continue
            if not isinstance(item[key], str):
                raise InputError(f"{where}: '{key}' must be one path")
            path = Path(dataset_dir) / item[key]
            if not path.is_file():
                raise InputError(f"{path}: not found, but named as '{key}' by {where}")
            item[key] = str(path)
        items.append(item)
    if not items:
        there = {k: len(v) for k, v in content.items() if isinstance(v, list)}
        wanted = f"contrast '{contrast}' in '{section}'" if contrast else f"'{section}'"
        raise InputError(f"{file}: no item of {wanted}; it holds {there or 'no sections'}")
    return _named(items)


def write_item(
    dataset_dir: str | Path, name: str, contrast: str, volumes: Mapping[str, torch.Tensor], affine: Any
) -> dict[str, Any]:
    """Write the volumes of a prepared item, the image as float32 and masks as bytes, and return its entry for
    ``datalist.json``.

    Args:
        dataset_dir: of the dataset.
        name: of the subject; each volume KEY goes to ``KEYs/NAME.nii.gz``.
        contrast: of the image.
        volumes: key -> ``[1, X, Y, Z]``, all on one grid.
        affine: of that grid.
    """
    item: dict[str, Any] = {"subject": name, "contrast": contrast}
    for key, volume in volumes.items():
        item[key] = f"{key}s/{name}.nii.gz"
        array = volume[0].cpu().numpy()
        write_volume(Path(dataset_dir) / item[key], array.astype(np.float32 if key == "image" else np.uint8), affine)
    return item


def list_scans(
    path: str | Path, brain_mask: str | Path | None = None, section: str = "test", contrast: str | None = None
) -> list[dict[str, Any]]:
    """Scans to run inference on.

    Items of a prepared dataset say so: ``prepared`` is true.

    Args:
        path: a NIfTI file; a prepared dataset, of which ``section`` is taken; or a folder with scans in it or below:
            NIfTI files, where NAME_brain_mask and NAME_lesion belong to NAME, and folders with a DICOM series each.
        brain_mask: mask of the scan, for a single file.
        section, contrast: as in `load_datalist`.

    Raises:
        InputError: nothing there, or a mask for many scans.
    """
    if not path:
        return []
    path = Path(path)
    if (path / "datalist.json").is_file():
        items = [{**item, "prepared": True} for item in load_datalist(path, section, contrast)]
    elif path.is_dir():
        items = _list_folder(path)
    elif not path.exists():
        raise InputError(f"{path}: not found; --dataset_dir takes a scan, a folder of scans or a prepared dataset")
    elif is_dicom(path):
        raise InputError(f"{path}: one DICOM file; name the folder that holds its series")
    elif not is_nifti(path):
        raise InputError(f"{path}: not a NIfTI file (.nii, .nii.gz)")
    else:
        items = _named([{"image": str(path)}])
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
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if hidden or not file.is_file():
            continue
        if not is_nifti(file):
            if file.parent not in series and is_dicom(file):
                series[file.parent] = None
            continue
        base = str(file.with_name(stem(file)))
        if base in files:
            raise InputError(f"{file}: beside {files[base].name}; keep one of the two")
        files[base] = file
    for base in [b for b in files if b.endswith("_heatmap")]:  # results of an earlier run are no scans
        del files[base]
        files.pop(base.removesuffix("_heatmap") + "_lesion", None)
    scans: dict[str, dict[str, Any]] = {}
    companions = []
    for base, file in files.items():
        ending = next((e for e in COMPANIONS if base.endswith(e) and base.removesuffix(e) in files), None)
        if ending:
            companions.append((base.removesuffix(ending), COMPANIONS[ending], file))
        else:
            scans[base] = {"image": str(file)}
    for base, key, file in companions:
        scans[base].setdefault(key, str(file))
    found = [*scans.values(), *({"image": str(s.resolve())} for s in series)]
    if not found:
        raise InputError(f"{folder}: no NIfTI file (.nii, .nii.gz) and no DICOM series in it or below")
    return _named(found)


def _named(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give each item a unique ``name``: its file's, with folders in front as far as needed to tell scans apart."""
    for depth in range(1, 20):
        names = ["_".join([*Path(i["image"]).parts[-depth:-1], stem(i["image"])]) for i in items]
        if len(set(names)) == len(names):
            return [{**item, "name": name} for item, name in zip(items, names)]
    raise InputError(f"{items[0]['image']}: named twice in one dataset")

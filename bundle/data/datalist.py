"""Which scans there are: prepared datasets (``datalist.json``), single files, folders of files, DICOM series."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bundle.errors import InputError

from .bids import find_bids_scans, is_bids
from .files import AUTO, SCAN_FORMATS, analyze_pair, is_dicom, is_scan, is_there, read_json, stem, write_volume
from .formats import holds_dicom

# Version of what stands between a file and the networks: mask, alignment, grid, bias field, intensities. Data that were
# prepared, and models that were trained, by another are refused.
CHAIN = 3
VOLUME_KEYS = ("image", "brain_mask", "label", "anatomy_label")
_KNOWN_KEYS = {*VOLUME_KEYS, "subject", "person", "contrast", "to_atlas", "ignored_labels", "source", "fusion_maps"}
_KNOWN_KEYS |= {"atlas_overlap", "flags", "purpose", "volume_ml", "name", "chain", "prepared", "not_examined"}
_LONGEST_NAME = 150  # bytes; names of results are longer, and file systems take 255
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
    dataset_dir: str | Path,
    section: str,
    contrast: str | None = None,
    require: Sequence[str] = (),
    maps: Mapping[str, str] | None = None,
    raw: bool = False,
) -> list[dict[str, Any]]:
    """Items of one section of a prepared dataset, with absolute paths, a unique ``name`` and ``prepared`` (bool); other
    keys are kept.

    Prepared is what our preparation says it wrote (``chain``), and what others say of their items (``prepared``).

    Args:
        dataset_dir: folder with ``datalist.json`` (MONAI's decathlon form); an empty name gives no items.
        section: "training", "validation", "calibration" or "test".
        contrast: keep the items of this contrast and those that name none; None keeps all.
        require: keys that every item must have, besides ``image``.
        maps: other methods' maps to add to each item, see `add_maps`.
        raw: take items that are not prepared, too.

    Raises:
        InputError: no such list, an empty section, an item without what it needs, a file that is not there; items that
            are not prepared, or were by an older version.
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
    unknown: set[str] = set()
    for number, entry in enumerate(content.get(section, [])):
        where = f"{file}: item {number} of '{section}'"
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise InputError(f"{where} has no path called 'image'")
        for key in ("contrast", "subject", "person"):
            if not isinstance(entry.get(key) or "", str):
                raise InputError(f"{where}: '{key}' must be text, not {json.dumps(entry[key])[:40]}")
        if contrast and entry.get("contrast", contrast) != contrast:
            continue
        unknown |= set(entry) - _KNOWN_KEYS
        item = {key: value for key, value in entry.items() if value is not None}
        item["prepared"] = _is_prepared(item, file)
        if not (item["prepared"] or raw):
            raise InputError(
                f"{where} is not prepared; run the preparation on its scans, or, if it lies skull-stripped and without "
                'shading in the atlas\' space, add "prepared": true to it'
            )
        missing = [key for key in require if key not in item]
        if missing:
            raise InputError(f"{where} has no '{missing[0]}', which this needs")
        for key in VOLUME_KEYS:
            if key not in item:
                continue
            if not isinstance(item[key], str):
                raise InputError(f"{where}: '{key}' must be one path")
            path = Path(dataset_dir) / item[key]
            if not is_there(path):
                raise InputError(f"{path}: not found, but named as '{key}' by {where}")
            item[key] = str(path)
        if "to_atlas" in item:  # arrays pass a data loader whole, lists come out in pieces
            item["to_atlas"] = _numbers(item["to_atlas"], (4, 4), f"{where}: 'to_atlas' must be a 4x4 matrix")
        if "ignored_labels" in item:
            given = item["ignored_labels"]
            length = (len(given) if isinstance(given, list) else 0,)
            item["ignored_labels"] = _numbers(given, length, f"{where}: 'ignored_labels' must be a list of numbers")
        if isinstance(item.get("source"), dict):  # others use the word for other things
            item["source"] = {key: str(Path(dataset_dir) / str(file)) for key, file in item["source"].items()}
        else:
            item.pop("source", None)
        given = item.get("fusion_maps", {})
        if not isinstance(given, dict) or not all(isinstance(file, str) for file in given.values()):
            raise InputError(f"{where}: 'fusion_maps' must give a path for each name of a map")
        item["fusion_maps"] = {name: str(Path(dataset_dir) / file) for name, file in given.items()}
        items.append(item)
    if not items:
        there = {k: len(v) for k, v in content.items() if isinstance(v, list)}
        wanted = f"contrast '{contrast}' in '{section}'" if contrast else f"'{section}'"
        raise InputError(f"{file}: no item of {wanted}; it holds {there or 'no sections'}")
    for key in sorted(unknown):
        close = difflib.get_close_matches(key, _KNOWN_KEYS, 1, 0.75)
        warnings.warn(f"{file}: unknown key '{key}', not used" + (f"; did you mean '{close[0]}'?" if close else ""))
    return add_maps(named_uniquely(items), maps or {})


def _is_prepared(item: Mapping[str, Any], file: Path) -> bool:
    """Whether an item has been through the chain; `InputError` if it was an older one."""
    if item.get("chain") == CHAIN or (item.get("prepared") is True and "chain" not in item):
        return True
    if "chain" in item or {"atlas_overlap", "to_atlas"} & set(item):
        raise InputError(f"{file}: prepared by an older version; run the preparation again, into a new folder")
    return False


def _numbers(given: Any, shape: tuple[int, ...], problem: str) -> np.ndarray:
    try:
        numbers = np.array(given, float)
    except (TypeError, ValueError) as error:
        raise InputError(problem) from error
    if numbers.shape != shape or not np.isfinite(numbers).all():
        raise InputError(problem)
    return numbers


def add_maps(items: list[dict[str, Any]], maps: Mapping[str, str]) -> list[dict[str, Any]]:
    """Items with the path of another method's map under each name in ``maps``.

    Args:
        items: with a ``name`` each; one may list its own files in ``fusion_maps`` (name of the map -> path).
        maps: name of the map -> folder with a file ``NAME.nii.gz`` (or ``.nii``) for each scan NAME, on the scan's
            voxels; an empty folder's name stands for the items' own lists.

    Raises:
        InputError: a scan has no such file.
    """
    added = []
    for item in items:
        own = item.get("fusion_maps", {})
        item = {key: value for key, value in item.items() if key != "fusion_maps"}
        for name, folder in maps.items():
            places = [Path(folder) / f"{item['name']}{ending}" for ending in (".nii.gz", ".nii")] if folder else []
            found = next((p for p in ([Path(own[name])] if name in own else []) + places if is_there(p)), None)
            if found is None:
                wanted = own.get(name) or (str(places[0]) if places else "'fusion_maps' of its item in datalist.json")
                raise InputError(f"{item['image']}: its map '{name}' is not there ({wanted})")
            item[name] = str(found)
        added.append(item)
    return added


def evaluation_items(
    dataset_dir: str | Path,
    section: str,
    contrast: str,
    tuning_section: str = "tuning",
    healthy_dir: str | Path = "",
    healthy_section: str = "validation",
    maps: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """What an evaluation looks at, each item with its ``purpose``.

    "test": the scans with lesions that the figures are about. "tuning": others with lesions, on which a threshold may
    be chosen, if the dataset has such a section. "healthy": scans of healthy people, in which every finding is false.

    Args:
        dataset_dir, section, contrast, maps: see `load_datalist`.
        tuning_section: left out where the dataset has none, or where it is what is tested.
        healthy_dir, healthy_section: another prepared dataset; an empty name gives none.

    Raises:
        InputError: as of `load_datalist`; a test or tuning item without a label.
    """
    parts = [("test", load_datalist(dataset_dir, section, contrast, ["label"], maps))]
    content = read_json(Path(dataset_dir) / "datalist.json", "list of the dataset") if dataset_dir else {}
    others = content.get(tuning_section) if tuning_section != section else None
    others = [i for i in others if isinstance(i, dict)] if isinstance(others, list) else []
    if any(i.get("contrast", contrast) == contrast for i in others):
        parts.append(("tuning", load_datalist(dataset_dir, tuning_section, contrast, ["label"], maps)))
    parts.append(("healthy", load_datalist(healthy_dir, healthy_section, contrast, maps=maps)))
    return [{**item, "purpose": purpose} for purpose, items in parts for item in items]


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

    Raises:
        InputError: the name is a path.
    """
    if Path(name).name != name:
        raise InputError(f"subject '{name}': cannot be the name of a file")
    item: dict[str, Any] = {"subject": name, "contrast": contrast, "chain": CHAIN}
    for key, volume in volumes.items():
        item[key] = f"{key}s/{name}.nii.gz"
        array = volume[0].cpu().numpy()
        write_volume(Path(dataset_dir) / item[key], array.astype(np.float32 if key == "image" else np.uint8), affine)
    return item


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


def _visible_files(folder: Path) -> list[Path]:
    """Files in a folder and below, sorted, but hidden ones; links to folders are followed once, and links that lead
    nowhere count as files.
    """
    found: list[Path] = []
    visited: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place) / name for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.is_file() or file.is_symlink())


def _list_folder(folder: Path) -> list[dict[str, Any]]:
    files: dict[str, Path] = {}
    series: dict[Path, None] = {}
    unread: list[Path] = []
    for file in _visible_files(folder):
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


def named_uniquely(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give each item a unique ``name``: its file's, with folders in front as far as needed to tell scans apart."""
    for depth in range(1, 20):
        names = [_printable("_".join([*Path(i["image"]).parts[-depth:-1], stem(i["image"])])) for i in items]
        if len(set(names)) == len(names):
            return [{**item, "name": name} for item, name in zip(items, names)]
    raise InputError(f"{items[0]['image']}: named twice in one dataset")


def _printable(name: str) -> str:
    """A name that can be written to a table and be a part of a file's: bytes that are no UTF-8, as of old archives, are
    replaced, and what is too long is cut and told apart by a hash.
    """
    raw = os.fsencode(name)
    digest = hashlib.sha256(raw).hexdigest()[:8]
    text = raw.decode("utf-8", "replace")
    if len(text.encode()) > _LONGEST_NAME:
        text = text.encode()[:_LONGEST_NAME].decode("utf-8", "ignore")
    return text if text.encode() == raw else f"{text}_{digest}"

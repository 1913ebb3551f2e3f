"""``datalist.json``: the list of a prepared dataset, checked when it is read."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bundle.errors import InputError

from .files import is_there, read_json
from .names import named_uniquely
from .volumes import write_volume

# Version of what stands between a file and the networks: mask, alignment, grid, bias field, intensities. Data that were
# prepared, and models that were trained, by another are refused.
CHAIN = 3
SECTIONS = ("training", "validation", "calibration", "tuning", "test")
VOLUME_KEYS = ("image", "brain_mask", "label", "anatomy_label")
_KNOWN_KEYS = {*VOLUME_KEYS, "subject", "person", "contrast", "to_atlas", "ignored_labels", "source", "fusion_maps"}
_KNOWN_KEYS |= {"atlas_overlap", "flags", "purpose", "volume_ml", "name", "chain", "prepared", "not_examined"}


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
    _tell_of_others(file, content, section, {str(Path(item["image"])) for item in items})
    for key in sorted(unknown):
        close = difflib.get_close_matches(key, _KNOWN_KEYS, 1, 0.75)
        warnings.warn(f"{file}: unknown key '{key}', not used" + (f"; did you mean '{close[0]}'?" if close else ""))
    return add_maps(named_uniquely(items), maps or {})


def _tell_of_others(file: Path, content: Mapping[str, Any], section: str, images: set[str]) -> None:
    """Warn of images that are in another section, too."""
    for other in SECTIONS:
        listed = content.get(other) if other != section else []
        items = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
        named = [item["image"] for item in items if isinstance(item.get("image"), str)]
        both = len(images & {str(file.parent / image) for image in named})
        if both:
            warnings.warn(
                f"{file}: {both} of the images of '{section}' are in '{other}', too; what is trained or chosen on the "
                "one says nothing of the other"
            )


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

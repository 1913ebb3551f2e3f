"""From a cohort as it was downloaded to a prepared dataset."""

from __future__ import annotations

import multiprocessing
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
import yaml
from tqdm import tqdm

from bundle.errors import InputError, explain

from .atlas import atlas_overlap, load_atlas
from .datalist import VOLUME_KEYS
from .files import read_json, write_json, write_volume

SECTIONS = ("training", "validation", "calibration", "test")


@dataclass(frozen=True)
class Recipe:
    """How a cohort lies on disk: read from ``configs/datasets/NAME.yaml``.

    Paths are patterns relative to the source folder, in which ``{subject}`` stands for one path part or a piece of it.

    Attributes:
        images: contrast -> pattern.
        brain_mask, label: patterns, optional.
        close_mm: radius by which the mask is closed (for label maps of tissue), mm.
        alignment: "affine" or "none" (already in atlas space).
        person: regular expression on the subject; what it matches tells people apart, so that rescans of one stay
            together. Default: the subject itself.
        splits: section -> number of people, or "rest".
    """

    images: dict[str, str]
    brain_mask: str | None = None
    label: str | None = None
    close_mm: float = 0.0
    alignment: str = "affine"
    person: str = ".*"
    splits: dict[str, int | str] = field(default_factory=lambda: {"test": "rest"})


def load_recipe(folder: str | Path, name: str) -> Recipe:
    """Read the recipe ``name`` from ``folder``.

    Raises:
        InputError: no such recipe, or unknown entries in it.
    """
    file = Path(folder) / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(f.stem for f in Path(folder).glob("*.yaml")))
        raise InputError(f"dataset '{name}' has no recipe {file}; there are: {known}")
    content = yaml.safe_load(file.read_text())
    unknown = set(content) - {f.name for f in fields(Recipe)}
    if unknown or "images" not in content:
        raise InputError(f"{file}: unknown entries {sorted(unknown)} or no 'images'")
    if set(content.get("splits", {})) - set(SECTIONS):
        raise InputError(f"{file}: splits may be {', '.join(SECTIONS)}")
    return Recipe(**content)


def find_scans(recipe: Recipe, source_dir: str | Path) -> list[dict[str, str]]:
    """Scans of a cohort: dictionaries with ``subject``, ``contrast``, ``image`` and, where they exist, ``brain_mask``
    and ``label`` (absolute paths), sorted by subject.

    Raises:
        InputError: nothing matches, or more than one file where one belongs.
    """
    source = Path(source_dir)
    scans: list[dict[str, str]] = []
    for contrast, pattern in recipe.images.items():
        expression = re.escape(pattern).replace(re.escape("{subject}"), "(?P<subject>[^/]+)", 1)
        expression = expression.replace(re.escape("{subject}"), "(?P=subject)").replace(re.escape("*"), "[^/]*")
        for file in source.glob(pattern.replace("{subject}", "*")):
            match = re.fullmatch(expression, file.relative_to(source).as_posix())
            if match is None:
                continue
            scan = {"subject": match["subject"], "contrast": contrast, "image": str(file)}
            for key in ("brain_mask", "label"):
                companion = getattr(recipe, key)
                found = sorted(source.glob(companion.replace("{subject}", match["subject"]))) if companion else []
                if len(found) > 1:
                    raise InputError(f"{found[0]}: one of {len(found)} files for '{key}' of {match['subject']}")
                if found:
                    scan[key] = str(found[0])
            if any((s["subject"], s["contrast"]) == (scan["subject"], contrast) for s in scans):
                raise InputError(
                    f"{file}: a second {contrast} scan of {scan['subject']}; tell them apart in the recipe"
                )
            scans.append(scan)
    if not scans:
        raise InputError(f"{source_dir}: nothing matches {' or '.join(recipe.images.values())}")
    return sorted(scans, key=lambda s: (s["subject"], s["contrast"]))


def split_subjects(recipe: Recipe, subjects: list[str], seed: int = 0) -> dict[str, str]:
    """Section of each subject: people are shuffled by ``seed`` and dealt out by the recipe's numbers.

    Raises:
        InputError: fewer people than the recipe asks for.
    """
    person = {s: (re.search(recipe.person, s) or [s])[0] for s in subjects}
    people = sorted(set(person.values()))
    np.random.RandomState(seed).shuffle(people)
    fixed = {k: n for k, n in recipe.splits.items() if isinstance(n, int)}
    if sum(fixed.values()) > len(people):
        raise InputError(f"the recipe's splits {recipe.splits} need more than the {len(people)} people found")
    rest = next((k for k, n in recipe.splits.items() if not isinstance(n, int)), None)
    section: dict[str, str] = {}
    for name, number in fixed.items():
        section.update(dict.fromkeys(people[:number], name))
        people = people[number:]
    if rest:
        section.update(dict.fromkeys(people, rest))
    return {s: section[person[s]] for s in subjects if person[s] in section}


def prepare_scan(scan: dict[str, str], preprocessing: Callable, dataset_dir: str | Path) -> dict[str, Any]:
    """Run one scan through the chain, save it, and return its item for ``datalist.json``.

    The item also tells ``atlas_overlap``: Dice of its brain mask and the atlas' on the grid, 1 is perfect.
    Its record is written last: where that exists, the scan is done and not touched again.
    """
    folder = Path(dataset_dir)
    name = f"{scan['subject']}_{scan['contrast']}"
    record = folder / "records" / f"{name}.json"
    if record.is_file():
        return read_json(record, "record of a prepared scan")
    data = preprocessing({key: scan[key] for key in VOLUME_KEYS if key in scan})
    overlap = atlas_overlap(data["brain_mask"], load_atlas())
    item: dict[str, Any] = {key: f"{key}s/{name}.nii.gz" for key in VOLUME_KEYS if key in data}
    for key, file in item.items():
        dtype = np.float32 if key == "image" else np.uint8
        write_volume(folder / file, data[key][0].numpy().astype(dtype), data[key].affine)
    item.update(subject=scan["subject"], contrast=scan["contrast"], atlas_overlap=round(overlap, 4))
    write_json(record, item)
    return item


_preprocessing: Callable = dict  # of the worker process


def _set_up_worker(preprocessing: Callable) -> None:
    # one thread per worker: two processes with two threads each would only get in each other's way
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    global _preprocessing
    _preprocessing = preprocessing


def _work(scan: dict[str, str], dataset_dir: str) -> tuple[dict[str, Any] | None, str]:
    try:
        return prepare_scan(scan, _preprocessing, dataset_dir), ""
    except Exception as error:  # one broken scan must not stop the others; it is told at the end
        return None, explain(error)


def prepare_cohort(
    recipe: Recipe,
    source_dir: str | Path,
    dataset_dir: str | Path,
    preprocessing: Callable,
    seed: int = 0,
    num_workers: int = 2,
) -> Path:
    """Turn a cohort into a prepared dataset: volumes on the atlas grid and ``datalist.json``. Resumable.

    Args:
        recipe: how the cohort lies on disk.
        source_dir: where; never written to.
        dataset_dir: result; what is there already is kept.
        preprocessing: the chain, from files to ``image``, ``brain_mask`` and ``label`` on the grid.
        seed: of the split.
        num_workers: processes.

    Returns:
        the ``datalist.json`` written.

    Raises:
        InputError: nothing found; or, with exit code 3 and after the others are done, scans that failed.
    """
    if not source_dir or not dataset_dir:
        raise InputError("name the cohort with --source_dir and the result with --dataset_dir")
    scans = find_scans(recipe, source_dir)
    section = split_subjects(recipe, sorted({s["subject"] for s in scans}), seed)
    scans = [s for s in scans if s["subject"] in section]
    datalist: dict[str, list[dict[str, Any]]] = {name: [] for name in SECTIONS}
    failures: list[str] = []
    with ProcessPoolExecutor(
        max(1, num_workers), multiprocessing.get_context("spawn"), _set_up_worker, (preprocessing,)
    ) as pool:
        futures = {pool.submit(_work, scan, str(dataset_dir)): scan for scan in scans}
        for future in tqdm(as_completed(futures), total=len(futures), desc="preparing", unit="scan", file=sys.stdout):
            item, failure = future.result()
            if item is None:
                failures.append(f"{futures[future]['image']}: {failure}")
            else:
                datalist[section[item["subject"]]].append(item)
    for items in datalist.values():
        items.sort(key=lambda i: i["image"])
    overlaps = [i["atlas_overlap"] for items in datalist.values() for i in items]
    file = Path(dataset_dir) / "datalist.json"
    write_json(file, {name: items for name, items in datalist.items() if items})
    print(f"{file}: " + ", ".join(f"{len(items)} {name}" for name, items in datalist.items() if items))
    if overlaps:
        print(
            f"overlap of the brains with the atlas (Dice): median {np.median(overlaps):.3f}, least {min(overlaps):.3f}"
        )
    if failures:
        raise InputError("; ".join([f"{len(failures)} of {len(scans)} scans failed", *failures]), exit_code=3)
    return file

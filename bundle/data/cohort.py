"""All scans of a cohort, as it was downloaded, to a prepared dataset."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from tqdm import tqdm

from bundle.errors import InputError, explain
from bundle.parallel import Shard

from .datalist import SECTIONS, VOLUME_KEYS
from .discovery import find_scans
from .files import claim_folder, read_json, write_json
from .preparation import Preparation
from .recipe import Recipe
from .splits import listed_sections, split_people

_prepare: Callable = dict  # of the worker process


def _follow_parent() -> None:
    """End this worker with the process that started it, however that one ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _set_up_worker(prepare: Preparation) -> None:
    threading.Thread(target=_follow_parent, daemon=True).start()
    # one thread per worker: two processes with two threads each would only get in each other's way
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    global _prepare
    _prepare = prepare


def _work(scan: dict[str, str]) -> str:
    try:
        _prepare(scan)
        return ""
    except Exception as error:  # one broken scan must not stop the others; it is told at the end
        return explain(error)


def prepare_cohort(
    recipe: Recipe,
    source_dir: str | Path,
    dataset_dir: str | Path,
    preprocessing: Callable,
    settings: Mapping[str, Any] | None = None,
    draw_alignment: Callable | None = None,
    draw_contact_sheet: Callable | None = None,
    atlas: str | None = None,
    seed: int = 0,
    num_workers: int = 2,
    record: Callable | None = None,
    splits_file: str | Path = "",
    dataset: str = "",
    fold: int = 0,
    shard: str = "",
) -> Path:
    """Turn a cohort into a prepared dataset: volumes on the atlas grid, ``datalist.json`` and, in ``qc``, a sheet per
    scan and ``contact_sheet.png``, the worst aligned scans first. Resumable.

    Args:
        recipe: how the cohort lies on disk.
        source_dir: where; never written to.
        dataset_dir: result; what is there already, from the same files and settings, is kept.
        preprocessing, settings, draw_alignment, atlas: see `Preparation`.
        draw_contact_sheet: called with the sheets' paths and the path to write; None draws none.
        seed: of the split; who has a section by the list of an earlier run keeps it.
        num_workers: processes; 0 takes this one, which a task with one core should.
        record: called with the folder and "preparation" before the work, see `bundle.command_line.record_run`.
        splits_file, dataset, fold: lists of people, which take the place of the recipe's splits; see `read_splits`.
        shard: part of the scans to do (`bundle.parallel.Shard`); whichever is done last writes the list of all.

    Returns:
        the ``datalist.json`` of the dataset.

    Raises:
        InputError: nothing found; or, with exit code 3 and after the others are done, scans that failed.
    """
    part = Shard.of(shard)
    if not source_dir or not dataset_dir:
        raise InputError("name the cohort with --source_dir and the result with --dataset_dir")
    if not Path(source_dir).is_dir():
        raise InputError(f"{source_dir}: not a folder; --source_dir needs the cohort as it was downloaded")
    folder = Path(dataset_dir)
    if folder.resolve().is_relative_to(Path(source_dir).resolve()):
        raise InputError(f"{dataset_dir}: lies in the source folder {source_dir}; choose a folder elsewhere")
    scans = find_scans(recipe, source_dir)
    people = [s["person"] for s in scans]
    if splits_file:
        section = listed_sections(splits_file, dataset, recipe, people, fold)
    else:
        section = {s["person"]: s["section"] for s in scans if "section" in s}
        section = section or split_people(recipe, people, seed, _dealt_before(folder / "datalist.json", scans))
    scans = [s for s in scans if s["person"] in section]
    told = ", ".join(f"{sum(key in s for s in scans)} with a {key}" for key in VOLUME_KEYS[1:] if getattr(recipe, key))
    print(f"{source_dir}: {len(scans)} scans" + (f", {told}" if told else ""), flush=True)
    claim_folder(folder, part)
    _require_own_list(folder, Path(source_dir))
    if record:
        record(folder, "preparation")
    settings = {**(settings or {}), "alignment": recipe.alignment, "close_mm": recipe.close_mm}
    prepare = Preparation(folder, preprocessing, settings, draw_alignment, atlas)
    ours = part.share(scans)
    failures = [f"{s['image']}: {s['problem']}" for s in ours if "problem" in s]
    with (
        ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _set_up_worker, (prepare,))
        if num_workers > 0
        else ThreadPoolExecutor(1, initializer=_set_up_worker, initargs=(prepare,))
    ) as pool:
        futures = {pool.submit(_work, scan): scan for scan in ours if "problem" not in scan}
        for future in tqdm(as_completed(futures), total=len(futures), desc="preparing", unit="scan", file=sys.stdout):
            scan = futures[future]
            try:
                failure = future.result()
            except BrokenProcessPool:
                failure = "its process was killed (out of memory?); run again with --num_workers 1"
            if failure:
                prepare.fail(scan, failure)
                failures.append(f"{scan['image']}: {failure}")
    known = [(scan, prepare.record(scan)) for scan in scans if "problem" not in scan]
    changed = [scan for scan, record in known if not record and scan in ours]
    failures += [f"{scan['image']}: was changed while it was prepared; run again" for scan in changed]
    left, file = sum(not record for _, record in known), folder / "datalist.json"
    if left and part:
        print(f"shard {part} is done; {left} of {len(scans)} scans are left to others, the last of whom writes {file}")
    else:
        items = [(section[scan["person"]], record["item"]) for scan, record in known if "item" in record]
        _write_datalist(file, items, recipe.ignored_labels, draw_contact_sheet)
    if failures:
        raise InputError("; ".join([f"{len(failures)} of {len(ours)} scans failed", *failures]), exit_code=3)
    return file


def _dealt_before(file: Path, scans: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Person -> section by the list of an earlier run; of somebody who is in two by now, as a recipe may tell people
    otherwise than before, none.
    """
    content = read_json(file, "list of a dataset") if file.is_file() else {}
    person_of = {scan["subject"]: scan["person"] for scan in scans}
    sections: dict[str, set[str]] = {}
    for section, items in content.items() if isinstance(content, dict) else ():
        for item in items if isinstance(items, list) else ():
            if isinstance(item, dict) and item.get("subject") in person_of:
                sections.setdefault(person_of[item["subject"]], set()).add(section)
    return {person: found.pop() for person, found in sections.items() if len(found) == 1}


def _require_own_list(folder: Path, source_dir: Path) -> None:
    """Refuse to replace a list of scans that do not come from ``source_dir``."""
    file = folder / "datalist.json"
    if not file.is_file():
        return
    content = read_json(file, "list of a dataset")
    try:
        origins = [item["source"]["image"] for items in content.values() for item in items]
    except (AttributeError, KeyError, TypeError):  # a list that others made
        origins = ["/"]
    # as the paths are written, too: scans may be links to elsewhere
    forms = (os.path.abspath, os.path.realpath)
    if not all(
        any(Path(form(folder / origin)).is_relative_to(form(source_dir)) for form in forms) for origin in origins
    ):
        raise InputError(
            f"{file}: lists scans that are not of {source_dir}; choose another --dataset_dir, or remove it"
        )


def _drop_duplicates(datalist: dict[str, list[dict[str, Any]]]) -> None:
    """Keep one of the scans that hold the same image under several names, as public lists do, and tell of the others:
    nobody is trained on and tested, or counted twice. Patients stay rather than what is trained on.
    """
    first: dict[str, str] = {}
    for section in reversed(SECTIONS):
        kept = []
        for item in datalist[section]:
            name = f"{item['subject']} ({item['contrast']})"
            other = first.setdefault(item.pop("content"), name)
            if other == name:
                kept.append(item)
            else:
                print(f"{name}, of '{section}', is the same image as {other}: left out")
        datalist[section] = kept


def _write_datalist(
    file: Path,
    prepared: Iterable[tuple[str, dict[str, Any]]],
    ignored_labels: list[int],
    draw_contact_sheet: Callable | None,
) -> None:
    """Make the list of (section, item) of all scans, and the contact sheet; tell what there is."""
    folder = file.parent
    datalist: dict[str, list[dict[str, Any]]] = {name: [] for name in SECTIONS}
    for section, item in prepared:
        if "label" in item and ignored_labels:
            item["ignored_labels"] = ignored_labels
        datalist[section].append(item)
    for items in datalist.values():
        items.sort(key=lambda i: i["image"])
    _drop_duplicates(datalist)
    everyone = sorted((i for items in datalist.values() for i in items), key=lambda i: i["atlas_overlap"])
    write_json(file, {name: items for name, items in datalist.items() if items})
    print(f"{file}: " + ", ".join(f"{len(items)} {name}" for name, items in datalist.items() if items))
    if everyone:
        overlaps = [i["atlas_overlap"] for i in everyone]
        print(
            f"overlap of the brains with the atlas (Dice): median {np.median(overlaps):.3f}, least {min(overlaps):.3f}"
        )
        if draw_contact_sheet:
            sheet = folder / "qc" / "contact_sheet.png"
            sheets = [folder / "qc" / f"{i['subject']}_{i['contrast']}.png" for i in everyone]
            draw_contact_sheet([f for f in sheets if f.is_file()], sheet)
            print(f"{sheet}: look at it before training; the worst aligned scans come first")
    for item in everyone:
        if "flags" in item:
            print(f"{item['subject']} ({item['contrast']}): flagged: {item['flags']}")

"""From a cohort as it was downloaded to a prepared dataset."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
import yaml
from monai.transforms import ResampleToMatch
from tqdm import tqdm

from bundle.errors import InputError, explain
from bundle.parallel import Shard

from .atlas import atlas_overlap, contrast_doubt, load_atlas
from .bids import find_bids_scans
from .datalist import CHAIN, VOLUME_KEYS
from .files import claim_folder, read_json, write_json, write_volume
from .own_volume import scan_to_atlas
from .splits import read_splits

SECTIONS = ("training", "validation", "calibration", "tuning", "test")
# of the items that are written; part of what a prepared scan was made from
_FORMAT = [CHAIN, 1]


@dataclass(frozen=True)
class Recipe:
    """How a cohort lies on disk: read from ``configs/datasets/NAME.yaml``.

    Patterns are paths relative to the source folder, of any case: ``{subject}`` and ``{session}`` stand for one path
    part or a piece of it, ``*`` for anything but ``/``, ``**/`` for any folders or none. Where a list is given, a file
    may match any of them. A pattern that ends in ``/`` names folders with a DICOM series each. ``{section}`` stands for
    the section that a scan belongs to, where the folders say so; nobody is dealt out then.

    Attributes:
        images: contrast -> pattern, or a list; in a BIDS dataset, contrast -> its suffix.
        bids: the images are those of a BIDS dataset, see `bundle.data.bids.find_bids_scans`; ``{subject}`` and
            ``{session}`` of the other patterns are "sub-01" and "ses-1" then.
        brain_mask, label, anatomy_label: patterns, or lists; optional. The last is a label map of healthy anatomy, from
            which other contrasts are made (`bundle.synthesis`).
        close_mm: radius by which the mask is closed (for label maps of tissue), mm.
        alignment: "affine" or "none" (already in atlas space).
        ignored_labels: values of the label that are neither lesion nor healthy: left out when methods are scored.
        person: regular expression on the subject; what it matches tells people apart, so that rescans of one stay
            together. Default: all of ``{subject}``, without the session.
        splits: section -> number of people, or "rest". "tuning" are patients on whom thresholds may be chosen.
    """

    images: dict[str, str | list[str]]
    brain_mask: str | list[str] | None = None
    label: str | list[str] | None = None
    anatomy_label: str | list[str] | None = None
    close_mm: float = 0.0
    alignment: str = "affine"
    ignored_labels: list[int] = field(default_factory=list)
    person: str = ".*"
    splits: dict[str, int | str] = field(default_factory=lambda: {"test": "rest"})
    bids: bool = False


def load_recipe(folder: str | Path, name: str, splits: dict[str, int | str] | None = None) -> Recipe:
    """Read the recipe ``name`` from ``folder``; ``splits`` takes the place of the recipe's.

    Raises:
        InputError: no such recipe, or unknown entries in it.
    """
    file = Path(folder) / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(f.stem for f in Path(folder).glob("*.yaml")))
        raise InputError(f"dataset '{name}' has no recipe {file}; there are: {known}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: a recipe needs at least 'images'")
    if splits:
        content["splits"] = splits
    unknown = set(content) - {f.name for f in fields(Recipe)}
    if unknown or not isinstance(content.get("images"), dict):
        raise InputError(f"{file}: unknown entries {sorted(map(str, unknown))} or no 'images'")
    recipe = Recipe(**content)
    _check_types(recipe, file)
    images = [p for patterns in recipe.images.values() for p in _patterns(patterns)]
    for pattern in images:
        if not recipe.bids and "{subject}" not in str(pattern):
            raise InputError(f"{file}: pattern '{pattern}' has no {{subject}}")
    sectioned = ["{section}" in pattern for pattern in images]
    if any(sectioned) and ("splits" in content or not all(sectioned)):
        raise InputError(
            f"{file}: where folders say the {{section}}, they do it for all images, and there are no splits"
        )
    try:
        re.compile(recipe.person)
    except re.error as error:
        raise InputError(f"{file}: person '{recipe.person}' is no regular expression ({error})") from error
    numbers = [n for n in recipe.splits.values() if n != "rest"]
    wrong = [n for n in numbers if not isinstance(n, int) or isinstance(n, bool) or n < 0]
    if set(recipe.splits) - set(SECTIONS) or wrong or len(recipe.splits) - len(numbers) > 1:
        raise InputError(f"{file}: splits give {', '.join(SECTIONS)} a number of people each, one of them 'rest'")
    return recipe


def _check_types(recipe: Recipe, file: Path) -> None:
    def texts(given: Any) -> bool:
        return isinstance(given, str) or (isinstance(given, list) and all(isinstance(g, str) for g in given))

    def number(given: Any) -> bool:
        return isinstance(given, (int, float)) and not isinstance(given, bool)

    contrasts = all(isinstance(c, str) and c == c.lower() and texts(p) for c, p in recipe.images.items())
    ignored = recipe.ignored_labels
    rules = {
        "images": (contrasts, "contrasts (in lower case) with a pattern or a list of patterns each"),
        "bids": (isinstance(recipe.bids, bool), "true or false"),
        "close_mm": (number(recipe.close_mm) and recipe.close_mm >= 0, "a number of mm"),
        "alignment": (recipe.alignment in ("affine", "none", "auto"), "'affine', 'auto' or 'none'"),
        "ignored_labels": (isinstance(ignored, list) and all(map(number, ignored)), "a list of numbers"),
        "person": (isinstance(recipe.person, str), "a regular expression"),
        "splits": (isinstance(recipe.splits, dict), f"numbers of people for some of {', '.join(SECTIONS)}"),
    }
    for key in VOLUME_KEYS[1:]:
        given = getattr(recipe, key)
        rules[key] = (given is None or texts(given), "a pattern or a list of patterns")
    for name, (fits, wanted) in rules.items():
        if not fits:
            raise InputError(f"{file}: '{name}' must be {wanted}")


def _patterns(given: str | list[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or [])


def _matches(patterns: str | list[str] | None, paths: list[str], **known: str | None) -> list[re.Match]:
    """Matches of ``paths``, each with any of the patterns; ``known`` are values of the names in braces to look for."""
    found: dict[str, re.Match] = {}
    for pattern in _patterns(patterns):
        expression, seen = "", set()
        for token in re.split(r"(\*\*/|\*|\{subject\}|\{session\}|\{section\})", pattern):
            name = token[1:-1]
            if token in ("{subject}", "{session}", "{section}"):
                any_part = f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+?)"
                expression += re.escape(str(known[name])) if known.get(name) else any_part
                seen.add(name)
            else:
                expression += {"**/": "(?:.*/)?", "*": "[^/]*"}.get(token, re.escape(token))
        compiled = re.compile(expression, re.IGNORECASE)
        found.update((path, match) for path in paths if (match := compiled.fullmatch(path)))
    return list(found.values())


def find_scans(recipe: Recipe, source_dir: str | Path) -> list[dict[str, str]]:
    """Scans of a cohort: dictionaries with ``subject`` (with its session, if there is one), ``person``, ``contrast``,
    ``image`` and, where they exist, ``brain_mask``, ``label`` and ``anatomy_label`` (paths), sorted by subject; and
    ``section``, where the recipe's patterns name it. Where more than one file is found where one belongs, ``problem``
    tells it.

    Raises:
        InputError: nothing matches; an unknown section, or one person in two.
    """
    source = Path(source_dir)
    paths = [f.relative_to(source).as_posix() + "/" * f.is_dir() for f in sorted(source.rglob("*"))]
    paths = [p for p in paths if not any(part.startswith(".") for part in p.split("/"))]
    scans: dict[tuple[str, str], dict[str, str]] = {}
    sections: dict[str, str] = {}
    for contrast, patterns in recipe.images.items():
        for path, parts in _bids_images(source, contrast) if recipe.bids else _images(patterns, paths):
            subject = str(parts["subject"])
            session, section = parts.get("session"), parts.get("section")
            name = f"{subject}_{session}" if session else subject
            person = (re.search(recipe.person, subject) or [subject])[0]
            if section:
                _check_section(section.lower(), person, sections, source / path)
            if (name, contrast) in scans:
                other = f"there is a second {contrast} scan of {name}, {source / path}; tell them apart in the recipe"
                scans[name, contrast]["problem"] = other
                continue
            scan = {"subject": name, "person": person, "contrast": contrast, "image": str(source / path)}
            if section:
                scan["section"] = section.lower()
            for key in VOLUME_KEYS[1:]:
                found = [m[0] for m in _matches(getattr(recipe, key), paths, **parts)]
                if len(found) > 1:
                    scan["problem"] = f"{len(found)} files match its '{key}', {source / found[0]} is one; which?"
                elif found:
                    scan[key] = str(source / found[0])
            scans[name, contrast] = scan
    if not scans:
        wanted = " or ".join(p for patterns in recipe.images.values() for p in _patterns(patterns))
        raise InputError(f"{source_dir}: nothing matches {wanted}")
    return [scans[key] for key in sorted(scans)]


def _images(patterns: str | list[str], paths: list[str]) -> list[tuple[str, dict[str, str | None]]]:
    return [(match[0], match.groupdict()) for match in _matches(patterns, paths)]


def _bids_images(source: Path, contrast: str) -> list[tuple[str, dict[str, str | None]]]:
    keys = ("subject", "session")
    return [(s["bids"], {k: s[k] for k in keys if k in s}) for s in find_bids_scans(source, contrast)]


def _check_section(section: str, person: str, others: dict[str, str], path: Path) -> None:
    if section not in SECTIONS:
        raise InputError(f"{path}: '{section}' is no section; there are {', '.join(SECTIONS)}")
    other = others.setdefault(person, section)
    if other != section:
        raise InputError(f"{path}: {person} is in '{section}' and in '{other}'; keep one of the two")


def listed_sections(
    splits_file: str | Path, dataset: str, recipe: Recipe, people: Iterable[str], fold: int = 0
) -> dict[str, str]:
    """Section of each person by lists (`read_splits`); who is found but in none of them is left out, and counted aloud.

    Raises:
        InputError: a listed person who was not found.
    """
    section, found = read_splits(splits_file, dataset, recipe.person, fold), set(people)
    missing = sorted(set(section) - found)
    if missing:
        names = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
        raise InputError(
            f"{splits_file}: {len(missing)} of {len(section)} listed people were not found ({names}); a table would be "
            "of others: name the source folder that holds them, or shorten the list"
        )
    if found - set(section):
        print(f"{splits_file}: {len(found - set(section))} people are in none of its lists and are left out")
    return section


def split_people(recipe: Recipe, people: Iterable[str], seed: int = 0) -> dict[str, str]:
    """Section of each person: they are shuffled by ``seed`` and dealt out by the recipe's numbers.

    Raises:
        InputError: fewer people than the recipe asks for.
    """
    left = sorted(set(people))
    np.random.RandomState(seed).shuffle(left)
    fixed = {k: n for k, n in recipe.splits.items() if isinstance(n, int)}
    if sum(fixed.values()) > len(left):
        raise InputError(
            f"splits {recipe.splits} need more than the {len(left)} people found; choose yours with --splits"
        )
    rest = next((k for k, n in recipe.splits.items() if not isinstance(n, int)), None)
    section: dict[str, str] = {}
    for name, number in fixed.items():
        section.update(dict.fromkeys(left[:number], name))
        left = left[number:]
    if rest:
        section.update(dict.fromkeys(left, rest))
    return section


@dataclass(frozen=True)
class Preparation:
    """What is done with each scan: everything that a worker process needs.

    Attributes:
        dataset_dir: where the results go.
        preprocessing: the chain, from files to ``image``, ``brain_mask``, the label maps and, for the quality sheet,
            ``head`` (with its skull) on the grid.
        settings: what the chain was made from; a scan prepared with others, or from another file, is done again.
        draw_alignment: draws the quality sheet of a scan, see `bundle.reports.draw_alignment`; None draws none.
        atlas: template file, see `load_atlas`.
    """

    dataset_dir: Path
    preprocessing: Callable
    settings: Mapping[str, Any] = field(default_factory=dict)
    draw_alignment: Callable | None = None
    atlas: str | None = None

    def record(self, scan: Mapping[str, str]) -> dict[str, Any]:
        """What is known of a scan: its ``item``, or the ``failure`` of the last attempt; empty if it was never tried,
        or is to be done again: of another file or with other settings, or its results are gone.
        """
        done = _read_record(self._file(scan))
        files = [self.dataset_dir / done["item"][key] for key in VOLUME_KEYS if key in done.get("item", {})]
        return done if done.get("made_from") == self._made_from(scan) and all(f.is_file() for f in files) else {}

    def fail(self, scan: Mapping[str, str], failure: str) -> None:
        """Keep for others that a scan was tried in vain."""
        write_json(self._file(scan), {"failure": failure, "made_from": self._made_from(scan)})

    def _file(self, scan: Mapping[str, str]) -> Path:
        return self.dataset_dir / "records" / f"{scan['subject']}_{scan['contrast']}.json"

    def _made_from(self, scan: Mapping[str, str]) -> str:
        there = {k: Path(scan[k]) for k in VOLUME_KEYS if k in scan and Path(scan[k]).exists()}
        files = {k: [file.stat().st_size, file.stat().st_mtime] for k, file in there.items()}
        return hashlib.sha256(json.dumps([_FORMAT, dict(self.settings), files], sort_keys=True).encode()).hexdigest()

    def __call__(self, scan: Mapping[str, str]) -> dict[str, Any]:
        """Run one scan through the chain, save it, and return its item for ``datalist.json``.

        The item also tells ``atlas_overlap``: Dice of its brain mask and the atlas' on the grid, 1 is perfect; and
        ``not_examined``, the share of its brain that the grid leaves out, and ``flags``, if there are any.
        The record is written last: where it and the files exist, the scan is done and not touched again.
        """
        name = f"{scan['subject']}_{scan['contrast']}"
        made_from, done = self._made_from(scan), self.record(scan)
        if "item" in done:
            return done["item"]
        data = self.preprocessing({key: scan[key] for key in VOLUME_KEYS if key in scan})
        atlas = load_atlas(self.atlas)
        overlap = atlas_overlap(data["brain_mask"], atlas)
        item: dict[str, Any] = {key: f"{key}s/{name}.nii.gz" for key in VOLUME_KEYS if key in data}
        sheet = self.dataset_dir / "qc" / f"{name}.png"
        try:
            for key, file in item.items():
                volume = data[key][0].numpy()
                if key != "image":
                    volume = np.rint(volume).astype(np.uint8 if volume.max() < 256 else np.int32)
                write_volume(self.dataset_dir / file, volume, data[key].affine)
            if self.draw_alignment:
                expected = ResampleToMatch(mode="nearest", padding_mode="zeros")(
                    atlas.brain_mask, img_dst=data["image"]
                )
                masks = [m[0].numpy() > 0 for m in (data["brain_mask"], expected)]
                self.draw_alignment(sheet, f"{name}  {overlap:.3f}", data.get("head", data["image"])[0].numpy(), *masks)
        except Exception:
            for file in (*item.values(), sheet):  # all of a scan's files, or none
                (self.dataset_dir / file).unlink(missing_ok=True)
            raise
        item.update(subject=scan["subject"], person=scan["person"], contrast=scan["contrast"], chain=CHAIN)
        item.update(atlas_overlap=round(overlap, 4), to_atlas=scan_to_atlas(data["image"]).tolist())
        if data.get("not_examined"):
            item["not_examined"] = round(float(data["not_examined"]), 4)
        doubts = [data.get("flags", ""), "" if self.atlas else contrast_doubt(data["image"], scan["contrast"], atlas)]
        if any(doubts):
            item["flags"] = "; ".join(filter(None, doubts))
        item["content"] = hashlib.sha256(data["image"].as_tensor().numpy().tobytes()).hexdigest()
        item["source"] = {k: os.path.relpath(scan[k], self.dataset_dir) for k in ("image", "label") if k in scan}
        write_json(self._file(scan), {"item": item, "made_from": made_from})
        return item


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
    if not all((folder / origin).resolve().is_relative_to(source_dir.resolve()) for origin in origins):
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


def _read_record(file: Path) -> dict[str, Any]:
    """A scan's record; empty if there is none that can be read: the scan is prepared again then."""
    try:
        record = read_json(file, "record of a prepared scan")
    except InputError:
        return {}
    return record if isinstance(record, dict) else {}


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
        seed: of the split.
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
        section = {s["person"]: s["section"] for s in scans if "section" in s} or split_people(recipe, people, seed)
    scans = [s for s in scans if s["person"] in section]
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

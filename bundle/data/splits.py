"""Who belongs to which section: dealt out at random, or by the lists that the public codes of this line of papers come
with.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from bundle.errors import InputError

from .recipe import Recipe

_SECTIONS = {"train": "training", "val": "validation"}
_LIST = re.compile(
    r"(?:(?P<cohort>.+)_)?(?P<section>train|training|val|validation|calibration|tuning|test)(?:_fold(?P<fold>\d+))?",
    re.IGNORECASE,
)
# what follows a person's name in the name of a file
_ENDING = re.compile(r"(?:[-_](?:t1|t2|t1w|t2w|flair))?(?:\.nii(?:\.gz)?)?$", re.IGNORECASE)


def split_people(
    recipe: Recipe, people: Iterable[str], seed: int = 0, known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Section of each person: they are shuffled by ``seed`` and dealt out by the recipe's numbers.

    Who has a section already keeps it, or a model would be calibrated on people that it was trained on as soon as one
    more joins them; only new people are dealt out. If the recipe's numbers cannot be had so, all are dealt out anew,
    and it is told.

    Args:
        recipe: its ``splits`` are used.
        people: to deal out.
        seed: of the shuffling.
        known: person -> section, of a list of before.

    Raises:
        InputError: fewer people than the recipe asks for.
    """
    everyone = sorted(set(people))
    np.random.RandomState(seed).shuffle(everyone)
    fixed = {k: n for k, n in recipe.splits.items() if isinstance(n, int)}
    before = {person: (known or {})[person] for person in everyone if person in (known or {})}
    kept = {person: section for person, section in before.items() if section in recipe.splits}
    wanted = {name: number - list(kept.values()).count(name) for name, number in fixed.items()}
    if min(wanted.values(), default=0) < 0 or sum(wanted.values()) > len(everyone) - len(kept):
        kept, wanted = {}, fixed
    left = [person for person in everyone if person not in kept]
    if sum(wanted.values()) > len(left):
        raise InputError(
            f"splits {recipe.splits} need more than the {len(left)} subjects found; choose yours with --splits"
        )
    rest = next((k for k, n in recipe.splits.items() if not isinstance(n, int)), None)
    section = dict(kept)
    for name, number in wanted.items():
        section.update(dict.fromkeys(left[:number], name))
        left = left[number:]
    if rest:
        section.update(dict.fromkeys(left, rest))
    moved = sum(section.get(person) != name for person, name in before.items())
    if moved:
        print(
            f"{moved} of {len(before)} people are in another section than before: train and calibrate again", flush=True
        )
    return section


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
            f"{splits_file}: {len(missing)} of {len(section)} listed subjects were not found ({names}); a table would "
            "be of others: name the source folder that holds them, or shorten the list"
        )
    if found - set(section):
        print(f"{splits_file}: {len(found - set(section))} subjects are in none of its lists and are left out")
    return section


def person_of(name: str, person: str = ".*") -> str:
    """Person whose scan is called ``name``, with or without contrast and file ending; see `Recipe.person`."""
    name = _ENDING.sub("", Path(name.strip()).name, count=1)
    return (re.search(person, name) or [name])[0]


def read_splits(path: str | Path, dataset: str, person: str = ".*", fold: int = 0) -> dict[str, str]:
    """Section of each listed person.

    Lists are CSV files with the columns ``img_name`` and ``label`` (above 0 is a patient; others are not read). Their
    names tell the section: ``MSLUB_test.csv``, ``IXI_train_fold0.csv``. Patients of ``val`` are to choose thresholds on
    and go to "tuning".

    Args:
        path: a list, or a folder in which those of the dataset are taken: named ``DATASET_...``, as far as the name of
            the recipe is theirs before its first ``_``, or with no name but the section.
        dataset: name of the recipe.
        person: regular expression, see `Recipe.person`.
        fold: which of the lists of a folder that end in ``_foldN``.

    Raises:
        InputError: no such lists, a list that is none, or one person in two sections.
    """
    section: dict[str, str] = {}
    where: dict[str, Path] = {}
    for file, name in _lists(Path(path), dataset, fold):
        for image, is_patient in _rows(file):
            who = person_of(image, person)
            own = "tuning" if is_patient and name == "validation" else name
            if section.setdefault(who, own) != own:
                raise InputError(f"{file}: {who} is in '{section[who]}' too, by {where[who]}; keep one of the two")
            where.setdefault(who, file)
    return section


def _lists(path: Path, dataset: str, fold: int) -> list[tuple[Path, str]]:
    """Files and their sections."""
    if not path.exists():
        raise InputError(f"{path}: not found; --splits_file needs a CSV list of subjects, or a folder of them")
    found, folds = [], set()
    for file in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
        match = _LIST.fullmatch(file.stem)
        if match:
            cohort, own_fold = (match["cohort"] or "").lower(), match["fold"]
            ours = not cohort or f"{dataset}_".lower().startswith(f"{cohort}_")
            folds |= {own_fold} if ours and own_fold else set()
            if not path.is_dir() or (ours and own_fold in (None, str(fold))):
                name = match["section"].lower()
                found.append((file, _SECTIONS.get(name, name)))
    if not found or (path.is_dir() and folds and str(fold) not in folds):
        wanted = f"no list of '{dataset}' (fold {fold})" if path.is_dir() else "its name tells no section"
        raise InputError(f"{path}: {wanted}; lists are named like {dataset}_test.csv or {dataset}_train_fold0.csv")
    return found


def _rows(file: Path) -> list[tuple[str, bool]]:
    """Name and whether it is a patient, of each row."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as table:
            rows = list(csv.DictReader(table))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file}: cannot be read as a CSV list ({error})") from error
    if not rows or not {"img_name", "label"} <= set(rows[0]):
        raise InputError(f"{file}: a list of subjects needs the columns img_name and label, and rows")
    people = []
    for number, row in enumerate(rows, 2):
        try:
            people.append((row["img_name"] or "", float(row["label"] or 0) > 0))
        except ValueError as error:
            raise InputError(f"{file}: line {number}: label '{row['label']}' is no number") from error
        if not people[-1][0].strip():
            raise InputError(f"{file}: line {number} has no img_name")
    return people

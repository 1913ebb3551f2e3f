"""How a cohort lies on disk, as ``configs/datasets/NAME.yaml`` tells it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from bundle.errors import InputError

from .datalist import SECTIONS, VOLUME_KEYS


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
        raise InputError(f"dataset '{name}': there is no dataset config {file}; there are: {known}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: a dataset config needs at least 'images'")
    if splits:
        content["splits"] = splits
    unknown = set(content) - {f.name for f in fields(Recipe)}
    if unknown or not isinstance(content.get("images"), dict):
        raise InputError(f"{file}: unknown entries {sorted(map(str, unknown))} or no 'images'")
    recipe = Recipe(**content)
    _check_types(recipe, file)
    images = [p for patterns in recipe.images.values() for p in pattern_list(patterns)]
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
        raise InputError(f"{file}: splits give {', '.join(SECTIONS)} a number of subjects each, one of them 'rest'")
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
        "splits": (isinstance(recipe.splits, dict), f"numbers of subjects for some of {', '.join(SECTIONS)}"),
    }
    for key in VOLUME_KEYS[1:]:
        given = getattr(recipe, key)
        rules[key] = (given is None or texts(given), "a pattern or a list of patterns")
    for name, (fits, wanted) in rules.items():
        if not fits:
            raise InputError(f"{file}: '{name}' must be {wanted}")


def pattern_list(given: str | list[str] | None) -> list[str]:
    """One pattern, several or none, as a list."""
    return [given] if isinstance(given, str) else list(given or [])

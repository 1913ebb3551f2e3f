"""Which scans a downloaded cohort holds, by its recipe."""

from __future__ import annotations

import re
from pathlib import Path

from bundle.errors import InputError

from .bids import find_bids_scans
from .datalist import SECTIONS, VOLUME_KEYS
from .files import visible_files
from .recipe import Recipe, pattern_list


def _matches(patterns: str | list[str] | None, paths: list[str], **known: str | None) -> list[re.Match]:
    """Matches of ``paths``, each with any of the patterns; ``known`` are values of the names in braces to look for."""
    found: dict[str, re.Match] = {}
    for pattern in pattern_list(patterns):
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
    files = [file.relative_to(source) for file in visible_files(source)]
    folders = {folder for file in files for folder in file.parents[:-1]}
    paths = sorted([*(f.as_posix() for f in files), *(f"{f.as_posix()}/" for f in folders)])
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
                other = f"there is a second {contrast} scan of {name}, {source / path}"
                scans[name, contrast]["problem"] = f"{other}; tell them apart in the dataset config"
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
        wanted = " or ".join(p for patterns in recipe.images.values() for p in pattern_list(patterns))
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

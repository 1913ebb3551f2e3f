"""Which scans are of one visit: several contrasts of one person, taken at one time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from .dicom import named_contrast, study_of
from .files import CONTRASTS
from .formats import stem
from .names import named_uniquely

# words that tell how a scan was made, not whose it is
_MANNER = {"w", "3d", "2d", "iso", "se", "tse", "fse", "space", "cube", "vista", "mpr", "sag", "cor", "tra", "ax"}


def list_visits(scans: Sequence[Mapping[str, Any]], combine: bool = True) -> list[dict[str, Any]]:
    """Visits of which there are scans of several contrasts, each with a ``name`` that ends in "_combined", and its
    ``scans``.

    Of a visit are the scans of a subject and session of a BIDS dataset; DICOM series of one study; and files of one
    folder whose names differ only in the contrast that they tell ("t1", "t2", "flair"; "anna_T1w", "anna_FLAIR"). Scans
    of prepared datasets, whose names may be anything, are of none.

    Args:
        scans: as of `list_scans`.
        combine: False gives no visits.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for scan in scans if combine else ():
        key = _visit_of(scan)
        if key is not None:
            groups.setdefault(key, []).append(scan)
    for key in [key for key, group in groups.items() if key[0] == "files" and _repeats(group)]:
        finer: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
        for scan in groups[key]:  # of "anna_T1_FLAIR" and "anna_T2_FLAIR" T1 and T2 are points of time, not contrasts
            finer.setdefault(("files", _left_of(scan, last_only=True)), []).append(scan)
        if not any(map(_repeats, finer.values())):
            groups |= {key: [], **finer}
    several = {key: group for key, group in groups.items() if len({_told(s) or s["name"] for s in group}) > 1}
    shared = Counter(key[1] for key in several if key[0] != "bids")
    # several studies of one folder are told apart by a hash: a UID may tell whose it is
    apart = {key: f"_{sha256(key[-1].encode()).hexdigest()[:8]}" if shared[key[1]] > 1 else "" for key in several}
    others = named_uniquely([{"image": key[1] + apart[key]} for key in several if key[0] != "bids"])
    names = iter(item["name"] for item in others)
    taken = {scan["name"] for scan in scans}
    visits = [
        {"name": f"{key[1] if key[0] == 'bids' else next(names)}_combined", "scans": group}
        for key, group in several.items()
    ]
    return [visit for visit in visits if visit["name"] not in taken]


def _visit_of(scan: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Kind of the visit, what names it, and what else it is told by; None if the scan is of none."""
    if "bids" in scan:
        return "bids", "_".join(filter(None, (scan["subject"], scan.get("session"))))
    if "prepared" in scan:
        return None
    file = Path(scan["image"])
    study = study_of(file) if file.is_dir() else None
    if study:
        return "study", str(file.parent), study
    if _told(scan) is None:
        return None
    return "files", _left_of(scan)


def _left_of(scan: Mapping[str, Any], last_only: bool = False) -> str:
    """What is left of a file's path without the words that tell its contrast, or the last of them, and its manner; of a
    file with no other words its folder.
    """
    file, words = Path(scan["image"]), _words(scan)
    told = [k for k, word in enumerate(words) if named_contrast(word)]
    told = told[-1:] if last_only else told
    left = "_".join(w for k, w in enumerate(words) if k not in told and w.lower() not in _MANNER)
    return str(file.parent / left) if left else str(file.parent.resolve())


def _repeats(scans: Sequence[Mapping[str, Any]]) -> bool:
    """Whether several of the scans are of one contrast."""
    return len({*map(_told, scans)}) < len(scans)


def _told(scan: Mapping[str, Any]) -> str | None:
    """Contrast that a scan's list tells, or the last word of its name that tells any; None for none."""
    if named_contrast(stem(scan["image"])) is None and not scan.get("contrast"):
        return None
    told = [c for word in _words(scan) if (c := named_contrast(word))]
    if "flair" in told and set(told) <= {"flair", "t2"}:  # "T2_FLAIR", "FLAIR_T2"
        told = ["flair"]
    contrast = scan.get("contrast") or next(reversed(told), None)
    return contrast if contrast in CONTRASTS else None


def _words(scan: Mapping[str, Any]) -> list[str]:
    return [word for word in re.split(r"[^\w]+|_", stem(scan["image"])) if word]

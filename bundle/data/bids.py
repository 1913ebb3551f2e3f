"""BIDS: where a dataset's scans lie, and where the answers to them go (https://bids-specification.readthedocs.io)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bundle
from bundle.errors import InputError

from .files import read_json, write_json, write_text
from .formats import stem

SUFFIXES = {"t1": "T1w", "t2": "T2w", "flair": "FLAIR"}
_DESCRIPTION, _US = "dataset_description.json", "patch2loc_brain_mri"
_ENDINGS = ("nii", "nii.gz")
_NAME = re.compile(rf"(sub-[^_]+)(_ses-[^_]+)?((?:_[a-z]+-[^_]+)*)_({'|'.join(SUFFIXES.values())})")
_DESC = re.compile("_desc-[^_]+")
_VISIT = re.compile(r"(sub-[^_]+)(_ses-[^_]+)?_combined")
# ending of each result's name: what is not told of by BIDS is kept from its validator
_KINDS = {"heatmap": "desc-heatmap_{0}", "lesion": "desc-lesion{0}_mask", "report": "desc-lesion{0}_report"}
_README = """Brain lesions found by Patch2Loc for MONAI in the scans of another dataset, which DatasetLinks names.
Research only, not a medical device.

Of each scan: its heatmap, the lesions (mask) and what was looked at (coverage), on the scan's own voxels; report.html
shows them.
"""
_IGNORED = ("summary.csv", "run.json", "report.html", "*_report.png", "*_report.html", "*_heatmap.*", ".records/")
_TOLD: dict[str, dict[str, Any]] = {
    "heatmap": {"Description": "z-score against healthy brains at the same place of the atlas", "SkullStripped": True},
    "lesion": {"Type": "Lesion", "Description": "1 is lesion"},
    "coverage": {"Description": "0 not brain, 1 brain that was looked at, 2 brain that was not"},
}


def is_bids(folder: str | Path) -> bool:
    """Whether a folder is a BIDS dataset, raw or derived."""
    return (Path(folder) / _DESCRIPTION).is_file()


def find_bids_scans(folder: str | Path, contrast: str | None = None) -> list[dict[str, str]]:
    """T1w, T2w and FLAIR scans of a BIDS dataset, by their suffixes, sorted: ``image``, ``name`` (the file's, without
    its ending), ``subject``, ``session`` (with "sub-" and "ses-"; the latter may be missing), ``contrast``, and
    ``bids``, the path in the dataset. Left out, and told aloud, are scans with a contrast agent (ce-), and those whose
    results would have the place of another's (`result_path`): the same with a ``desc-``, and a .nii beside a .nii.gz.

    Args:
        folder: the dataset.
        contrast: "t1", "t2" or "flair"; None takes all.
    """
    found: dict[str, dict[str, str]] = {}
    enhanced, doubles = 0, []
    for told, suffix in SUFFIXES.items():
        places = (f"sub-*/{session}anat/sub-*_{suffix}.{ending}" for session in ("", "ses-*/") for ending in _ENDINGS)
        for path in (p.relative_to(folder).as_posix() for place in places for p in Path(folder).glob(place)):
            match = _NAME.fullmatch(stem(path))
            if match is None or contrast not in (None, told) or "_desc-heatmap" in match[3]:
                continue
            if "_ce-" in match[3]:
                enhanced += 1
                continue
            item = {"image": str(Path(folder) / path), "name": stem(path), "subject": match[1], "contrast": told}
            item |= {"bids": path, **({"session": match[2][1:]} if match[2] else {})}
            place = _DESC.sub("", stem(path))
            both = sorted(filter(None, (found.get(place), item)), key=lambda i: (len(i["name"]), -len(i["image"])))
            found[place] = both[0]
            doubles += [other["bids"] for other in both[1:]]
    if doubles:
        warnings.warn(f"{folder}: left out, as of the same scan as others: {', '.join(sorted(doubles))}")
    if enhanced:
        warnings.warn(f"{folder}: {enhanced} scans with a contrast agent (ce-) are left out")
    return sorted(found.values(), key=lambda item: item["bids"])


def result_path(output_dir: str | Path, name: str, what: str) -> Path:
    """File of a scan's result: ``OUT/NAME/NAME_heatmap.nii.gz``; in a BIDS derivative, of a scan that is named so,
    ``OUT/sub-01/ses-1/anat/sub-01_ses-1_desc-lesionFLAIR_mask.nii.gz``: scans of a session differ in their contrast,
    and a mask's name has no other place for it. A visit's is ``sub-01_ses-1_desc-lesionCombined_mask.nii.gz``, and its
    heatmap, which is of no one contrast, ``sub-01_ses-1_desc-combined_heatmap.nii.gz``.

    Args:
        output_dir: OUT.
        name: of the scan.
        what: kind and ending of the result, such as "lesion.nii.gz" or "report.html".
    """
    kind, _, ending = what.partition(".")
    match = (_NAME.fullmatch(name) or _VISIT.fullmatch(name)) if is_bids(output_dir) else None
    if match is None:
        return Path(output_dir) / name / f"{name}_{what}"
    subject, session = match[1], match[2] or ""
    others, suffix = match.groups()[2:] or ("", "Combined")
    base = f"{subject}{session}" + _DESC.sub("", others)
    told = _KINDS.get(kind, f"desc-{kind}{{0}}_dseg").format(suffix)
    told = told.replace("desc-heatmap_Combined", "desc-combined_heatmap")
    return Path(output_dir) / subject / session.strip("_") / "anat" / f"{base}_{told}.{ending}"


def begin_derivative(output_dir: str | Path, source: str) -> None:
    """Make a folder a BIDS derivative: ``dataset_description.json`` with who made it, and a ``.bidsignore`` for what
    BIDS does not know. One that we began before is left as it is.

    Args:
        output_dir: of the derivative.
        source: link to the dataset that the scans are of.

    Raises:
        InputError: the folder is a dataset of somebody else.
    """
    file = Path(output_dir) / _DESCRIPTION
    if file.is_file():
        content = read_json(file, "description of the dataset")
        makers = content.get("GeneratedBy") if isinstance(content, dict) else None
        if not any(maker.get("Name") == _US for maker in makers or [] if isinstance(maker, dict)):
            raise InputError(f"{output_dir}: is a dataset that others made; choose another output folder")
        return
    content = {
        "Name": "Brain lesions found by Patch2Loc for MONAI",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": _US, "Version": bundle.__version__}],
        "DatasetLinks": {"raw": source},
    }
    write_text(Path(output_dir) / ".bidsignore", "\n".join(_IGNORED) + "\n")
    write_text(Path(output_dir) / "README", _README)
    write_json(file, content)


def sidecar(kind: str, scan: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is told beside a result.

    Args:
        kind: "heatmap", "lesion" or another volume.
        scan: path of the scan in its dataset.
        facts: of the run, such as threshold and score.
    """
    return {**_TOLD.get(kind, {}), "Sources": [f"bids:raw:{scan}"], "SpatialReference": f"bids:raw:{scan}", **facts}

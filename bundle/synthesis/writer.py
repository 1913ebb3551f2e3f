"""Synthetic scans as a prepared dataset: to train on without making them anew each time, and to calibrate."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.transforms import Compose
from tqdm import tqdm

from bundle.command_line import record_run, run_records
from bundle.data import claim_folder, load_datalist
from bundle.data.datalist import write_item
from bundle.data.files import read_json, write_json
from bundle.errors import InputError


def write_scans(
    dataset_dir: str | Path,
    output_dir: str | Path,
    contrast: str,
    anatomy: Compose,
    appearance: Compose,
    data_contrast: str = "t1",
    repeats: int = 1,
    sections: Sequence[str] = ("training", "validation", "calibration"),
    seed: int = 0,
) -> Path:
    """Give every anatomy of a prepared dataset ``repeats`` synthetic scans, in its own section.

    A scan depends on the seed, its anatomy's place in the list and its number only, so it comes out the same whatever
    else is made.

    Args:
        dataset_dir: prepared dataset whose items have an ``anatomy_label``.
        output_dir: new prepared dataset.
        contrast: of the scans that are made; ``appearance`` decides it, this names it.
        anatomy: from files to what ``appearance`` needs.
        appearance: random; makes ``image`` and ``brain_mask``.
        data_contrast: of the items that are read.
        repeats: scans per anatomy.
        sections: that are made, where they exist.
        seed: of everything.

    Returns:
        the ``datalist.json`` written.

    Raises:
        InputError: no output folder, the dataset's own or one with a list of others; no anatomies.
    """
    folder = Path(output_dir)
    if not output_dir or folder.resolve() == Path(dataset_dir).resolve():
        raise InputError("name a new folder for the synthetic scans with --output_dir")
    if (folder / "datalist.json").is_file() and "synthesis" not in run_records(folder):
        raise InputError(
            f"{folder / 'datalist.json'}: lists scans of others; choose another --output_dir, or remove it"
        )
    claim_folder(folder)
    record_run(folder, "synthesis")
    there = read_json(Path(dataset_dir) / "datalist.json", "list of the dataset")
    datalist: dict[str, list[dict[str, Any]]] = {}
    for number, section in enumerate(s for s in sections if there.get(s)):
        items = load_datalist(dataset_dir, section, data_contrast, require=["brain_mask", "anatomy_label"])
        datalist[section] = []
        for place, item in enumerate(tqdm(items, desc=f"making {section}", unit="anatomy", file=sys.stdout)):
            shares = anatomy(item)
            for repeat in range(repeats):
                appearance.set_random_state(seed=(seed * 10 + number) * 1_000_000 + place * 1000 + repeat)
                scan = appearance(dict(shares))
                name = f"{item['subject']}_{contrast}_{repeat}"
                volumes = {key: scan[key] for key in ("image", "brain_mask")}
                made = write_item(folder, name, contrast, volumes, scan["image"].affine.cpu())
                datalist[section].append({**made, "person": item.get("person", item["subject"])})
    if not datalist:
        raise InputError(f"{dataset_dir}: none of {', '.join(sections)} in its datalist.json")
    write_json(folder / "datalist.json", datalist)
    print(f"{folder / 'datalist.json'}: " + ", ".join(f"{len(v)} {k}" for k, v in datalist.items()))
    return folder / "datalist.json"

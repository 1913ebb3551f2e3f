"""Synthetic scans as files: to train on without making them anew each time, and to calibrate."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from tqdm import tqdm

from bundle.command_line import record_run, run_records
from bundle.data import claim_folder, load_datalist
from bundle.data.datalist import SECTIONS, write_item
from bundle.data.files import read_json, write_json
from bundle.data.volumes import write_volume
from bundle.errors import InputError


def write_scans(
    dataset_dir: str | Path,
    output_dir: str | Path,
    contrast: str,
    anatomy: Compose,
    appearance: Compose,
    data_contrast: str = "t1",
    repeats: int = 1,
    sections: Sequence[str] = SECTIONS,
    raw: bool = False,
    seed: int = 0,
) -> Path:
    """Give every anatomy of a prepared dataset ``repeats`` synthetic scans, in its own section.

    They are written as another prepared dataset, or, if ``raw``, as files like a scanner's, in the space of the
    person's own head: ``SECTION/SUBJECT_rREPEAT_CONTRAST.nii.gz``, 0 outside the brain, which the recipe ``synthetic``
    prepares. What is then trained on has been through the same chain as a patient's scan.

    A scan depends on the seed, its anatomy's place in the list and its number only, so it comes out the same whatever
    else is made.

    Args:
        dataset_dir: prepared dataset whose items have an ``anatomy_label``.
        output_dir: new prepared dataset, or folder of raw scans.
        contrast: of the scans that are made; ``appearance`` decides it, this names it.
        anatomy: from files to what ``appearance`` needs.
        appearance: random; makes ``image`` and ``brain_mask``; raw scans need the image only, in scanner's units.
        data_contrast: of the items that are read.
        repeats: scans per anatomy.
        sections: that are made, where they exist.
        raw: write raw scans.
        seed: of everything.

    Returns:
        the ``datalist.json`` written; of raw scans their folder.

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
    for number, section in enumerate(sections):
        if not there.get(section):
            continue
        items = load_datalist(dataset_dir, section, data_contrast, require=["brain_mask", "anatomy_label"])
        datalist[section] = []
        times = Counter(item.get("subject") for item in items)
        for place, item in enumerate(tqdm(items, desc=f"making {section}", unit="anatomy", file=sys.stdout)):
            # a subject of several scans, or none, is told apart by the scan's name
            subject = item["subject"] if item.get("subject") and times[item["subject"]] == 1 else item["name"]
            shares = anatomy(item)
            for repeat in range(repeats):
                appearance.set_random_state(seed=(seed * 10 + number) * 1_000_000 + place * 1000 + repeat)
                scan = appearance(dict(shares))
                if raw:
                    file = folder / section / f"{subject}_r{repeat}_{contrast}.nii.gz"
                    _write_raw(file, scan["image"], item.get("to_atlas", np.eye(4)))
                    datalist[section].append({})
                    continue
                name = f"{subject}_{contrast}_{repeat}"
                volumes = {key: scan[key] for key in ("image", "brain_mask")}
                made = write_item(folder, name, contrast, volumes, scan["image"].affine.cpu())
                datalist[section].append({**made, "person": item.get("person") or item.get("subject", subject)})
    if not datalist:
        raise InputError(f"{dataset_dir}: none of {', '.join(sections)} in its datalist.json")
    written = folder if raw else folder / "datalist.json"
    if not raw:
        write_json(written, datalist)
    print(f"{written}: " + ", ".join(f"{len(v)} {k}" for k, v in datalist.items()))
    return written


def _write_raw(file: Path, image: MetaTensor, to_atlas: np.ndarray) -> None:
    """A scan ``[1, X, Y, Z]`` in the atlas' world as a file of whole numbers, in the world of the person's head."""
    values = image.as_tensor()[0].cpu()
    whole = torch.where(values > 0, values.round().clamp(1, np.iinfo(np.int16).max), 0.0)  # 0 is outside
    affine = np.linalg.inv(to_atlas) @ np.asarray(image.affine.cpu(), float)
    write_volume(file, whole.numpy().astype(np.int16), affine)

"""One scan of a cohort through the chain, to the atlas grid."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import ResampleToMatch

from bundle.errors import InputError

from .atlas import atlas_overlap, contrast_doubt, load_atlas
from .datalist import CHAIN, VOLUME_KEYS
from .files import read_json, write_json
from .formats import files_of
from .own_volume import scan_to_atlas
from .volumes import write_volume

# of the items that are written; part of what a prepared scan was made from
_FORMAT = [CHAIN, 1]


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
        if done.get("made_from") != self._made_from(scan):
            return {}
        if "item" not in done:
            return done
        item, now = done["item"], self._sources(scan)
        before = {key: self.dataset_dir / file for key, file in item.get("source", {}).items()}
        # scans may move, but another file of the same size and time, beside the one of before, is another scan
        if any(f.exists() and key in now and not f.samefile(scan[key]) for key, f in before.items()):
            return {}
        if not all((self.dataset_dir / item[key]).is_file() for key in VOLUME_KEYS if key in item):
            return {}
        return {**done, "item": {**item, "person": scan["person"], "source": now}}

    def _sources(self, scan: Mapping[str, str]) -> dict[str, str]:
        return {key: os.path.relpath(scan[key], self.dataset_dir) for key in ("image", "label") if key in scan}

    def fail(self, scan: Mapping[str, str], failure: str) -> None:
        """Keep for others that a scan was tried in vain."""
        write_json(self._file(scan), {"failure": failure, "made_from": self._made_from(scan)})

    def _file(self, scan: Mapping[str, str]) -> Path:
        return self.dataset_dir / "records" / f"{scan['subject']}_{scan['contrast']}.json"

    def _made_from(self, scan: Mapping[str, str]) -> str:
        there = {k: [f.stat() for f in files_of(scan[k])] for k in VOLUME_KEYS if k in scan}
        files = {k: [sum(f.st_size for f in s), max(f.st_mtime for f in s)] for k, s in there.items() if s}
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
        data = self.preprocessing({key: scan[key] for key in (*VOLUME_KEYS, "contrast") if key in scan})
        if data.get("has_lesions") and not (data["label"] > 0).any():
            raise InputError(
                f"{scan['label']}: nothing of its lesions is left on the grid, as they are too small for it or lie "
                "outside of it; it would count as healthy"
            )
        atlas = load_atlas(self.atlas)
        overlap = atlas_overlap(data["brain_mask"], atlas)
        item: dict[str, Any] = {key: f"{key}s/{name}.nii.gz" for key in VOLUME_KEYS if key in data}
        sheet = self.dataset_dir / "qc" / f"{name}.png"
        try:
            for key, file in item.items():
                volume = data[key][0].numpy()
                if key != "image":
                    volume = np.rint(volume.clip(min=0)).astype(np.uint8 if volume.max() < 256 else np.int32)
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
        item["source"] = self._sources(scan)
        write_json(self._file(scan), {"item": item, "made_from": made_from})
        return item


def _read_record(file: Path) -> dict[str, Any]:
    """A scan's record; empty if there is none that can be read: the scan is prepared again then."""
    try:
        record = read_json(file, "record of a prepared scan")
    except InputError:
        return {}
    return record if isinstance(record, dict) else {}

"""The one answer to a visit of which there are scans of several contrasts, made from the answers to each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import ResampleToMatch
from scipy import ndimage

from bundle.command_line import run_records
from bundle.data.files import write_json
from bundle.data.own_volume import own_voxel_mm3, scan_to_atlas
from bundle.errors import InputError, explain
from bundle.scoring import FindLesionsd, combine_contrasts, excess_ml, leading_contrast, sees
from bundle.transforms import EXAMINED, KeepVolumed, LoadScand, register_rigidly

from .answer import VOLUMES, remove_results, result_file
from .findings import SaveFindings
from .table import is_done
from .viewer import describe_findings

# headers that agree with the registration so well are believed: it finds a head again to about a millimetre
_SAME_PLACE_MM = 1.5
# overlap of the brains (Dice): below the one they are not of one head, below the other somebody should look
_LEAST_OVERLAP, _USUAL_OVERLAP = 0.8, 0.9
_RECORD = "combination"  # in run.json

Parts = Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]


class CombineVisits:
    """Combine the answers to the scans of each visit, see `bundle.scoring.combine_contrasts`: on the voxels of the scan
    of the leading contrast, to which the others are aligned rigidly.

    It works on the results as they were written, so that scans may have been answered by an earlier run. Of several
    scans of one contrast the first counts, those without doubts before others; a visit with answers of less than two
    contrasts has none of its own. What was made from the same answers before is not made again (``run.json``).

    Args:
        visits: as of `list_visits`.
        find_lesions: the transform that cut the heatmaps; tells the thresholds.
        align: transform that brings ``image`` and ``brain_mask`` to the atlas, where findings have their places.
    """

    def __init__(
        self,
        visits: Sequence[Mapping[str, Any]],
        find_lesions: FindLesionsd,
        align: Callable[[Mapping[Any, Any]], Mapping[Any, Any]],
    ) -> None:
        self.visits, self.find_lesions, self.align = visits, find_lesions, align

    def __call__(self, save: SaveFindings, done: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Write the answers to all visits whose scans are done, and return their rows of the table; and those of other
        visits that runs with the same settings have left in the folder.

        Args:
            save: what writes answers.
            done: rows of the table, of all scans that have an answer, or have failed.
        """
        record = run_records(save.output_dir).get(_RECORD, {})
        known = record.get("visits", {}) if record.get("settings") == save.facts else {}
        known = {name: of for name, of in known.items() if result_file(save.output_dir, name, "heatmap")}
        scans = {row["name"]: row for row in done}
        here = {visit["name"] for visit in self.visits}
        rows = [of["row"] for name, of in known.items() if name not in here]
        for visit in self.visits:
            name = visit["name"]
            if not all(scan["name"] in scans for scan in visit["scans"]):
                continue  # another process is at it
            parts = _parts(visit, scans)
            if len(parts) < 2:
                remove_results(save.output_dir, name)
                continue
            made_from = _made_from(save.output_dir, parts)
            if name in known and known[name]["from"] == made_from:
                rows.append(known[name]["row"])
                continue
            row = self._row(save, name, parts)
            rows.append(row)
            if is_done(row):
                known = {**known, name: {"row": row, "from": made_from}}
                record = {**run_records(save.output_dir), _RECORD: {"settings": save.facts, "visits": known}}
                write_json(save.output_dir / "run.json", record)
        return rows

    def _row(self, save: SaveFindings, name: str, parts: Parts) -> dict[str, Any]:
        """Write the answer to a visit and return its row; the row of a failure where there is none."""
        begun = time.monotonic()
        try:
            answer = self.answer(save.output_dir, name, parts)
            status = f"flagged: {answer['flags']}" if answer["flags"] else "ok"
            row = {"name": name, **save.write_scan(name, answer), "status": status}
            told = f"{row['lesions']} lesions, {row['lesion_volume_ml']} ml of {row['contrast']}"
        except Exception as error:  # the scans have their answers
            remove_results(save.output_dir, name)
            row = {"name": name, "status": f"failed: {explain(error)}"}
            told = row["status"]
        row["seconds"] = f"{time.monotonic() - begun:.1f}"
        print(f"{name}: {told}, {row['seconds']} s", flush=True)
        return row

    def answer(self, output_dir: Path, name: str, parts: Parts) -> dict[str, Any]:
        """The answer to a visit, in the form of a scan's (see `SaveFindings`), with ``contrasts``, the leading one
        first, and in ``result`` for each finding ``seen_in``, the contrasts that see it.

        Args:
            output_dir: where the answers to the scans are.
            name: of the visit.
            parts: contrast -> its scan and the scan's row of the table.

        Raises:
            InputError: scans that do not lie on each other, or a threshold that is not above 0.
        """
        thresholds = {contrast: self.find_lesions.threshold(contrast=contrast) for contrast in parts}
        if min(thresholds.values()) <= 0:
            raise InputError("contrasts are compared by their thresholds, which must be above 0; change --threshold")
        excess = {}
        for contrast, (scan, _) in parts.items():
            own = _load(output_dir, scan, ("heatmap", "lesion"))
            score, found = own["heatmap"][0].numpy() / thresholds[contrast], own["lesion"][0].numpy() > 0
            excess[contrast] = excess_ml(score, found, own_voxel_mm3(own["heatmap"]) / 1000)
        leading = leading_contrast(excess, {c: row["status"] != "ok" for c, (_, row) in parts.items()})
        contrasts = [leading, *sorted((c for c in parts if c != leading), key=lambda c: -excess[c])]
        doubts = [f"{c}: {row['status'].partition(': ')[2]}" for c, (_, row) in parts.items() if row["status"] != "ok"]
        scan, row = parts[leading]
        lead = _load(output_dir, scan, ("image", *VOLUMES))
        on_grid = {leading: lead}
        for contrast in contrasts[1:]:
            other = _load(output_dir, parts[contrast][0], ("image", *VOLUMES))
            on_grid[contrast], doubt = _brought(other, lead, self.find_lesions.min_lesion_mm3)
            doubts += [f"{contrast}: {doubt}"] if doubt else []
        # what an interpolated brain has beyond the scan's mask; outside, a heatmap is at its lowest
        brain = (lead["coverage"].as_tensor() > 0) | (lead["heatmap"] > lead["heatmap"].min()).as_tensor()
        scores = {c: v["heatmap"][0].numpy() / thresholds[c] for c, v in on_grid.items()}
        found = {c: (v["lesion"].as_tensor()[0].numpy() > 0) & brain[0].numpy() for c, v in on_grid.items()}
        examined = {c: v["coverage"][0].numpy() == EXAMINED for c, v in on_grid.items()}
        combined, mask = combine_contrasts(scores, found, examined, leading)
        volume = torch.as_tensor(combined * thresholds[leading])[None].float()
        volume[~brain] = volume[brain].min()
        heatmap = MetaTensor(volume).copy_meta_from(lead["heatmap"])
        lesion = MetaTensor(torch.as_tensor(mask)[None].float()).copy_meta_from(lead["heatmap"])
        inside = MetaTensor(brain.float()).copy_meta_from(lead["heatmap"])
        placed = self.align({"image": lead["image"], "brain_mask": inside})["image"]
        result = describe_findings(heatmap, lesion, inside, aligned=scan_to_atlas(placed))
        regions, _ = ndimage.label(mask, np.ones((3, 3, 3)))
        to_voxel = np.linalg.inv(np.asarray(heatmap.affine, float))
        for finding in result["lesions"]:
            peak = tuple((to_voxel @ [*finding["peak_mm"], 1.0])[:3].round().astype(int))
            finding["seen_in"] = [c for c in contrasts if sees(scores[c], regions == regions[peak])]
        result |= {"score": self.find_lesions.score, "threshold": thresholds[leading], "contrast": leading}
        result["not_examined_percent"] = float(row.get("not_examined_percent") or 0)
        answer = {"name": name, "heatmap": heatmap, "lesion": lesion, "result": result, "contrasts": contrasts}
        answer |= {key: lead[key] for key in ("image", "label", "coverage") if key in lead}
        answer |= {"contrast": leading, "flags": "; ".join(doubts)}
        if "bids" in scan:
            answer |= {"bids": scan["bids"], "sources": [f"bids:raw:{parts[c][0]['bids']}" for c in contrasts]}
        return answer


def _parts(visit: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of each contrast that a visit has an answer of, its scan and the scan's row."""
    answered = [(scan, rows[scan["name"]]) for scan in visit["scans"] if is_done(rows[scan["name"]])]
    parts: dict[str, Any] = {}
    for scan, row in sorted(answered, key=lambda part: part[1]["status"] != "ok"):
        parts.setdefault(row["contrast"], (scan, row))
    return parts


def _made_from(output_dir: Path, parts: Parts) -> dict[str, list[Any]]:
    """Name, size and time of the heatmap of each contrast: a run that answers a scan again writes another."""
    files = {contrast: result_file(output_dir, scan["name"], "heatmap") for contrast, (scan, _) in parts.items()}
    return {c: [f.name, f.stat().st_size, f.stat().st_mtime_ns] for c, f in sorted(files.items()) if f}


def _load(output_dir: Path, scan: Mapping[str, Any], kinds: Sequence[str]) -> dict[Any, Any]:
    """Volumes of a scan's answer; ``image`` is the scan itself, with its ``label`` where it has one."""
    files: dict[Any, Any] = {kind: result_file(output_dir, scan["name"], kind) for kind in kinds if kind != "image"}
    gone = [kind for kind, file in files.items() if file is None]
    if gone:
        raise InputError(f"{scan['name']}: its {gone[0]} is gone from {output_dir}; run with --overwrite True")
    if "image" in kinds:
        files |= {key: scan[key] for key in ("image", "label") if key in scan}
    # of several series in a folder the one that was looked at: what was told from it did not choose it
    loaded = LoadScand(list(files), contrast=scan.get("contrast"))(files)
    if "image" in loaded:  # the scan's own answer has filled such voxels
        loaded["image"] = loaded["image"].nan_to_num(0.0, 0.0, 0.0)
    return loaded


def _brought(own: Mapping[Any, Any], lead: Mapping[Any, Any], min_lesion_mm3: float) -> tuple[dict[Any, Any], str]:
    """The answer to another scan on the grid of the leading one, and a doubt about that, "" for none."""
    target = lead["coverage"]
    to_lead = register_rigidly(own["image"], own["coverage"], lead["image"], target)
    brain = np.argwhere(own["coverage"][0].numpy() > 0)[::997]
    places = np.c_[brain, np.ones(len(brain))] @ np.asarray(own["coverage"].affine, float).T
    if np.median(np.linalg.norm((places @ to_lead.T - places)[:, :3], axis=1)) <= _SAME_PLACE_MM:
        to_lead = np.eye(4)
    modes = {"heatmap": ("bilinear", "border"), "lesion": ("bilinear", "zeros"), "coverage": ("nearest", "zeros")}
    brought: dict[Any, Any] = {}
    for key, (mode, padding) in modes.items():
        moved = MetaTensor(own[key].as_tensor(), affine=torch.as_tensor(to_lead) @ own[key].affine)
        brought[key] = ResampleToMatch(mode=mode, padding_mode=padding)(moved, img_dst=target)
    brought = KeepVolumed("lesion", min_lesion_mm3)(brought)
    inside, expected = brought["coverage"] > 0, target > 0
    overlap = float(2 * (inside & expected).sum() / (inside.sum() + expected.sum()))
    if overlap < _LEAST_OVERLAP:
        files = " and ".join(str(scan["image"].meta["filename_or_obj"]) for scan in (own, lead))
        raise InputError(f"{files}: brains overlap by {overlap:.2f} only (Dice); are they of one person and visit?")
    doubt = f"its brain overlaps the leading scan's by {overlap:.2f} only (Dice)" if overlap < _USUAL_OVERLAP else ""
    here = float((brought["lesion"] * expected).sum()) * own_voxel_mm3(target)
    there = float((own["lesion"] > 0).sum()) * own_voxel_mm3(own["lesion"])
    if here < 0.8 * there:
        doubt = "; ".join(filter(None, [doubt, f"{(there - here) / 1000:.2f} ml of its findings lie outside of it"]))
    return brought, doubt

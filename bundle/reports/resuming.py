"""What an earlier run has left that need not be done again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import bundle
from bundle.command_line import impersonal
from bundle.data.files import AUTO, file_hash, is_there
from bundle.scoring import PARTS, CalibrationFile
from bundle.shards import Records
from bundle.transforms import normative_file

from .answer import result_file
from .table import is_done


def run_facts(settings: Mapping[str, Any], calibration: CalibrationFile) -> dict[str, Any]:
    """What makes the results of a scan: settings, models, atlas and version, as they are kept in ``run.json``."""
    each = {contrast: _calibration_facts(file) for contrast, file in calibration.each().items()}
    facts = {**settings, **(each if settings.get("contrast") == AUTO else next(iter(each.values())))}
    if settings.get("atlas") and is_there(settings["atlas"]):
        facts["atlas_sha256"] = file_hash(settings["atlas"])
    facts["bundle"] = bundle.__version__
    return json.loads(impersonal(json.dumps(facts)))


def _calibration_facts(calibration: CalibrationFile) -> dict[str, Any]:
    known = calibration.load()
    facts = {k: known.provenance.get(k) for k in ("model_sha256", *(f"{part}_sha256" for part in PARTS))}
    facts["calibration_sha256"] = file_hash(calibration.path)
    return {**facts, "fusion": str(known.fusion)}


def calibration_files(calibration: CalibrationFile) -> list[str | Path]:
    """The files that a calibration stands for, of each contrast: model, maps, thresholds, and the normative map where
    there is one.
    """
    files: list[str | Path] = []
    for contrast, file in calibration.each().items():
        normative = Path(normative_file(Path(file.model_file).parent, contrast))
        maps = [Path(file.path).with_suffix(".nii.gz"), normative, normative.with_suffix(".nii.gz")]
        files += [file.model_file, file.path, *(there for there in maps if there.is_file())]
    return files


def finished_scans(
    scans: Sequence[Mapping[str, Any]],
    output_dir: str | Path,
    settings: Mapping[str, Any],
    calibration: CalibrationFile,
    overwrite: bool = False,
) -> dict[str, dict[str, Any]]:
    """Rows of ``summary.csv`` by name, of the scans whose results a run with the same settings has left in
    ``output_dir``, and which have not changed since. Nothing with ``overwrite``.
    """
    if overwrite or not scans:
        return {}
    records = Records(output_dir, scans, made_from=run_facts(settings, calibration), keep=True)
    rows = valid_rows(output_dir, map(records.read, scans))
    return {row["name"]: row for row in rows if is_done(row)}


def valid_rows(output_dir: str | Path, rows: Iterable[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """Those of the rows in the scans' records whose results are still there, or that tell of a failure."""
    return [row for row in rows if row and (not is_done(row) or result_file(output_dir, row["name"], "heatmap"))]

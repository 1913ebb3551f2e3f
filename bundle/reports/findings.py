"""What inference leaves behind: per scan a heatmap, a lesion mask and a picture; one table for all."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ignite.engine import Engine, Events

import bundle
from bundle.command_line import impersonal, record_run, run_records
from bundle.data.bids import begin_derivative, result_path, sidecar
from bundle.data.dicom_seg import HINT, has_highdicom, write_segmentation
from bundle.data.files import (
    AUTO,
    claim_folder,
    is_there,
    nifti_header,
    share,
    unwritable,
    write_json,
    write_text,
)
from bundle.data.formats import RESULT_ENDINGS, dicom_files, is_dicom_scan, result_ending, write_result
from bundle.errors import InputError, explain
from bundle.parallel import gather, is_main
from bundle.scoring import PARTS, CalibrationFile, FindLesionsd
from bundle.transforms import normative_file

from .figure import draw_report, heat_scale
from .pages import write_overview, write_viewer
from .view import View

if TYPE_CHECKING:
    from .visits import CombineVisits

COLUMNS = (
    *("name", "contrast", "lesion_volume_ml", "lesions", "max_score", "mean_score"),
    *("not_examined_percent", "seconds", "status"),
)


def write_table(path: str | Path, rows: list[dict[str, Any]], columns: tuple[str, ...] | list[str]) -> None:
    """Write rows as CSV, atomically; missing entries stay empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def run_facts(settings: Mapping[str, Any], calibration: CalibrationFile) -> dict[str, Any]:
    """What makes the results of a scan: settings, models, atlas and version, as they are kept in ``run.json``."""
    each = {contrast: _calibration_facts(file) for contrast, file in calibration.each().items()}
    facts = {**settings, **(each if settings.get("contrast") == AUTO else next(iter(each.values())))}
    if settings.get("atlas") and is_there(settings["atlas"]):
        facts["atlas_sha256"] = hashlib.sha256(Path(settings["atlas"]).read_bytes()).hexdigest()
    facts["bundle"] = bundle.__version__
    return json.loads(impersonal(json.dumps(facts)))


def _calibration_facts(calibration: CalibrationFile) -> dict[str, Any]:
    known = calibration.load()
    facts = {k: known.provenance.get(k) for k in ("model_sha256", *(f"{part}_sha256" for part in PARTS))}
    facts["calibration_sha256"] = hashlib.sha256(Path(calibration.path).read_bytes()).hexdigest()
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


def _scan_facts(scan: Mapping[str, Any]) -> dict[str, Any]:
    """Place (its hash: paths may tell names), size and time of each file of a scan: another file of the same name is
    another scan.
    """
    files = {key: Path(value).resolve() for key, value in scan.items() if isinstance(value, str) and key != "name"}
    there = {key: file for key, file in sorted(files.items()) if file.exists()}
    places = {key: hashlib.sha256(os.fsencode(file)).hexdigest()[:16] for key, file in there.items()}
    return {key: [places[key], file.stat().st_size, file.stat().st_mtime_ns] for key, file in there.items()}


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
    rows, known = _earlier_results(Path(output_dir), run_facts(settings, calibration))
    names = [scan["name"] for scan in scans if known.get(scan["name"]) == _scan_facts(scan)]
    return {name: rows[name] for name in names if name in rows}


def _earlier_results(folder: Path, facts: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Of the scans whose results lie in ``folder`` and are of the same ``facts`` (`run_facts`): rows of ``summary.csv``
    by name, and facts of their files by name.
    """
    record = run_records(folder).get("inference", {})
    if record.get("settings") != facts or not (folder / "summary.csv").is_file():
        return {}, {}
    with (folder / "summary.csv").open(newline="") as table:
        rows = {row["name"]: row for row in csv.DictReader(table) if row.get("name") and is_done(row)}
    there = {
        name: row
        for name, row in rows.items()
        if any(result_path(folder, name, f"heatmap{ending}").is_file() for ending in RESULT_ENDINGS)
    }
    return there, {name: known for name, known in record.get("scans", {}).items() if name in there}


class SaveFindings:
    """Handler: write every scan's results, and ``summary.csv`` with one row each, those of earlier runs into the same
    folder with the same settings included.

    For a scan called NAME the folder ``OUT/NAME`` appears, complete or not at all, with ``NAME_heatmap.nii.gz``
    (float32), ``NAME_lesion.nii.gz`` and ``NAME_coverage.nii.gz`` (uint8; 0 not brain, 1 brain that was looked at, 2
    brain that was not), all on the input's grid (as ``.nrrd`` or ``.mha`` where the scan is of such a format), and
    ``NAME_report.png`` and ``NAME_report.html``, a viewer, and of a DICOM series ``NAME_lesion.seg.dcm``, if highdicom
    is installed; ``report.html`` is the table with links to them. The ``status`` of its row is "ok",
    "flagged: DOUBTS" or "failed: REASON"; of a scan that failed, no earlier results stay. When all scans are done and
    some have failed, an `InputError` with exit code 3 (2 if all have) lists them. A folder OUT/NAME that holds anything
    else, such as the scan itself, is refused before the work: what we did not write, we do not replace.

    Of the scans of a BIDS dataset OUT becomes a derivative, and the files have their places in it, see `result_path`.

    Expects in the output of the evaluator: ``name``, ``image`` and (optional) ``label``, whose files are read again
    for the pictures, ``heatmap``, ``lesion`` and ``coverage`` back on the input's grid, and ``result`` as
    `LabelMapd` makes it.

    Args:
        output_dir: OUT.
        find_lesions: the transform that cuts the heatmap; tells the pictures' scale.
        total: number of scans, for the progress line.
        settings: that the results depend on; kept in ``run.json``, see `run_facts`.
        scans: all that the run is about, finished or not.
        finished: rows of `finished_scans`.
        combine: what answers visits of several contrasts, when their scans are done; None answers scans only.
    """

    def __init__(
        self,
        output_dir: str,
        find_lesions: FindLesionsd,
        total: int,
        settings: Mapping[str, Any] | None = None,
        scans: Sequence[Mapping[str, Any]] = (),
        finished: Mapping[str, dict[str, Any]] | None = None,
        combine: CombineVisits | None = None,
    ) -> None:
        self.combine = combine
        self.output_dir, self.find_lesions, self.total = Path(output_dir), find_lesions, total
        self.settings, self.scans, self.finished = settings or {}, scans, finished or {}
        self.rows: list[dict[str, Any]] = []
        self.others: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self.begun = self.started = time.monotonic()

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.start_clock)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.save)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def start(self, engine: Engine) -> None:
        self.rows, self.begun = [], time.monotonic()
        # a threshold that does not exist, or a folder that cannot be written to, is told before the work
        for contrast in self.find_lesions.calibration.each():
            self.find_lesions.threshold(contrast=contrast)
        for scan in (*self.scans, *(self.combine.visits if self.combine else ())):
            _require_ours(self.output_dir / scan["name"])
        sources = [str(scan["image"]).removesuffix(scan["bids"]) for scan in self.scans if "bids" in scan]
        if sources:
            begin_derivative(self.output_dir, impersonal(Path(os.path.relpath(sources[0], self.output_dir)).as_posix()))
        claim_folder(self.output_dir)
        if is_main():
            facts = self.facts = run_facts(self.settings, self.find_lesions.calibration)
            scans = {scan["name"]: _scan_facts(scan) for scan in self.scans}
            rows, known = _earlier_results(self.output_dir, facts)
            self.others = [row for name, row in rows.items() if name not in scans]
            scans = {**{name: known[name] for name in known if name not in scans}, **scans}
            self._write_table(list(self.finished.values()))
            files = calibration_files(self.find_lesions.calibration)
            record_run(self.output_dir, "inference", files, settings=facts, scans=scans)
            if any(is_dicom_scan(scan["image"]) for scan in self.scans) and not has_highdicom():
                print(HINT)
            for name in self.finished:
                print(f"{name}: done before, with the same settings")

    def _write_table(self, rows: list[dict[str, Any]]) -> None:
        write_table(self.output_dir / "summary.csv", [*self.others, *rows], COLUMNS)
        write_overview(self.output_dir / "report.html", [*self.others, *rows], self.facts)

    def start_clock(self, engine: Engine) -> None:
        self.started = time.monotonic()

    def save(self, engine: Any) -> None:
        for batch, output in zip(as_list(engine.state.batch), engine.state.output):
            failure = output.get("failure")
            name = output["name"] if failure else batch["name"]
            row: dict[str, Any] = {"name": name, "status": f"failed: {failure}"}
            if not failure:
                data = {**batch, **output}
                status = f"flagged: {data['flags']}" if data.get("flags") else "ok"
                try:
                    row.update(self.write_scan(name, data), status=status)
                except InputError:
                    raise
                except OSError as error:  # the next scan would fare no better
                    raise unwritable(self.output_dir / name, error) from error
                except Exception as error:  # a picture of it cannot be drawn, or what else there may be
                    failure = explain(error)
                    row = {"name": name, "status": f"failed: {failure}"}
            if failure:
                remove_results(self.output_dir, name)
            row["seconds"] = f"{time.monotonic() - self.started:.1f}"
            self.rows.append(row)
            if is_main():
                self._write_table([*self.finished.values(), *self.rows])
            told = row["status"] if failure else f"{row['lesions']} lesions, {row['lesion_volume_ml']} ml"
            told += "" if failure or row["status"] == "ok" else f", {row['status']}"
            done = len(self.rows)
            left = (time.monotonic() - self.begun) / done * (self.total - done)
            until = f", {left / 60:.0f} min left" if left > 90 else ""
            print(f"[{done}/{self.total}] {name}: {told}, {row['seconds']} s{until}", flush=True)

    def write_scan(self, name: str, output: dict[str, Any]) -> dict[str, Any]:
        """Write the results of a scan, or visit, and return its row but for ``name``, ``status`` and ``seconds``."""
        affine, figures = output["heatmap"].affine, output["result"]
        contrast = output.get("contrast")
        row = {
            "contrast": "+".join(output.get("contrasts", [contrast or ""])),
            "lesion_volume_ml": f"{figures['lesion_volume_ml']:.2f}",
            "lesions": len(figures["lesions"]),
            "max_score": f"{figures['max_score']:.3f}",
            "mean_score": f"{figures['mean_score']:.3f}",
            "not_examined_percent": f"{figures['not_examined_percent']:.1f}",
        }
        percent = row["not_examined_percent"]
        left_out = "" if percent == "0.0" else f", {percent} % of the brain not examined"
        doubt = f"\nFLAGGED: {output['flags']}" if output.get("flags") else ""
        file = output["image"].meta["filename_or_obj"]
        header = nifti_header(file)
        fusion = self.find_lesions.calibration.load(contrast).fusion
        rule = None if fusion is None else fusion.rule
        self.output_dir.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.output_dir))
        try:
            for kind, dtype in (("heatmap", np.float32), ("lesion", np.uint8), ("coverage", np.uint8)):
                volume = np.asarray(output[kind][0]).astype(dtype)
                path = self._path(name, f"{kind}{result_ending(file)}", partial)
                write_result(path, volume, affine, header)
                if "bids" in output:
                    told = {"Score": figures["score"], "Threshold": figures["threshold"], "Contrast": row["contrast"]}
                    told |= {"Sources": output["sources"]} if "sources" in output else {}
                    write_json(self._path(name, f"{kind}.json", partial), sidecar(kind, output["bids"], told))
            if is_dicom_scan(file) and has_highdicom():
                told = {k: figures[k] for k in ("score", "threshold") if k in figures}
                self._write_segmentation(self._path(name, "lesion.seg.dcm", partial), output, told)
            view = View.of_result(output)
            scale = heat_scale(self.find_lesions.score, rule, self.find_lesions.threshold(contrast=contrast))
            title = f"{name}: {row['lesions']} lesions, {row['lesion_volume_ml']} ml{left_out}{doubt}"
            draw_report(self._path(name, "report.png", partial), title, view, figures["lesions"], *scale)
            page = self._path(name, "report.html")
            back = Path(os.path.relpath(self.output_dir / "report.html", page.parent)).as_posix()
            doubts = output.get("flags") or ""
            write_viewer(partial / page.name, name, view, figures, *scale, flags=doubts, back=back)
            share(partial)
            _put(partial, self.output_dir, name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return row

    @staticmethod
    def _write_segmentation(path: Path, output: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """The lesions as DICOM; a series that cannot be referred to has the other results all the same."""
        lesion, meta = output["lesion"], output["image"].meta
        try:
            with dicom_files(meta["filename_or_obj"], meta.get("named_contrast") or None) as files:
                write_segmentation(path, np.asarray(lesion[0]), lesion.affine, files, facts)
        except InputError as error:
            warnings.warn(f"{meta['filename_or_obj']}: no DICOM Segmentation: {error.message}")

    def _path(self, name: str, what: str, folder: Path | None = None) -> Path:
        """Where a result goes; or where it is written first, in ``folder``."""
        path = result_path(self.output_dir, name, what)
        return path if folder is None else folder / path.name

    def finish(self, engine: Engine) -> None:
        self.rows = [*self.finished.values(), *gather(self.rows)]
        if not is_main():  # one process tells it all
            return
        self.rows += self.combine(self, self.rows) if self.combine else []
        failed = [r for r in self.rows if not is_done(r)]
        self._write_table(self.rows)
        widths = [max(len(str(r.get(c, ""))) for r in (*self.rows, dict(zip(COLUMNS, COLUMNS)))) for c in COLUMNS]
        for row in (dict(zip(COLUMNS, COLUMNS)), *self.rows):
            print("  ".join(str(row.get(c, "")).ljust(w) for c, w in zip(COLUMNS, widths)).rstrip())
        print(f"{self.output_dir / 'summary.csv'}: {len(self.rows) - len(failed)} of {len(self.rows)} scans done")
        if failed:
            lines = [f"{r['name']}: {r['status']}" for r in failed]
            raise InputError("; ".join(lines), exit_code=2 if len(failed) == len(self.rows) else 3)


def is_done(row: Mapping[str, Any]) -> bool:
    """Whether a row of ``summary.csv`` is of a scan with results, doubtful ones included."""
    return str(row.get("status", "")).startswith(("ok", "flagged"))


def as_list(batch: Any) -> list[dict[str, Any]]:
    return batch if isinstance(batch, list) else [batch]


def _require_ours(folder: Path) -> None:
    """Raises: InputError: what is there is not the results of a scan."""
    volumes = {f"{kind}{ending}" for kind in ("heatmap", "lesion", "coverage") for ending in RESULT_ENDINGS}
    results = {f"{folder.name}_{what}" for what in (*volumes, "lesion.seg.dcm", "report.png", "report.html")}
    if folder.exists() and not (
        folder.is_dir() and all(f.name in results or f.name.startswith(".") for f in folder.iterdir())
    ):
        raise InputError(
            f"{folder}: would be replaced by results, but holds files that are none; choose another output folder"
        )


def _put(new: Path, output_dir: Path, name: str) -> None:
    """Put the files of the folder ``new`` in the place of a scan's results."""
    heatmap = result_path(output_dir, name, f"heatmap{RESULT_ENDINGS[0]}")
    if heatmap.parent == output_dir / name:
        return _replace_folder(new, heatmap.parent)
    remove_results(output_dir, name)
    heatmap.parent.mkdir(parents=True, exist_ok=True)
    for file in sorted(new.iterdir(), key=lambda file: file.name == heatmap.name):  # last: it says that all are there
        file.replace(heatmap.parent / file.name)


def remove_results(output_dir: Path, name: str) -> None:
    """Remove what an earlier run has left of a scan."""
    folder = result_path(output_dir, name, "report.png").parent
    if folder == output_dir / name:
        if folder.is_dir():
            _require_ours(folder)
            shutil.rmtree(folder)
        return
    for kind in ("heatmap", "lesion", "coverage", "report"):
        for ending in (*RESULT_ENDINGS, ".json", ".png", ".html"):
            result_path(output_dir, name, kind + ending).unlink(missing_ok=True)


def _replace_folder(new: Path, old: Path) -> None:
    """Put folder ``new`` in the place of ``old``, which is moved away first: a rename cannot replace a full folder."""
    _require_ours(old)
    if old.exists():
        away = Path(tempfile.mkdtemp(prefix=".replaced-", dir=old.parent))
        old.replace(away / old.name)
        new.replace(old)
        shutil.rmtree(away)
    else:
        new.replace(old)

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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ignite.engine import Engine, Events

import bundle
from bundle.command_line import impersonal, record_run
from bundle.data.bids import begin_derivative, result_path, sidecar
from bundle.data.dicom import dicom_files, is_dicom_scan
from bundle.data.dicom_seg import HINT, has_highdicom, write_segmentation
from bundle.data.files import AUTO, alone_in, claim_folder, is_there, share, unwritable, write_json, write_text
from bundle.data.volumes import RESULT_ENDINGS, nifti_header, result_ending, write_result
from bundle.errors import InputError, explain
from bundle.parallel import Shard, gather, is_main
from bundle.scoring import PARTS, CalibrationFile, FindLesionsd
from bundle.shards import Records
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
    rows = _valid(output_dir, map(records.read, scans))
    return {row["name"]: row for row in rows if is_done(row)}


def _valid(output_dir: str | Path, rows: Iterable[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """Those of the rows in the scans' records whose results are still there, or that tell of a failure."""

    def there(name: str) -> bool:
        return any(result_path(output_dir, name, f"heatmap{ending}").is_file() for ending in RESULT_ENDINGS)

    return [row for row in rows if row and (not is_done(row) or there(row["name"]))]


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
        shard: which of them this process sees, see `bundle.parallel.Shard`. The table is of all that are done by then.
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
        shard: str = "",
        combine: CombineVisits | None = None,
    ) -> None:
        self.combine = combine
        self.output_dir, self.find_lesions, self.total = Path(output_dir), find_lesions, total
        self.settings, self.scans, self.finished = settings or {}, scans, finished or {}
        self.rows: list[dict[str, Any]] = []
        self.others: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self.by_name = {scan["name"]: scan for scan in scans}
        self.shard = Shard.of(shard)
        self.records: Records | None = None
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
        for scan in (*self.shard.share(self.scans), *self._visits()):
            _require_ours(self.output_dir / scan["name"])
        sources = [str(scan["image"]).removesuffix(scan["bids"]) for scan in self.scans if "bids" in scan]
        if sources:
            begin_derivative(self.output_dir, impersonal(Path(os.path.relpath(sources[0], self.output_dir)).as_posix()))
        claim_folder(self.output_dir, self.shard)
        facts = self.facts = run_facts(self.settings, self.find_lesions.calibration)
        self.records = Records(self.output_dir, self.scans, self.shard, made_from=facts, keep=True)
        if is_main():
            self.others = [row for row in _valid(self.output_dir, self.records.others()) if is_done(row)]
            self._write_table()
            files = calibration_files(self.find_lesions.calibration)
            record_run(self.output_dir, "inference", files, settings=facts)
            if any(is_dicom_scan(scan["image"]) for scan in self.scans) and not has_highdicom():
                print(HINT)
            for name in self.finished:
                print(f"{name}: done before, with the same settings")
            print(f"{self.total} of {len(self.scans)} scans to look at, results go to {self.output_dir}", flush=True)

    def _visits(self) -> Sequence[Mapping[str, Any]]:
        return self.combine.visits if self.combine else ()

    def _write_table(self, with_visits: bool = False) -> list[dict[str, Any]]:
        """Write what is known by now, and return it: of other scans in the folder, of the run's in their order, and of
        visits, if they are to be answered: whichever shard sees the last of a visit's scans does that.
        """
        with alone_in(self.output_dir):
            rows = [*self.finished.values(), *self.rows]
            if self.records and self.shard:
                rows = _valid(self.output_dir, map(self.records.read, self.scans))
            place = {name: k for k, name in enumerate(self.by_name)}
            rows = [*self.others, *sorted(rows, key=lambda row: place.get(row["name"], 0))]
            if with_visits and self.combine:
                rows += self.combine(self, rows)
            write_table(self.output_dir / "summary.csv", rows, COLUMNS)
            write_overview(self.output_dir / "report.html", rows, self.facts)
        return rows

    def start_clock(self, engine: Engine) -> None:
        self.started = time.monotonic()

    def save(self, engine: Any) -> None:
        for batch, output in zip(as_list(engine.state.batch), engine.state.output):
            failure = output.get("failure")
            name = output["name"] if failure else batch["name"]
            row: dict[str, Any] = {"name": name, "status": f"failed: {failure}"}
            scan = self.by_name.get(name)
            if self.records and scan:
                self.records.remove(scan)
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
            if self.records and scan:
                self.records.write(scan, row)
            if is_main() and not self.shard:  # shards would rewrite each other's table all the time
                self._write_table()
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
        self.rows = gather(self.rows)
        if not is_main():  # one process tells it all
            return
        everyone = self._write_table(with_visits=True)
        ours = {scan["name"] for scan in (*self.shard.share(self.scans), *self._visits())}
        rows = [r for r in everyone if r["name"] in ours]
        failed = [r for r in rows if not is_done(r)]
        widths = [max(len(str(r.get(c, ""))) for r in (*rows, dict(zip(COLUMNS, COLUMNS)))) for c in COLUMNS]
        for row in (dict(zip(COLUMNS, COLUMNS)), *rows):
            print("  ".join(str(row.get(c, "")).ljust(w) for c, w in zip(COLUMNS, widths)).rstrip())
        told = f"{self.output_dir / 'summary.csv'}: {len(rows) - len(failed)} of {len(rows)} scans done"
        print(told + (f" by shard {self.shard}; it tells of {len(everyone)} scans" if self.shard else ""))
        if failed:
            lines = [f"{r['name']}: {r['status']}" for r in failed]
            raise InputError("; ".join(lines), exit_code=2 if len(failed) == len(rows) else 3)


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

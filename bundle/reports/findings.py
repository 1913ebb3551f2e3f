"""What inference leaves behind: an answer to each scan as it comes, one table for all, and a word about each."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ignite.engine import Engine, Events

from bundle.command_line import impersonal, record_run
from bundle.data.bids import begin_derivative
from bundle.data.dicom import is_dicom_scan
from bundle.data.dicom_seg import HINT, has_highdicom
from bundle.data.files import alone_in, claim_folder, unwritable
from bundle.errors import InputError, explain
from bundle.inference.scans import seen_scans
from bundle.parallel import Shard, gather, is_main
from bundle.scoring import FindLesionsd
from bundle.shards import Records

from .answer import remove_results, require_ours, write_answer
from .pages import write_overview
from .resuming import calibration_files, run_facts, valid_rows
from .table import COLUMNS, is_done, write_table

if TYPE_CHECKING:
    from .visits import CombineVisits

_TABLE_SHARE = 20.0  # the table is not written again before so many times as long as that took


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
        self.next_table = 0.0

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
            require_ours(self.output_dir / scan["name"])
        sources = [str(scan["image"]).removesuffix(scan["bids"]) for scan in self.scans if "bids" in scan]
        if sources:
            begin_derivative(self.output_dir, impersonal(Path(os.path.relpath(sources[0], self.output_dir)).as_posix()))
        claim_folder(self.output_dir, self.shard)
        facts = self.facts = run_facts(self.settings, self.find_lesions.calibration)
        self.records = Records(self.output_dir, self.scans, self.shard, made_from=facts, keep=True)
        if is_main():
            self.others = [row for row in valid_rows(self.output_dir, self.records.others()) if is_done(row)]
            self._write_table()
            files = calibration_files(self.find_lesions.calibration)
            record_run(self.output_dir, "inference", files, settings=facts)
            if any(is_dicom_scan(scan["image"]) for scan in self.scans) and not has_highdicom():
                print(HINT)
            for name in self.finished:
                print(f"{name}: done before, with the same settings")
            for scan in self.scans:  # the records of finished ones have been read, and are theirs
                if scan["name"] not in self.finished and self.records.is_of_another(scan):
                    print(f"{scan['name']}: its results in {self.output_dir} are of another file, and will be replaced")
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
                rows = valid_rows(self.output_dir, map(self.records.read, self.scans))
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
        for batch, output in seen_scans(engine):
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
            # shards would rewrite each other's table all the time; one of thousands of scans takes its time to write
            if is_main() and not self.shard and time.monotonic() > self.next_table:
                begun = time.monotonic()
                self._write_table()
                self.next_table = time.monotonic() + _TABLE_SHARE * (time.monotonic() - begun)
            told = row["status"] if failure else f"{row['lesions']} lesions, {row['lesion_volume_ml']} ml"
            told += "" if failure or row["status"] == "ok" else f", {row['status']}"
            done = len(self.rows)
            left = (time.monotonic() - self.begun) / done * (self.total - done)
            until = f", {left / 60:.0f} min left" if left > 90 else ""
            print(f"[{done}/{self.total}] {name}: {told}, {row['seconds']} s{until}", flush=True)

    def write_scan(self, name: str, output: Mapping[str, Any]) -> dict[str, Any]:
        """Write the results of a scan, or visit, and return its row but for ``name``, ``status`` and ``seconds``."""
        return write_answer(self.output_dir, name, output, self.find_lesions)

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

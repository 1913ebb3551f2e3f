"""What evaluation leaves behind: ``metrics.json``, ``metrics.csv``, ``report.html`` and a viewer of each case."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import monai
import torch
from ignite.engine import Engine, Events

import bundle
from bundle.command_line import record_run
from bundle.data.files import claim_folder, write_json
from bundle.errors import InputError
from bundle.inference.scans import seen_scans
from bundle.metrics import CASE_METRICS, Case, measure_methods, summarise
from bundle.parallel import is_main
from bundle.scoring import FindLesionsd
from bundle.shards import Records

from .figure import heat_scale
from .html import Strip, write_report
from .pages import write_viewer
from .resuming import calibration_files
from .table import write_table
from .view import View
from .viewer import describe_findings


class SaveMetrics:
    """Handler: measure every method on every scan, and at the end write the figures and print a table.

    ``metrics.json`` holds ``methods`` (name -> figures of the cohort), ``cases`` (name -> method -> figures), as
    `bundle.metrics.summarise` makes them, ``threshold`` with how it was chosen, and ``settings``; null is a figure that
    is not defined. ``metrics.csv`` has one row per case and method, ``report.html`` shows it all, with a viewer of each
    case in ``cases``. Scans that failed are listed at the end by an `InputError` with exit code 3 (2 if all have).

    Args:
        output_dir: where to.
        find_lesions: the transform that cuts the heatmap; tells score and threshold.
        settings: what else made the numbers, kept with them.
        total: number of scans, for the progress line.
        records: of all scans; while other shards have some to do, no figures are written.
    """

    def __init__(
        self,
        output_dir: str,
        find_lesions: FindLesionsd,
        settings: Mapping[str, Any],
        total: int,
        records: Records,
    ) -> None:
        self.output_dir, self.find_lesions, self.total = Path(output_dir), find_lesions, total
        self.settings, self.records = dict(settings), records
        self.done, self.failures = 0, list[str]()

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def start(self, engine: Engine) -> None:
        self.done, self.failures = 0, []
        self.find_lesions.threshold()  # a threshold that does not exist is told before the work
        claim_folder(self.output_dir, self.records.shard)

    def collect(self, engine: Any) -> None:
        for batch, output in seen_scans(engine):
            self.done += 1
            if "failure" in output:
                self.failures.append(f"{output['name']}: failed: {output['failure']}")
                self.records.write(output, {"failure": self.failures[-1]})
                print(self.failures[-1], flush=True)
                continue
            data = {key: value for key, value in {**batch, **output}.items() if value is not None}
            name, purpose = data["name"], data["purpose"]
            person = data.get("person", data.get("subject", name))
            case = Case(name, person, purpose, measure_methods(data, self.find_lesions.score))
            if purpose == "test":
                self._write_page(name, data)
            self.records.write(data, {"case": case, "strip": Strip.of(data) if purpose == "test" else None})
            doubt = f", flagged: {data['flags']}" if data.get("flags") else ""
            print(f"[{self.done}/{self.total}] {purpose}: {name}{doubt}", flush=True)

    def _write_page(self, name: str, data: Mapping[str, Any]) -> None:
        """``cases/NAME.html``: the viewer of a case, where the metrics are taken, with its true lesions."""
        cut, fusion = self.find_lesions, self.find_lesions.calibration.load().fusion
        image, heatmap, lesion = (data[key].cpu() for key in ("image", "heatmap", "lesion"))
        result = describe_findings(heatmap, lesion, image > 0, data.get("to_atlas"), data.get("native_to_atlas"))
        write_viewer(
            self.output_dir / f"cases/{name}.html",
            name,
            View.of(image, heatmap, image, lesion, data.get("label")),
            {**result, "threshold": cut.threshold()},
            *heat_scale(cut.score, None if fusion is None else fusion.rule, cut.threshold()),
            flags=data.get("flags") or "",
        )

    def finish(self, engine: Any) -> None:
        contents = self.records.all()
        if contents is None:
            if self.failures:
                raise InputError("; ".join(self.failures), exit_code=3)
            return
        failures = [content["failure"] for content in contents if "failure" in content]
        cases = [Case.of(content["case"]) for content in contents if "case" in content]
        strips = [content["strip"] for content in contents if content.get("strip")]
        strips = [strip if isinstance(strip, Strip) else Strip(**strip) for strip in strips]
        if not any(c.purpose == "test" for c in cases):
            raise InputError("; ".join(failures))
        score = self.find_lesions.score
        content = summarise(cases, score)
        engine.state.metrics.update({f"{k}_mean": content["methods"][score][f"{k}_mean"] for k in ("auprc", "dice")})
        if not is_main():  # one process tells it all
            return
        content |= {"threshold": self._threshold(content), "settings": self._settings(), "failed": failures}
        record_run(self.output_dir, "evaluation", calibration_files(self.find_lesions.calibration))
        write_json(self.output_dir / "metrics.json", content)
        rows = [
            {"case": name, "method": method, **values}
            for name, by_method in content["cases"].items()
            for method, values in by_method.items()
        ]
        write_table(self.output_dir / "metrics.csv", rows, ["case", "method", *CASE_METRICS])
        write_report(self.output_dir / "report.html", content, [c for c in cases if c.purpose == "test"], strips)
        print(format_table(content["methods"]))
        number = len(content["cases"])
        print(f"{self.output_dir / 'metrics.json'}: {number} cases, {content['cases_with_lesions']} with lesions")
        print(f"{self.output_dir / 'report.html'}: curves and pictures")
        if failures:
            raise InputError("; ".join(failures), exit_code=3)

    def _threshold(self, content: Mapping[str, Any]) -> dict[str, Any]:
        cut = self.find_lesions
        chosen = f"{cut.rule()}; other methods are cut at theirs"
        if cut.fixed_threshold is not None:
            chosen = f"set by hand; other methods are cut by {cut.rule()}"
        tuned = f"best mean Dice on {content['tuning_cases']} scans of the tuning section"
        return {
            "value": cut.threshold(),
            "chosen_by": chosen,
            "tuned_by": tuned if content["tuning_cases"] else "not tuned: the dataset has no tuning section",
            "dice_best": "upper bound: the best threshold of each scan, chosen by its own lesions",
        }

    def _settings(self) -> dict[str, Any]:
        calibration = self.find_lesions.calibration.load()
        versions = {"bundle": bundle.__version__, "monai": monai.__version__, "torch": torch.__version__}
        return {
            "score": self.find_lesions.score,
            "fusion": str(calibration.fusion) if self.find_lesions.score == "fusion" else None,
            **self.settings,
            "calibration": dict(calibration.provenance),
            "versions": versions,
        }


def format_table(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """Methods as a plain-text table."""

    def cell(value: float | None) -> str:
        return f"{'-':>10}" if value is None else f"{value:>10.4f}"

    columns = {
        "AUPRC": "auprc_mean",
        "pooled": "auprc_pooled",
        "Dice": "dice_mean",
        "tuned": "dice_tuned_mean",
        "(bound)": "dice_best_mean",
    }
    lines = [f"{'method':<20}" + "".join(f"{title:>10}" for title in columns)]
    lines += [f"{name:<20}" + "".join(cell(m.get(key)) for key in columns.values()) for name, m in methods.items()]
    return "\n".join(lines)

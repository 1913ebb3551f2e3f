"""What evaluation leaves behind: ``metrics.json`` and ``metrics.csv``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events

from bundle.data.files import write_json
from bundle.errors import InputError
from bundle.metrics import BASELINES
from bundle.parallel import gather, is_main
from bundle.scoring import FindLesionsd

from .findings import as_list, write_table

_PER_CASE = ("auprc", "dice")


def _number(value: Any) -> float | None:
    """A float for JSON, None for NaN (a case or cohort without lesions has no AUPRC and no Dice)."""
    value = float(value)
    return None if math.isnan(value) else value


class SaveMetrics:
    """Handler: write the metrics of `bundle.metrics.comparison_metrics`, per case and as means, and print a table.

    ``metrics.json`` holds ``methods`` (name -> mean AUPRC, pooled AUPRC, mean Dice), ``cases`` (name -> method ->
    AUPRC, Dice; null without lesions), ``threshold`` with how it was chosen, and the settings. ``metrics.csv`` has one
    row per case and method.

    Args:
        output_dir: where to.
        find_lesions: the transform that cuts the heatmap; tells score and threshold.
        settings: what else made the numbers, kept with them.
    """

    def __init__(self, output_dir: str, find_lesions: FindLesionsd, settings: Mapping[str, Any]) -> None:
        self.output_dir, self.find_lesions = Path(output_dir), find_lesions
        self.settings = {"score": find_lesions.score, **settings}
        self.names: list[str] = []
        self.failures: list[str] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def start(self, engine: Engine) -> None:
        self.names, self.failures = [], []
        self.find_lesions.threshold()  # a threshold that does not exist is told before the work

    def collect(self, engine: Any) -> None:
        for batch, output in zip(as_list(engine.state.batch), engine.state.output):
            if "failure" in output:
                self.failures.append(f"{output['name']}: failed: {output['failure']}")
                print(self.failures[-1], flush=True)
            else:
                self.names.append(batch["name"])
                print(f"evaluated {len(self.names)}: {batch['name']}", flush=True)

    def finish(self, engine: Any) -> None:
        self.names, self.failures = gather(self.names), gather(self.failures)
        if not is_main():  # one process tells it all
            return
        if not self.names:
            raise InputError("; ".join(self.failures))
        metrics, details = engine.state.metrics, engine.state.metric_details
        score = self.settings["score"]
        suffixes = {score: "", **{name: f"_{name}" for name in BASELINES if name != score}}
        methods = {
            method: {
                "auprc_mean": _number(metrics[f"auprc{suffix}"]),
                "auprc_pooled": _number(metrics[f"auprc_pooled{suffix}"]),
                "dice_mean": _number(metrics[f"dice{suffix}"]),
            }
            for method, suffix in suffixes.items()
        }
        cases = {
            name: {
                method: {metric: _number(details[f"{metric}{suffix}"][i, 0]) for metric in _PER_CASE}
                for method, suffix in suffixes.items()
            }
            for i, name in enumerate(self.names)
        }
        content = {
            "methods": methods,
            "cases": cases,
            "cases_with_lesions": sum(c["all_positive"]["auprc"] is not None for c in cases.values()),
            "threshold": {
                "value": self.find_lesions.threshold(),
                "chosen_by": self._chosen_by(),
            },
            "settings": self.settings,
            "failed": self.failures,
        }
        write_json(self.output_dir / "metrics.json", content)
        rows = [
            {"case": name, "method": method, **values}
            for name, by_method in cases.items()
            for method, values in by_method.items()
        ]
        write_table(self.output_dir / "metrics.csv", rows, ["case", "method", *_PER_CASE])
        print(format_table(methods))
        print(
            f"{self.output_dir / 'metrics.json'}: {len(self.names)} cases, {content['cases_with_lesions']} with lesions"
        )
        if self.failures:
            raise InputError("; ".join(self.failures), exit_code=3)

    def _chosen_by(self) -> str:
        cut = self.find_lesions
        baselines = f"baselines are cut at their own value of healthy quantile {cut.quantile:g}"
        if cut.fixed_threshold is not None:
            return f"set by hand; {baselines}"
        return f"quantile {cut.quantile:g} of the brain voxels of healthy scans held out for calibration; {baselines}"


def format_table(methods: Mapping[str, Mapping[str, float | None]]) -> str:
    """Methods as a plain-text table."""

    def cell(value: float | None) -> str:
        return f"{'-':>12}" if value is None else f"{value:>12.4f}"

    header = f"{'method':<14}{'AUPRC mean':>12}{'pooled':>12}{'Dice mean':>12}"
    lines = [
        f"{n:<14}{cell(m['auprc_mean'])}{cell(m['auprc_pooled'])}{cell(m['dice_mean'])}" for n, m in methods.items()
    ]
    return "\n".join([header, *lines])

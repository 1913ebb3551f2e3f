"""The demo: a cohort of phantoms, from training to a score, with the commands that one would use on real scans."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bundle.reports.metrics import format_table

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str) -> None:
    """Show a command, run it in the checkout, and stop the demo where it fails."""
    print("\n$ " + " ".join(f'"{c}"' if "'" in c else c for c in command), flush=True)
    started = time.monotonic()
    # the runner warns that configs run code; these are ours
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    result = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, env=environment)
    if result.returncode:
        sys.exit(f"demo: stopped, the command above ended with {result.returncode}")
    print(f"({time.monotonic() - started:.0f} s)", flush=True)


def runner(run_id: str, config: str, *overrides: str) -> None:
    """Run one of the bundle's configs through MONAI's runner."""
    run("python", "-m", "monai.bundle", "run", run_id, "--config_file", f"configs/{config}.json", *overrides)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="demo", help="where everything goes")
    parser.add_argument("--max_epochs", type=int, default=100, help="passes over the training subjects")
    args = parser.parse_args()
    started = time.monotonic()
    cohort, models, results = (f"{args.output_dir}/{name}" for name in ("cohort", "models", "results"))
    use = ("--dataset_dir", cohort, "--ckpt_dir", models)

    run("python", "scripts/make_demo_cohort.py", "--output_dir", cohort)
    epochs = str(args.max_epochs)
    runner("training", "train", *use, "--max_epochs", epochs, "--val_interval", "20")
    runner("calibration", "calibrate", *use)
    runner("inference", "inference", *use, "--output_dir", results)
    runner("evaluation", "evaluate", *use, "--output_dir", results)

    metrics = json.loads((ROOT / results / "metrics.json").read_text())
    location, floor = (metrics["methods"][m]["auprc_mean"] for m in ("location", "all_positive"))
    ranked = sorted(metrics["cases"], key=lambda name: metrics["cases"][name][metrics["settings"]["score"]]["auprc"])
    median = ranked[len(ranked) // 2]
    print(f"\nPlanted lesions in {len(metrics['cases'])} phantoms that were never trained on:\n")
    print(format_table(metrics["methods"]))
    print(
        f"\nThe location score alone finds them {location / floor:.1f} times better than chance (all_positive). "
        f"Threshold {metrics['threshold']['value']:.2f}: {metrics['threshold']['chosen_by']}."
    )
    print("Phantoms share one anatomy, which flatters atlas_z and the fusion with it; the README has real scans.")
    print(f"Done in {time.monotonic() - started:.0f} s. Now look at the median case, neither best nor worst:\n")
    print(ROOT / results / median / f"{median}_report.png")


if __name__ == "__main__":
    main()

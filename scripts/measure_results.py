"""Measure what inference wrote against a mask of the true lesions: each scan, and the combined answer to each visit."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from monai.metrics import DiceHelper
from monai.transforms import ResampleToMatch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bundle.data.bids import result_path  # noqa: E402
from bundle.data.volumes import RESULT_ENDINGS  # noqa: E402
from bundle.errors import InputError, report_in_one_line  # noqa: E402
from bundle.metrics import average_precision  # noqa: E402
from bundle.reports.table import is_done  # noqa: E402
from bundle.transforms import LoadScand  # noqa: E402


def measure(folder: Path, name: str, label_file: Path) -> tuple[float, float]:
    """AUPRC over the brain's and the lesions' voxels, and Dice, in the space of the result."""
    kinds = ("heatmap", "lesion", "coverage")
    there = [e for e in RESULT_ENDINGS if result_path(folder, name, f"heatmap{e}").is_file()]
    if not there:
        raise InputError(f"{folder}: the heatmap of {name} is gone; run the inference again")
    files = {kind: str(result_path(folder, name, kind + there[0])) for kind in kinds}
    data = LoadScand([*kinds, "label"])({**files, "label": str(label_file)})
    label = ResampleToMatch(mode="nearest", padding_mode="zeros")(data["label"], img_dst=data["heatmap"]) > 0
    if not label.any():
        raise InputError(f"{label_file}: marks nothing in {name}; is it of the same subject and space?")
    inside = (data["coverage"] > 0) | label
    dice, _ = DiceHelper(include_background=True, apply_argmax=False)(data["lesion"][None] > 0, label[None])
    return average_precision(data["heatmap"][inside].as_tensor(), label[inside].as_tensor()), float(dice)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", required=True, type=Path, help="of an inference")
    parser.add_argument("--label", required=True, type=Path, help="true lesions, in the world of the scans")
    args = parser.parse_args()
    report_in_one_line()
    table = args.output_dir / "summary.csv"
    if not table.is_file() or not args.label.is_file():
        raise InputError(f"{args.label if table.is_file() else table}: not found")
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if is_done(row)]
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        auprc, dice = measure(args.output_dir, row["name"], args.label)
        print(f"{row['name']:{width}}  {row['contrast']:12}  AUPRC {auprc:.3f}  Dice {dice:.3f}")


if __name__ == "__main__":
    main()

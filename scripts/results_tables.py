"""Print the tables of docs/results.md from the evaluations that docs/reproduce.md makes (step 3), as Markdown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bundle.data.files import read_json  # noqa: E402
from bundle.errors import report_in_one_line  # noqa: E402
from bundle.reports.table import print_table  # noqa: E402

CONTRASTS = {"t1": "T1w", "t2": "T2w", "flair": "FLAIR"}
METHODS = ["fusion", "location", "asymmetry", "reconstruction", "segmentation", "atlas_z", "intensity", "all_positive"]
SIZES = ("below 0.1 ml", "0.1 to 1 ml", "1 to 10 ml", "above 10 ml")
Figures = Mapping[str, Any]


def figures(folder: Path) -> Figures:
    """What an evaluation wrote.

    Raises:
        InputError: it wrote nothing there.
    """
    return read_json(folder / "metrics.json", "evaluation")


def of_case(name: str) -> Callable[[Figures, str], str]:
    """AUPRC of the case whose name begins so, and its Dice at the operating point."""

    def cell(found: Figures, method: str) -> str:
        case = next(case for key, case in found["cases"].items() if key.startswith(name))[method]
        return f"{case['auprc']:.3f} ({case['dice']:.2f})"

    return cell


def of_all(found: Figures, method: str) -> str:
    """Mean AUPRC, its interval, and mean Dice at the operating point."""
    mean = found["methods"][method]
    low, high = mean["auprc_ci95"]
    return f"{mean['auprc_mean']:.3f} [{low:.2f}, {high:.2f}] ({mean['dice_mean']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of eval_t1, eval_glioma, eval_ms_t1, eval_healthy_t1 ...")
    folder = parser.parse_args().folder
    report_in_one_line()
    patient26 = of_case("patient26")
    patients = [(figures(folder / f"eval_{c}"), f"patient26 {name}", patient26) for c, name in CONTRASTS.items()]
    glioma = figures(folder / "eval_glioma")
    patients += [(glioma, f"{name} FLAIR", of_case(name)) for name in ("pat0001", "pat0005")]
    planted = [
        (figures(folder / f"eval_{family}_{c}"), f"{title} {name}", of_all)
        for c, name in CONTRASTS.items()
        for family, title in (("ms", "MS"), ("strokes", "strokes"))
    ]
    for title, table in (("Real patients: AUPRC (Dice)", patients), ("Planted: AUPRC [interval] (Dice)", planted)):
        rows = [[f"`{method}`", *(cell(found, method) for found, _, cell in table)] for method in METHODS]
        print_table(title, ["", *(name for _, name, _ in table)], rows)

    def by_size(found: Figures, size: str) -> str:
        ours, bright = (found["methods"][m]["lesions"][size] for m in ("fusion", "intensity"))
        return f"{ours['found']} of {ours['lesions']} ({bright['found']})"

    def by_size_strict(found: Figures, size: str) -> str:
        lesions = found["methods"]["fusion_strict"]["lesions"][size]
        return f"{lesions['found']} of {lesions['lesions']}"

    rows = [[size, *(by_size(found, size) for found, _, _ in planted)] for size in SIZES]
    rows += [[f"{size}, `strict`", *(by_size_strict(found, size) for found, _, _ in planted)] for size in SIZES[1:3]]
    print_table("Found by size: fusion (intensity)", ["", *(name for _, name, _ in planted)], rows)
    rows = []
    for section, prefix in (("test", "eval_healthy_"), ("validation", "eval_ms_")):
        for c, name in CONTRASTS.items():
            found = figures(folder / f"{prefix}{c}")["methods"]
            for method in ("fusion", "fusion_strict", "location", "atlas_z", "intensity"):
                healthy = found[method]["healthy"]
                counts = [f"{healthy['false_findings_per_scan']:.1f}", f"{healthy['scans_with_findings']:.1f}"]
                rows.append([f"`{method}` {name}, {section}", *counts, f"{healthy['marked_share_of_brain']:.2%}"])
    print_table("Healthy", ["", "findings per scan", "share of scans with any", "share of the brain marked"], rows)


if __name__ == "__main__":
    main()

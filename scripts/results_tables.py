"""Print the tables of docs/results.md from the evaluations that docs/reproduce.md makes (step 3), as Markdown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
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


def of_case(found: Figures, method: str) -> str:
    """AUPRC of a case, and its Dice at the operating point."""
    return f"{found[method]['auprc']:.3f} ({found[method]['dice']:.2f})"


def of_all(found: Figures, method: str) -> str:
    """Mean AUPRC, its interval, and mean Dice at the operating point."""
    mean = found["methods"][method]
    low, high = mean["auprc_ci95"]
    return f"{mean['auprc_mean']:.3f} [{low:.2f}, {high:.2f}] ({mean['dice_mean']:.2f})"


def of_size(found: Figures, size: str, method: str, beside: str = "") -> str:
    """How many lesions of a size a method found, of how many; in brackets how many of them another one did."""
    ours, other = (found["methods"][m]["lesions"][size] if m else None for m in (method, beside))
    return f"{ours['found']} of {ours['lesions']}" + (f" ({other['found']})" if other else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of eval_t1, eval_glioma, eval_ms_t1, eval_healthy_t1 ...")
    folder = parser.parse_args().folder
    report_in_one_line()

    def case(evaluation: str, name: str) -> Figures:
        cases = figures(folder / evaluation)["cases"]
        return next(found for key, found in cases.items() if key.startswith(name))

    patients = {f"patient26 {title}": case(f"eval_{c}", "patient26") for c, title in CONTRASTS.items()}
    patients |= {f"{name} FLAIR": case("eval_glioma", name) for name in ("pat0001", "pat0005")}
    planted = {
        f"{title} {name}": figures(folder / f"eval_{family}_{c}")
        for c, name in CONTRASTS.items()
        for family, title in (("ms", "MS"), ("strokes", "strokes"))
    }
    rows = [[f"`{method}`", *(of_case(found, method) for found in patients.values())] for method in METHODS]
    false = [f"{found['fusion']['false_findings']:.0f}" for found in patients.values()]
    print_table("Real patients: AUPRC (Dice)", ["", *patients], [*rows, ["`fusion`: false findings", *false]])
    rows = [[f"`{method}`", *(of_all(found, method) for found in planted.values())] for method in METHODS]
    print_table("Planted: AUPRC [interval] (Dice)", ["", *planted], rows)
    rows = [[size, *(of_size(found, size, "fusion", "intensity") for found in planted.values())] for size in SIZES]
    for point in ("strict", "screening"):
        for size in SIZES[1:3]:
            cells = [of_size(found, size, f"fusion_{point}") for found in planted.values()]
            rows.append([f"{size}, `{point}`", *cells])
    print_table("Found by size: fusion (intensity)", ["", *planted], rows)
    rows = []
    for section, prefix in (("test", "eval_healthy_"), ("validation", "eval_ms_")):
        for c, name in CONTRASTS.items():
            found = figures(folder / f"{prefix}{c}")["methods"]
            for method in ("fusion", "fusion_strict", "fusion_screening", "location", "atlas_z", "intensity"):
                healthy = found[method]["healthy"]
                counts = [f"{healthy['false_findings_per_scan']:.1f}", f"{healthy['scans_with_findings']:.1f}"]
                rows.append([f"`{method}` {name}, {section}", *counts, f"{healthy['marked_share_of_brain']:.2%}"])
    print_table("Healthy", ["", "findings per scan", "share of scans with any", "share of the brain marked"], rows)


if __name__ == "__main__":
    main()

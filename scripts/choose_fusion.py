"""Choose the fusion of a contrast: which calibrated maps, with which weights and rule, find most of a tuning set.

Every scan's maps are made once; then every combination of weights is tried on them. The best is the one with the
highest AUPRC (mean over subjects, scans of one subject averaged first); of those within --margin of it the one of the
fewest maps is taken, so that a map that does not help costs nobody time. Planted lesions are not real ones: with
--check_dir only fusions are taken whose mean over the real scans there is that of the best of all fusions, less
--check_margin at most. Put what is printed into "usual_weights" of configs/calibrate.json (or give it as
--fusion_weights) and calibrate.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bundle.data.files import write_json  # noqa: E402
from bundle.errors import InputError, report_in_one_line  # noqa: E402
from bundle.metrics import average_precision  # noqa: E402
from bundle.reports.table import print_table  # noqa: E402
from bundle.scoring import RULES, Fusion  # noqa: E402
from scripts.ablation import Bench, Scan  # noqa: E402


class Case(NamedTuple):
    """Calibrated maps of a scan's brain, ``[N]`` each by name; lesion ``[N]``; lesion voxels outside the brain."""

    person: str
    maps: dict[str, torch.Tensor]
    lesion: torch.Tensor
    missed: int


def case_of(bench: Bench, scan: Scan, names: Sequence[str]) -> Case:
    """The scores ``names`` of a scan."""
    calibration = bench.parser.get_parsed_content("calibration").load()
    inside = (scan.image > 0) & torch.as_tensor(scan.counts)[None]
    maps = {name: calibration.score(name, scan.channels, scan.image, scan.maps)[inside] for name in names}
    lesion = torch.as_tensor(scan.label)[None]
    return Case(scan.person, maps, lesion[inside], int((lesion & ~inside).sum()))


def cases_of(bench: Bench, folders: Sequence[str], section: str, names: Sequence[str]) -> list[Case]:
    """Those with a lesion in a section of prepared datasets.

    Raises:
        InputError: there are none.
    """
    scans = (scan for folder in folders for scan in bench.scans(folder, section) if scan.label.any())
    cases = [case_of(bench, scan, names) for scan in scans]
    if not cases:
        raise InputError(f"{folders[0]}: no scan with a lesion in '{section}'")
    return cases


def mean_areas(cases: Sequence[Case], fusions: Sequence[Fusion]) -> dict[str, float]:
    """Mean AUPRC over subjects of every fusion, by its text."""
    areas = {}
    for fusion in fusions:
        by_person: dict[str, list[float]] = {}
        for case in cases:
            by_person.setdefault(case.person, []).append(area(case, fusion))
        areas[str(fusion)] = float(np.mean([np.mean(values) for values in by_person.values()]))
    return areas


def area(case: Case, fusion: Fusion) -> float:
    """AUPRC; lesion voxels that no mask holds rank last."""
    everywhere = torch.ones(1, 1, 1, len(case.lesion), dtype=torch.bool)
    fused = fusion({name: values.view(1, 1, 1, -1) for name, values in case.maps.items()}, everywhere).flatten()
    last = torch.full((case.missed,), float(fused.min()) - 1)
    return average_precision(torch.cat([fused, last]), torch.cat([case.lesion, torch.ones(case.missed, dtype=bool)]))


def combinations(names: Sequence[str], weights: Sequence[float], rules: Sequence[str]) -> Iterator[Fusion]:
    """All that differ: the largest weight is 1, and one map alone is the same under every rule."""
    for values in itertools.product(sorted({0.0, *weights}), repeat=len(names)):
        if max(values) == 1:
            used = {name: value for name, value in zip(names, values) if value}
            yield from (Fusion(rule, used) for rule in (rules if len(used) > 1 else rules[:1]))


def choose(fusions: Sequence[Fusion], areas: Mapping[str, float], margin: float) -> Fusion:
    """Of the fusions within ``margin`` of the best mean area (by the fusion's text) the one of the fewest maps, and of
    those the best.
    """
    near = [fusion for fusion in fusions if areas[str(fusion)] >= max(areas.values()) - margin]
    return min(near, key=lambda fusion: (len(fusion.weights), -areas[str(fusion)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_dir", default=str(ROOT / "models"))
    parser.add_argument("--contrast", default="t1")
    parser.add_argument("--dataset_dir", required=True, nargs="+", help="prepared datasets with labels")
    parser.add_argument("--section", default="tuning")
    parser.add_argument("--maps", nargs="+", help="scores to combine; default: all z-scores of the calibration")
    parser.add_argument("--weights", nargs="+", type=float, default=[0.25, 0.5, 1.0], help="1 must be among them")
    parser.add_argument("--rules", nargs="+", default=["sum"], choices=RULES)
    parser.add_argument("--margin", type=float, default=0.002, help="of AUPRC that one map less may cost")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of configs/evaluate.json")
    parser.add_argument("--check_dir", nargs="+", default=[], help="prepared datasets of real lesions, see above")
    parser.add_argument("--check_section", default="test")
    parser.add_argument("--check_margin", type=float, default=0.005, help="of AUPRC on real scans")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    args = parser.parse_args()
    bench = Bench(args.ckpt_dir, args.contrast, args.set)
    calibration = bench.parser.get_parsed_content("calibration").load()
    names = args.maps or [
        name for name in ("atlas_z", "location", *calibration.extra_maps) if calibration.location != (name,)
    ]
    cases = cases_of(bench, args.dataset_dir, args.section, names)
    fusions = list(combinations(names, args.weights, args.rules))
    areas = mean_areas(cases, fusions)
    real = cases_of(bench, args.check_dir, args.check_section, names) if args.check_dir else []
    by_scan = [mean_areas([case], fusions) for case in real]
    checked = {str(fusion): sum(found[str(fusion)] for found in by_scan) / max(len(real), 1) for fusion in fusions}
    floor = max(checked.values()) - args.check_margin
    allowed = [fusion for fusion in fusions if checked[str(fusion)] >= floor]
    chosen = choose(allowed, {str(f): areas[str(f)] for f in allowed}, args.margin)
    order = sorted(areas, key=lambda text: -areas[text])
    alone = [str(fusion) for fusion in fusions if len(fusion.weights) == 1]
    shipped = calibration.fusion.weights if calibration.fusion else {}
    used = [fusion for fusion in fusions if fusion.weights == shipped and fusion.rule == calibration.fusion.rule]
    shown = dict.fromkeys([*order[:10], *map(str, (chosen, *used)), *alone])
    rows = [[text, *(f"{found[text]:.4f}" for found in (areas, *by_scan))] for text in shown]
    title = f"{args.contrast}, {len(cases)} scans with lesions; the calibration's fusion: {calibration.fusion}"
    print_table(title, ["fusion", "mean AUPRC", *(f"real: {case.person}" for case in real)], rows)
    print(f'\nchosen: --fusion_rule {chosen.rule} --fusion_weights "{dict(chosen.weights)}"')
    if args.output:
        facts = {"rule": chosen.rule, "weights": dict(chosen.weights)}
        write_json(args.output, {"chosen": facts, "auprc": areas, "real": by_scan})


if __name__ == "__main__":
    report_in_one_line()
    main()

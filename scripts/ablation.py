"""Measure every score of a model on the same cases, beside the intensity baselines.

One pass of the network over each scan serves all rows. Maps and thresholds are those of the model's calibration, or are
fitted anew to the section "calibration" of the healthy dataset (--filter_mm, --fusion); false alarms are those of its
section "validation", or --section.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from monai.bundle import ConfigParser
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bundle.data import load_datalist  # noqa: E402
from bundle.data.files import atomic_path, write_json  # noqa: E402
from bundle.errors import report_in_one_line  # noqa: E402
from bundle.metrics import average_precision, count_lesions, recall_at_false_positives  # noqa: E402
from bundle.reports.figure import FOUND_COLOUR, HEAT_RANGE, TRUE_COLOUR  # noqa: E402
from bundle.reports.table import print_table  # noqa: E402
from bundle.scoring import PARTS, Calibration, Fusion, fit_calibration  # noqa: E402
from bundle.scoring.calibration import QUANTILES  # noqa: E402
from bundle.transforms import load_normative  # noqa: E402

FALSE_LESION_MM3 = 100.0


class Scan(NamedTuple):
    """What is known of a scan: anomaly channels ``[2, H, W, D]``, image ``[1, H, W, D]``, lesion mask ``[H, W, D]``,
    other methods' maps ``[1, H, W, D]`` by name, whose it is, and what counts (``[H, W, D]``): its brain, and lesions
    outside of it, but no label that is to be ignored.
    """

    channels: torch.Tensor
    image: torch.Tensor
    label: np.ndarray
    maps: dict[str, torch.Tensor]
    person: str
    counts: np.ndarray


class Bench:
    """A model, and what it says about scans."""

    def __init__(self, ckpt_dir: str, contrast: str, overrides: list[str]) -> None:
        self.contrast = contrast
        self.parser = ConfigParser()
        self.parser.read_config(str(ROOT / "configs/evaluate.json"))
        settings = dict(item.split("=", 1) for item in overrides)
        settings |= {"bundle_root": str(ROOT), "ckpt_dir": ckpt_dir, "contrast": contrast}
        self.parser.update({key: yaml.safe_load(value) for key, value in settings.items()})
        self.preprocessing = self.parser.get_parsed_content("preprocessing")
        self.own_maps = self.parser.get_parsed_content("own_maps")
        self.inferer = self.parser.get_parsed_content("inferer")
        self.network = self.parser.get_parsed_content("network").eval()
        state = torch.load(self.parser.get_parsed_content("ckpt_path"), map_location="cpu", weights_only=True)
        self.network.load_state_dict(state)
        self.spacing = float(self.parser.get_parsed_content("spacing"))
        self.device = self.parser.get_parsed_content("device")

    def scans(self, dataset_dir: str, section: str) -> Iterator[Scan]:
        """The scans of a section of a prepared dataset."""
        for item in tqdm(load_datalist(dataset_dir, section, self.contrast), desc=f"{dataset_dir} {section}"):
            data = self.own_maps(self.preprocessing(item))
            image = data["image"].as_tensor()
            channels = self.inferer(image[None].to(self.device), self.network)[0].cpu()
            label = data["label"].as_tensor()[0].numpy() if "label" in data else np.zeros(image.shape[1:])
            counts = ((image[0].numpy() > 0) | (label > 0)) & (label >= 0)
            maps = {name: data[name].as_tensor() for name in PARTS if name in data}
            yield Scan(channels, image, label > 0, maps, str(item.get("person", item["name"])), counts)


def measure(
    calibrations: dict[str, Calibration], scans: list[Scan], spacing: float, quantile: float | None
) -> dict[str, dict[str, float]]:
    """Per score: mean AUPRC and Dice inside the brain, and lesion-wise recall at one false finding a scan.

    Args:
        calibrations: fusion -> calibration with its thresholds; the one called "" serves all other scores.
        scans: with labels.
        spacing: of the grid, mm.
        quantile: of healthy scans, the threshold of Dice; None: the operating point "specific".
    """
    rows: dict[str, dict[str, float]] = {}
    truths = [s.label for s in scans]
    inside = [s.counts for s in scans]
    smallest = FALSE_LESION_MM3 / spacing**3
    scores = [name for name in calibrations[""].points if name not in ("intensity_opposite", "fusion")]
    for name, calibration, score in [
        *((name, calibrations[""], name) for name in scores),
        *((str(fitted.fusion), fitted, "fusion") for fitted in calibrations.values() if fitted.fusion is not None),
    ]:
        maps = [calibration.score(score, s.channels, s.image, s.maps)[0].numpy() for s in scans]
        threshold = cut_of(calibration, score, quantile)
        dice = [
            2 * ((m > threshold) & t).sum() / max(((m > threshold) & i).sum() + t.sum(), 1)
            for m, t, i in zip(maps, truths, inside)
        ]
        area = [
            average_precision(torch.as_tensor(m[i]), torch.as_tensor(t[i])) for m, t, i in zip(maps, truths, inside)
        ]
        rows[name] = {
            "auprc": float(np.mean(area)),
            "auprc_sd": float(np.std(area)),
            "dice": float(np.mean(dice)),
            "recall_at_1_fp": recall_at_false_positives(maps, truths, 1.0, smallest),
        }
    floor = [t.sum() / i.sum() for t, i in zip(truths, inside)]
    rows["all_positive"] = {
        "auprc": float(np.mean(floor)),
        "auprc_sd": float(np.std(floor)),
        "dice": float(np.mean([2 * f / (1 + f) for f in floor])),
        "recall_at_1_fp": float("nan"),
    }
    return rows


def cut_of(calibration: Calibration, score: str, quantile: float | None) -> float:
    """Threshold at a quantile of healthy scans, or at the operating point that users get."""
    return calibration.point(score, "specific") if quantile is None else calibration.threshold(score, quantile)


def false_alarms(
    calibration: Calibration, scans: list[Scan], spacing: float, score: str
) -> dict[str, dict[str, float]]:
    """Per threshold: share of healthy voxels above it, and findings above 100 mm^3 a scan."""
    maps = [(calibration.score(score, s.channels, s.image, s.maps)[0].numpy(), s.image[0].numpy() > 0) for s in scans]
    rows = {}
    for quantile in QUANTILES:
        t = calibration.threshold(score, quantile)
        found = [(m > t) & i for m, i in maps]
        false = [count_lesions(f, np.zeros_like(f), FALSE_LESION_MM3 / spacing**3)[2] for f in found]
        rows[f"{quantile:g}"] = {
            "threshold": t,
            "voxels": float(np.mean([f.sum() / i.sum() for f, (_, i) in zip(found, maps)])),
            "findings_per_scan": float(np.mean(false)),
        }
    return rows


def draw_maps(path: Path, calibration: Calibration, scans: list[Scan], quantile: float | None) -> None:
    """Scan, each map of the fusion and the fusion, side by side, with what each finds (red) and the truth (green).

    The scans are those at the quarters of the fusion's Dice, in the slice that holds most of the lesion.
    """
    if calibration.fusion is None:
        raise SystemExit("--picture with --filter_mm needs a --fusion")
    names = [*calibration.fusion.weights, "fusion"]
    maps = [{n: calibration.score(n, s.channels, s.image, s.maps)[0].numpy() for n in names} for s in scans]
    cuts = {n: cut_of(calibration, n, quantile) for n in names}
    dice = [
        {n: 2 * ((m[n] > cuts[n]) & s.label).sum() / ((m[n] > cuts[n]).sum() + s.label.sum()) for n in names}
        for m, s in zip(maps, scans)
    ]
    order = np.argsort([d["fusion"] for d in dice])
    figure = Figure(figsize=(2.6 * (len(names) + 1), 9.6), facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(names) + 1)
    for row, quarter in enumerate((3, 2, 1)):
        case = order[quarter * len(order) // 4]
        k = int(scans[case].label.sum((0, 1)).argmax())
        scan, truth = scans[case].image[0, ..., k].numpy().T, scans[case].label[..., k].T
        for ax, name in zip(axes[row], ["", *names]):
            ax.imshow(scan, cmap="gray", origin="lower", vmin=0, vmax=max(1.0, float(scan.max())))
            ax.set_axis_off()
            found = maps[case][name][..., k].T if name else None
            if found is not None:
                shown = np.ma.masked_where((scan <= 0) | (found < HEAT_RANGE[0]), found)
                ax.imshow(shown, cmap="inferno", origin="lower", vmin=HEAT_RANGE[0], vmax=HEAT_RANGE[1], alpha=0.7)
                if (found > cuts[name]).any():
                    ax.contour(found > cuts[name], levels=[0.5], colors=[FOUND_COLOUR], linewidths=1.2)
                ax.set_title(f"{name}, Dice {dice[case][name]:.2f}", color="white", fontsize=11)
            ax.contour(truth, levels=[0.5], colors=[TRUE_COLOUR], linewidths=1.2)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)


def read_fusion(text: str) -> Fusion:
    """The fusion that "RULE:MAP=WEIGHT,MAP=WEIGHT" stands for."""
    rule, weights = text.split(":", 1)
    return Fusion(rule, {name: float(weight) for name, weight in (w.split("=") for w in weights.split(","))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_dir", default=str(ROOT / "models"))
    parser.add_argument("--contrast", default="t1")
    parser.add_argument("--healthy", required=True, help="prepared dataset: calibration, validation")
    parser.add_argument("--section", default="validation", help="of the healthy dataset, for false alarms")
    parser.add_argument("--test", nargs="*", default=[], metavar="NAME=DATASET:SECTION", help="datasets with labels")
    parser.add_argument("--filter_mm", nargs="*", type=float, default=[], help="sigmas to compare")
    parser.add_argument("--fusion", nargs="*", default=[], metavar="RULE:MAP=WEIGHT,...", help="fusions to compare")
    parser.add_argument(
        "--quantile", type=float, help="of healthy scans, the threshold of Dice; default: at the operating point"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of configs/evaluate.json")
    parser.add_argument("--picture", type=Path, help="PNG of the maps of three scans of the last --test")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    args = parser.parse_args()
    if args.picture and not args.test:
        parser.error("--picture needs a --test")
    bench = Bench(args.ckpt_dir, args.contrast, args.set)
    quantile = args.quantile
    fusions = {"": None, **{text: read_fusion(text) for text in args.fusion}}
    calibrations: dict[str, dict[str, Calibration]] = {}
    if args.filter_mm or args.fusion:
        fitted_to = list(bench.scans(args.healthy, "calibration"))
        maps = {name: [s.maps[name] for s in fitted_to] for name in fitted_to[0].maps}
        usual = ConfigParser()
        usual.read_config(ROOT / "configs/calibrate.json")
        choices = ("location_maps", "asymmetry_intensity")
        location, telling = (usual.get_parsed_content(name)[args.contrast] for name in choices)
        for mm in args.filter_mm or [3.0]:
            calibrations[f"filter {mm:g} mm"] = {
                text: fit_calibration(
                    [s.channels for s in fitted_to],
                    [s.image for s in fitted_to],
                    args.contrast,
                    bench.spacing,
                    filter_mm=mm,
                    maps=maps,
                    fusion=fusion,
                    persons=[s.person for s in fitted_to],
                    location=location,
                    telling=telling,
                    normative=load_normative(bench.parser.get_parsed_content("normative_file")),
                )
                for text, fusion in fusions.items()
            }
    else:
        calibrations["calibration of the model"] = {"": bench.parser.get_parsed_content("calibration").load()}
    healthy = list(bench.scans(args.healthy, args.section))
    tests = {}
    for test in args.test:
        name, where = test.split("=", 1)
        tests[name] = list(bench.scans(*where.rsplit(":", 1)))
    results: dict[str, Any] = {}
    for key, fitted in calibrations.items():
        scores = {name: (fitted[""], name) for name in ("location", "atlas_z")}
        if fitted[""].fusion is not None:
            scores["fusion"] = (fitted[""], "fusion")
        scores |= {str(c.fusion): (c, "fusion") for c in fitted.values() if c.fusion is not None}
        results[key] = {
            f"healthy, held out, {name}": false_alarms(calibration, healthy, bench.spacing, score)
            for name, (calibration, score) in scores.items()
        }
        for name, scans in tests.items():
            results[key][name] = measure(fitted, scans, bench.spacing, quantile)
        if args.picture:
            draw_maps(args.picture, list(fitted.values())[-1], list(tests.values())[-1], quantile)
        for name, rows in results[key].items():
            columns = list(next(iter(rows.values())))
            cells = [[what, *(f"{row[c]:.4f}" for c in columns)] for what, row in rows.items()]
            print_table(f"{args.contrast}, {key}, {name}", ["", *columns], cells)
    if args.output:
        write_json(args.output, results)


if __name__ == "__main__":
    report_in_one_line()
    main()

"""The evaluation as one page that opens anywhere: figures, curves, pictures and settings, without a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nibabel as nib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bundle.data.files import write_text
from bundle.metrics import Case, ScoreCurve
from bundle.metrics.case import CASE_METRICS

from .figure import FOUND_COLOUR, HEAT_RANGE, TRUE_COLOUR, heat_scale
from .pages import environment

_SLICES = 3


@dataclass(frozen=True)
class Strip:
    """A few axial slices of a case, ``[X, Y, 3]`` each: enough for its pictures.

    Attributes:
        name: of the case.
        image, heatmap: scan and scores.
        found, truth: masks.
    """

    name: str
    image: np.ndarray
    heatmap: np.ndarray
    found: np.ndarray
    truth: np.ndarray

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Strip:
        """Slices at the quarters of the lesions' volume (of the heatmap's strongest part, if there are none), of the
        case's ``image``, ``heatmap``, ``lesion`` and ``label``, turned to RAS.
        """
        affine = np.asarray(data["image"].affine)

        def volume(key: str, dtype: Any) -> np.ndarray:
            array = np.asarray(data[key].as_tensor().cpu()[0] if key in data else np.zeros(data["image"].shape[1:]))
            return nib.as_closest_canonical(nib.Nifti1Image(array.astype(np.float32), affine)).get_fdata().astype(dtype)

        image, heatmap = volume("image", np.float16), volume("heatmap", np.float16)
        found, truth = volume("lesion", np.float32) > 0, volume("label", np.float32) > 0
        marked = truth if truth.any() else heatmap >= np.quantile(heatmap[image > 0], 0.999)
        share = marked.sum((0, 1)).cumsum() / marked.sum()
        picked = np.searchsorted(share, (np.arange(_SLICES) + 1) / (_SLICES + 1))
        return cls(data["name"], *(v[..., picked] for v in (image, heatmap, found, truth)))


def _embedded(figure: Figure, dpi: int = 90) -> str:
    """A figure as the source of an HTML image."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def draw_precision_recall(curves: Mapping[str, ScoreCurve]) -> Figure:
    """Pooled precision-recall curve of each method, with the floor (share of lesion voxels) as a dotted line."""
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    ax = figure.subplots()
    for name, curve in curves.items():
        precision, recall = curve.precision_recall()
        if name == "all_positive":
            ax.axhline(precision[-1], color="grey", linestyle=":", label=f"floor {precision[-1]:.3f}")
        else:
            ax.step(recall, precision, where="post", label=f"{name} {curve.auprc():.3f}")
    ax.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1), title="All cases pooled (AUPRC)")
    ax.legend(fontsize=8)
    return figure


def draw_dice(curves: Sequence[ScoreCurve], frozen: float, tuned: float | None, score: str) -> Figure:
    """Mean Dice over cases against the threshold, with the frozen and the tuned one marked."""
    pooled = ScoreCurve.pooled(curves)
    total = (pooled.positive + pooled.negative).cumsum()
    low = float(pooled.lowest[np.searchsorted(total, total[-1] * 0.3)])
    tried = np.linspace(low, max(float(pooled.lowest[0]), frozen * 1.1), 400)
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    ax = figure.subplots()
    dice = np.array([c.dice(tried) for c in curves])
    ax.plot(tried, dice.T, color="tab:blue", alpha=min(0.5, 3 / len(curves)), linewidth=0.7)
    ax.plot(tried, dice.mean(0), color="tab:blue", linewidth=2, label="mean of the cases")
    ax.axvline(frozen, color="tab:red", label=f"frozen on healthy scans, {frozen:.2f}")
    if tuned is not None:
        ax.axvline(tuned, color="tab:orange", linestyle="--", label=f"tuned on other lesions, {tuned:.2f}")
    ax.set(xlabel=f"threshold of {score}", ylabel="Dice", ylim=(0, None), title="Dice against the threshold")
    ax.legend(fontsize=8)
    return figure


def draw_strip(strip: Strip, heat_range: tuple[float, float] = HEAT_RANGE) -> Figure:
    """Scan, heatmap, and scan with outlines (found, true) of each slice of a case, side by side.

    Args:
        strip: of the case.
        heat_range: scores of the first and last colour; below the first nothing is painted.
    """
    figure = Figure(figsize=(3 * _SLICES, 9.6), facecolor="black", layout="constrained")
    axes = figure.subplots(3, _SLICES)
    image, (low, high) = strip.image.astype(np.float32), heat_range
    white = max(1e-3, float(np.percentile(image[image > 0], 99.8))) if (image > 0).any() else 1.0
    for column in range(_SLICES):
        scan, score, found, truth = (v[..., column].T for v in (image, strip.heatmap, strip.found, strip.truth))
        for row in range(3):
            axes[row, column].imshow(scan, cmap="gray", origin="lower", vmin=0, vmax=white)
            axes[row, column].set_axis_off()
        shown = np.ma.masked_where((scan <= 0) | (score < low), score.astype(np.float32))
        axes[1, column].imshow(shown, cmap="inferno", origin="lower", vmin=low, vmax=high, alpha=0.85)
        for mask, colour in ((truth, TRUE_COLOUR), (found, FOUND_COLOUR)):
            if mask.any() and not mask.all():
                axes[2, column].contour(mask, levels=[0.5], colors=[colour], linewidths=1.1)
    return figure


def write_report(path: str | Path, content: Mapping[str, Any], cases: Sequence[Case], strips: Sequence[Strip]) -> None:
    """Write ``report.html``.

    Args:
        path: of the page.
        content: of ``metrics.json``.
        cases: of the test.
        strips: of the same cases.
    """
    score, methods = content["settings"]["score"], content["methods"]
    rule = content["settings"]["fusion"].split(" of ")[0] if content["settings"].get("fusion") else None
    heat_range = heat_scale(score, rule, content["threshold"]["value"])[0]
    curves = {name: ScoreCurve.pooled([c.methods[name].curve for c in cases]) for name in methods}
    with_lesions = [c.methods[score].curve for c in cases if c.methods[score].curve.positive.sum()]
    figures, chosen = [], []
    if with_lesions:
        tuned = methods[score]["tuned_threshold"]
        figures.append(_embedded(draw_precision_recall(curves)))
        figures.append(_embedded(draw_dice(with_lesions, content["threshold"]["value"], tuned, score)))
        area = {name: by[score]["auprc"] for name, by in content["cases"].items() if by[score]["auprc"] is not None}
        ranked = sorted(area, key=lambda name: -area[name])
        by_name = {s.name: s for s in strips}
        for title, name in {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}.items():
            picture = _embedded(draw_strip(by_name[name], heat_range), 60)
            chosen.append({"title": title, "name": name, "auprc": area[name], "picture": picture})
    folder = Path(path).parent / "cases"
    pages = {name: f"cases/{quote(name)}.html" for name in content["cases"] if (folder / f"{name}.html").is_file()}
    shown = {"figures": figures, "chosen": chosen, "pages": pages, "metrics": CASE_METRICS, "score": score}
    write_text(path, environment().get_template("report.html.j2").render(content, **shown))

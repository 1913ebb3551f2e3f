"""The picture that people look at before the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from monai.transforms import generate_spatial_bounding_box

from bundle.data.files import atomic_path

from .view import View, describe_place

# one scale for every scan: from just above usual to far beyond
HEAT_RANGE = (1.0, 4.0)
FOUND_COLOUR, TRUE_COLOUR = "#ff3b30", "#34e36b"
PLANES = ("sagittal", "coronal", "axial")
_COLUMNS, _MARGIN_MM = 4, 12.0
_NO_TICKS: dict[str, list[float]] = {"xticks": [], "yticks": []}


def heat_scale(score: str, rule: str | None, threshold: float) -> tuple[tuple[float, float], str]:
    """Scores of the first and the last colour, and the name of the scale.

    Args:
        score: name of the score; all but some are z-scores, for which there is one scale.
        rule: of the fusion, if that is the score.
        threshold: above which a voxel is lesion: where the colours of other scores begin.
    """
    if score == "fusion" and rule == "rank":
        return (threshold, max(1.0, threshold + 1e-3)), "fusion: mean rank among the scan's voxels"
    if score in ("uncalibrated", "intensity", "intensity_opposite"):
        return (threshold, threshold + max(1.0, abs(threshold)) / 2), f"{score}, as it is"
    return HEAT_RANGE, f"{score}: z-score against healthy brains"


def scanned_plane(view: View) -> int:
    """Axis across the planes that the scanner made, those with the finest voxels; of cubic voxels the axial one."""
    thick = np.flatnonzero(view.spacing > 1.15 * view.spacing.min())
    return int(np.argmax(view.spacing)) if len(thick) == 1 else 2


def choose_panels(view: View, lesions: Sequence[Mapping[str, Any]]) -> list[tuple[tuple[int, int, int], int, int]]:
    """What the columns of a picture show: voxel, axis across the plane, and number of the finding from 1 (0 for none).

    The strongest findings in the scanner's planes, each plane once, and the strongest in the other two directions as
    far as there is room; without any, the three planes through the highest score in the brain.
    """
    axis = scanned_plane(view)
    panels: list[tuple[tuple[int, int, int], int, int]] = []
    if lesions:
        number, seen = 1, set[int]()
        for k, finding in enumerate(lesions):
            place = view.voxel(finding["peak_mm"])
            if place[axis] not in seen and len(panels) < _COLUMNS:
                panels.append((place, axis, k + 1))
            seen.add(place[axis])
    else:
        inside = view.brain if view.brain.any() else np.ones_like(view.brain)
        peak = np.unravel_index(np.argmax(np.where(inside, view.heatmap, -np.inf)), inside.shape)
        panels, number = [((int(peak[0]), int(peak[1]), int(peak[2])), axis, 0)], 0
    others = [(panels[0][0], other, number) for other in (2, 1, 0) if other != axis]
    return panels + others[: _COLUMNS - len(panels)]


def draw_report(
    path: str | Path,
    title: str,
    view: View,
    lesions: Sequence[Mapping[str, Any]],
    heat_range: tuple[float, float] = HEAT_RANGE,
    score_name: str = "z-score against healthy brains",
) -> None:
    """Draw the strongest findings side by side, on the scan's own voxels, and write a PNG: above the scan with
    outlines, below the heatmap on it. The patient's left is on the right (radiological convention).

    Args:
        path: of the PNG.
        title: first lines.
        view: of the scan.
        lesions: the strongest first, as of `describe_findings`.
        heat_range: scores of the first and last colour; below the first nothing is painted.
        score_name: legend of the colour scale.
    """
    panels, (black, white) = choose_panels(view, lesions), view.grey_range()
    width, height = 3.1 * len(panels) + 1, 7.6
    figure = Figure(figsize=(width, height), facecolor="black", dpi=110)
    # ticks that nobody sees take a tenth of the time, packing a file to the last byte as much, and a layout that is
    # measured instead of stated a quarter
    layout = {"left": 0.1 / width, "right": 1 - 0.9 / width, "bottom": 0.3 / height, "wspace": 0.03, "hspace": 0.03}
    layout["top"] = 1 - (0.52 + 0.19 * (title.count("\n") + 1)) / height
    axes = figure.subplots(2, len(panels), squeeze=False, subplot_kw=_NO_TICKS, gridspec_kw=layout)
    heat: Any = None
    for column, (center, axis, number) in enumerate(panels):
        region = _around_brain(view, axis)

        def plane(volume: np.ndarray, center=center, axis=axis, region=region) -> np.ndarray:
            cut = np.take(volume, center[axis], axis)[region].T
            return cut[:, ::-1]  # left to the right; the nose of a sagittal plane to the left

        scan, score, found, brain = (plane(v) for v in (view.image, view.heatmap, view.found, view.brain))
        truth = None if view.truth is None else plane(view.truth)
        across, up = view.spacing[[a for a in range(3) if a != axis]]
        for row in (0, 1):
            ax = axes[row, column]
            ax.imshow(scan, cmap="gray", origin="lower", vmin=black, vmax=white, aspect=up / across)
            ax.set_axis_off()
        told = PLANES[axis]
        if number:
            finding = lesions[number - 1]
            told = f"{number}: {finding['volume_ml']:.2f} ml, score {finding['max_score']:.1f}, {told}"
            if "center_atlas_mm" in finding:
                told += f"\n{describe_place(finding['center_atlas_mm'])} mm in the atlas"
        axes[0, column].set_title(told, color="white", fontsize=9)
        sides = ("A", "P") if axis == 0 else ("R", "L")
        for place, side in zip((0.02, 0.94), sides):
            axes[0, column].text(place, 0.02, side, color="white", fontsize=10, transform=axes[0, column].transAxes)
        shown = np.ma.masked_where(~brain | (score < heat_range[0]), score)
        low, high = heat_range
        heat = axes[1, column].imshow(
            shown, cmap="inferno", origin="lower", vmin=low, vmax=high, alpha=0.85, aspect=up / across
        )
        for mask, colour in ((truth, TRUE_COLOUR), (found, FOUND_COLOUR)):
            if mask is not None and mask.any() and not mask.all():
                axes[0, column].contour(mask, levels=[0.5], colors=[colour], linewidths=0.9)
    lower = axes[1, -1].get_position()
    beside = figure.add_axes(
        (layout["right"] + 0.1 / width, lower.y0 + 0.08 * lower.height, 0.18 / width, 0.84 * lower.height)
    )
    bar = figure.colorbar(heat, cax=beside, extend="max")
    bar.set_label(score_name, color="white")
    bar.ax.tick_params(colors="white")
    outlines = [Line2D([], [], color=FOUND_COLOUR, label="found")]
    if view.truth is not None:
        outlines.append(Line2D([], [], color=TRUE_COLOUR, label="true lesion"))
    axes[0, -1].legend(handles=outlines, loc="upper right", fontsize=8, facecolor="black", labelcolor="white")
    figure.suptitle(title, color="white", fontsize=11, y=1 - 0.06 / height, va="top")
    voxel = " x ".join(f"{v:.2f}" for v in view.spacing)
    convention = f"Radiological convention: the patient's left is on the right. The scan's own voxels, {voxel} mm."
    figure.supxlabel(convention, color="white", fontsize=9, y=0.07 / height)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", pil_kwargs={"compress_level": 1})


def _around_brain(view: View, axis: int) -> tuple[slice, slice]:
    """The part of planes across ``axis`` that has the brain, and a margin."""
    marked = view.brain if view.brain.any() else np.ones_like(view.brain)
    margin = [round(_MARGIN_MM / mm) for mm in view.spacing]
    box = list(map(slice, *generate_spatial_bounding_box(marked[None], margin=margin, allow_smaller=True)))
    del box[axis]
    return box[0], box[1]

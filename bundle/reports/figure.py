"""The picture that people look at before the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bundle.data.files import atomic_path

# one scale for every scan: from just above usual to far beyond
HEAT_RANGE = (1.0, 4.0)
FOUND_COLOUR, TRUE_COLOUR = "#ff3b30", "#34e36b"
PLANES = (("sagittal", 0), ("coronal", 1), ("axial", 2))


def heat_scale(score: str, rule: str | None, threshold: float) -> tuple[tuple[float, float], str]:
    """Scores of the first and the last colour, and the name of the scale.

    Args:
        score: name of the score; all but some are healthy spreads above usual, for which there is one scale.
        rule: of the fusion, if that is the score.
        threshold: above which a voxel is lesion: where the colours of other scores begin.
    """
    if score == "fusion" and rule == "rank":
        return (threshold, max(1.0, threshold + 1e-3)), "fusion: mean rank among the scan's voxels"
    if score in ("uncalibrated", "intensity", "intensity_opposite"):
        return (threshold, threshold + max(1.0, abs(threshold)) / 2), f"{score}, as it is"
    return HEAT_RANGE, f"{score}: healthy spreads above usual"


def strongest_finding(heatmap: np.ndarray, lesion: np.ndarray, inside: np.ndarray) -> tuple[int, int, int]:
    """Voxel with the highest score among those found, else in the brain; arrays ``[X, Y, Z]``."""
    where = lesion > 0 if (lesion > 0).any() else inside
    index = np.unravel_index(np.argmax(np.where(where, heatmap, -np.inf)), heatmap.shape)
    return int(index[0]), int(index[1]), int(index[2])


def draw_report(
    path: str | Path,
    title: str,
    image: np.ndarray,
    heatmap: np.ndarray,
    lesion: np.ndarray,
    label: np.ndarray | None = None,
    heat_range: tuple[float, float] = HEAT_RANGE,
    score_name: str = "healthy spreads above usual",
) -> None:
    """Draw scan, heatmap and outlines in three planes through the strongest finding, and write a PNG.

    Args:
        path: of the PNG.
        title: first line.
        image: ``[X, Y, Z]`` on an RAS grid of cubic voxels, 0 outside the brain.
        heatmap, lesion: on the same grid.
        label: true lesions, if known.
        heat_range: scores of the first and last colour; below the first nothing is painted.
        score_name: legend of the colour scale.
    """
    inside = image > 0
    center = strongest_finding(heatmap, lesion, inside)
    figure = Figure(figsize=(10.5, 6.8), facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    heat: Any = None
    for column, (plane, axis) in enumerate(PLANES):
        scan, score, found, brain = (np.take(v, center[axis], axis).T for v in (image, heatmap, lesion, inside))
        truth = None if label is None else np.take(label, center[axis], axis).T
        for row in (0, 1):
            ax = axes[row, column]
            ax.imshow(scan, cmap="gray", origin="lower", vmin=0, vmax=max(1.0, float(np.percentile(image, 99.8))))
            ax.set_axis_off()
        axes[0, column].set_title(plane, color="white", fontsize=10)
        # the volume's axes run from the patient's left, so does the picture
        for place, side in ((0.02, "L"), (0.95, "R")) if axis else ():
            axes[0, column].text(place, 0.03, side, color="white", fontsize=9, transform=axes[0, column].transAxes)
        shown = np.ma.masked_where(~brain | (score < heat_range[0]), score)
        heat = axes[1, column].imshow(
            shown, cmap="inferno", origin="lower", vmin=heat_range[0], vmax=heat_range[1], alpha=0.85
        )
        for mask, colour in ((truth, TRUE_COLOUR), (found, FOUND_COLOUR)):
            if mask is not None and mask.any():
                axes[0, column].contour(mask > 0, levels=[0.5], colors=[colour], linewidths=1.1)
    bar = figure.colorbar(heat, ax=axes[1, :], shrink=0.85, pad=0.01, extend="max")
    bar.set_label(score_name, color="white")
    bar.ax.tick_params(colors="white")
    outlines = [Line2D([], [], color=FOUND_COLOUR, label="found")]
    if label is not None:
        outlines.append(Line2D([], [], color=TRUE_COLOUR, label="true lesion"))
    axes[0, 2].legend(handles=outlines, loc="upper right", fontsize=8, facecolor="black", labelcolor="white")
    figure.suptitle(title, color="white", fontsize=11)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)

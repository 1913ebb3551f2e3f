"""Quality sheets of a prepared cohort: is the brain all brain, and does it lie on the atlas?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from bundle.data.files import atomic_path

BRAIN_COLOUR, ATLAS_COLOUR = "#ffcc00", "#34c3ff"


def draw_alignment(
    path: str | Path, title: str, head: np.ndarray, brain_mask: np.ndarray, atlas_mask: np.ndarray
) -> None:
    """Draw a scan on the atlas grid in three planes with two outlines, and write a PNG.

    Args:
        path: of the PNG.
        title: above the planes.
        head: ``[X, Y, Z]`` intensities on an RAS grid of cubic voxels, with or without skull.
        brain_mask, atlas_mask: of the scan and of the atlas, on the same grid; outlined.
    """
    figure = Figure(figsize=(7.2, 2.7), facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    center = np.array(head.shape) // 2
    if atlas_mask.any():
        center = np.argwhere(atlas_mask).mean(0).astype(int)
    brightest = float(np.percentile(head[brain_mask], 99.5)) if brain_mask.any() else 1.0
    for axis, ax in enumerate(figure.subplots(1, 3)):
        scan, brain, expected = (np.take(v, center[axis], axis).T for v in (head, brain_mask, atlas_mask))
        ax.imshow(scan, cmap="gray", origin="lower", vmin=0, vmax=brightest)
        for mask, colour in ((expected, ATLAS_COLOUR), (brain, BRAIN_COLOUR)):
            if mask.any() and not mask.all():
                ax.contour(mask, levels=[0.5], colors=[colour], linewidths=0.9)
        ax.set_axis_off()
    lines = [Line2D([], [], color=c, label=n) for c, n in ((BRAIN_COLOUR, "brain"), (ATLAS_COLOUR, "atlas"))]
    figure.legend(
        handles=lines, loc="upper right", ncols=2, fontsize=7, facecolor="black", labelcolor="white", frameon=False
    )
    figure.suptitle(title, color="white", fontsize=9, x=0.01, ha="left")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def draw_contact_sheet(
    sheets: Sequence[Path], path: str | Path, columns: int = 4, width: int = 480, most: int = 200
) -> None:
    """Tile the first ``most`` of some pictures of one shape into one PNG, row by row, each ``width`` pixels wide.

    Args:
        sheets: PNG files, as `draw_alignment` writes them.
        path: of the PNG.
        columns, width: of the tiles.
    """
    tiles = []
    for file in sheets[:most]:
        with Image.open(file) as sheet:
            tiles.append(sheet.convert("RGB").resize((width, round(sheet.height * width / sheet.width))))
    if not tiles:
        return
    columns, height = min(columns, len(tiles)), max(t.height for t in tiles)
    whole = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height))
    for i, tile in enumerate(tiles):
        whole.paste(tile, (i % columns * width, i // columns * height))
    with atomic_path(path) as temporary:
        whole.save(temporary, format="PNG", optimize=True)

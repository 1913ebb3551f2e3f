"""Pages that open anywhere, without a network: the table of a run, and a viewer (NiiVue) of each scan."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nibabel as nib
import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from skimage.measure import block_reduce

from bundle.data.bids import result_path
from bundle.data.files import write_text

from .figure import FOUND_COLOUR, HEAT_RANGE, TRUE_COLOUR
from .view import View, describe_place

LARGEST_PAGE = 15_000_000  # bytes
_BOTH_COLOUR = "#ffd60a"


@lru_cache(maxsize=1)
def environment() -> Environment:
    """Templates of this folder; what they are given is escaped."""
    environment = Environment(loader=PackageLoader("bundle.reports", "."), autoescape=True, trim_blocks=True)
    environment.filters["place"] = describe_place
    environment.filters["url"] = lambda path: quote(str(path))
    return environment


@lru_cache(maxsize=1)
def _niivue() -> Markup:
    return Markup(
        files("bundle.reports").joinpath("niivue.umd.js").read_text("utf-8").replace("</script", "<\\/script")
    )


def _embedded(volume: np.ndarray, affine: np.ndarray, span: tuple[float, float] | None = None) -> str:
    """A volume as NIfTI of one byte a voxel, packed, in letters: ``span`` is what 0 and 255 stand for."""
    if span is not None:
        low, step = span[0], (span[1] - span[0]) / 255
        volume = np.clip(np.round((volume - low) / step), 0, 255)
    image = nib.Nifti1Image(volume.astype(np.uint8), affine)
    if span is not None:
        image.header.set_slope_inter(step, low)
    return base64.b64encode(gzip.compress(image.to_bytes(), 6, mtime=0)).decode()


def _halved(view: View) -> View:
    """Every two voxels along the finest axes made one: masks keep what either has, scores the higher one."""
    factors = tuple(2 if s < 1.5 * view.spacing.min() else 1 for s in view.spacing)
    shrink = np.diag([*factors, 1.0])
    shrink[:3, 3] = (np.array(factors) - 1) / 2

    def most(volume: np.ndarray | None) -> Any:
        return None if volume is None else block_reduce(volume, factors, np.max)

    image = block_reduce(view.image, factors, np.mean).astype(np.float32)
    heatmap = block_reduce(view.heatmap, factors, np.max, cval=float(view.heatmap.min()))
    return View(image, heatmap, most(view.brain), most(view.found), most(view.truth), view.affine @ shrink)


def write_viewer(
    path: str | Path,
    name: str,
    view: View,
    result: Mapping[str, Any],
    heat_range: tuple[float, float] = HEAT_RANGE,
    score_name: str = "z-score against healthy brains",
    flags: str = "",
    back: str = "../report.html",
    limit: int = LARGEST_PAGE,
) -> None:
    """Write the page of a scan: three linked planes on its own voxels (halved until the page fits into ``limit``
    bytes), the heatmap over them, outlines of what was found and what is true, and the findings to jump to.

    Args:
        path: of the page.
        name: of the scan.
        view: of the scan.
        result: as of `describe_findings`, with ``threshold``.
        heat_range: scores of the first and last colour.
        score_name: of the colour scale.
        flags: doubts, "" for none.
        back: link to the page of the run.
        limit: bytes that the page may have.
    """
    shown, halvings = view, 0
    while True:
        black, white = shown.grey_range()
        marks = shown.found + (0 if shown.truth is None else 2 * shown.truth.astype(np.uint8))
        # a heatmap lies in the brain only, and below the first colour it is not seen
        low, high = min(0.0, heat_range[0]), max(heat_range[1], float(shown.heatmap.max()))
        volumes = {
            "scan": _embedded(shown.image, shown.affine, (min(0.0, black), 1.5 * white)),
            "heatmap": _embedded(np.where(shown.brain, shown.heatmap, low), shown.affine, (low, high)),
            "marks": _embedded(marks, shown.affine),
        }
        page = (
            environment()
            .get_template("viewer.html.j2")
            .render(
                name=name,
                niivue=_niivue(),
                volumes=volumes,
                range={"black": black, "white": white, "low": heat_range[0], "high": heat_range[1], "most": high},
                result=result,
                score_name=score_name,
                doubts=_doubts(flags),
                back=back,
                halvings=halvings,
                spacing=[round(float(v), 2) for v in shown.spacing],
                has_truth=shown.truth is not None,
                colours={"found": FOUND_COLOUR, "true": TRUE_COLOUR, "both": _BOTH_COLOUR},
            )
        )
        if len(page.encode()) <= limit or max(shown.image.shape) < 32:
            break
        shown, halvings = _halved(shown), halvings + 1
    write_text(path, page)


def _doubts(flags: str) -> list[str]:
    """Doubts, one sentence each."""
    return [doubt[:1].upper() + doubt[1:] for doubt in flags.split("; ") if doubt]


def write_overview(path: str | Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Write the page of a run: its table, sortable, with a picture of each scan and a link to its viewer.

    Args:
        path: of the page, beside the scans' folders.
        rows: of ``summary.csv``.
        facts: settings, to be told at the end.
    """
    shown = []
    for row in rows:
        kind, _, reason = str(row.get("status", "")).partition(": ")
        folder = Path(path).parent
        files = {what: result_path(folder, row["name"], what) for what in ("report.html", "report.png")}
        there = {what: file.relative_to(folder).as_posix() for what, file in files.items() if file.is_file()}
        doubts = _doubts(reason) if kind == "flagged" else []
        shown.append({**row, "kind": kind, "doubts": doubts, "reason": reason, "files": there})
    write_text(path, environment().get_template("overview.html.j2").render(rows=shown, facts=facts))

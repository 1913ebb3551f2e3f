"""The files that answer one scan, or visit: written all or not at all, and never over what is not ours."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bundle.data.bids import result_path, sidecar
from bundle.data.dicom import dicom_files, is_dicom_scan
from bundle.data.dicom_seg import has_highdicom, write_segmentation
from bundle.data.files import apply_umask, write_json
from bundle.data.volumes import RESULT_ENDINGS, nifti_header, result_ending, write_result
from bundle.errors import InputError
from bundle.scoring import FindLesionsd

from .figure import draw_report, heat_scale
from .pages import write_viewer
from .view import View

VOLUMES = ("heatmap", "lesion", "coverage")


def write_answer(output_dir: Path, name: str, output: Mapping[str, Any], find_lesions: FindLesionsd) -> dict[str, Any]:
    """Write the results of a scan, or visit, and return its row but for ``name``, ``status`` and ``seconds``.

    Args:
        output_dir: of all results.
        name: of the scan or visit.
        output: ``heatmap``, ``lesion``, ``coverage`` ``[1, X, Y, Z]`` on the grid of the scan, ``image``, and
            ``result``; see `SaveFindings`.
        find_lesions: the transform that cut the heatmap.

    Raises:
        InputError: files that are no results are in the place of these.
    """
    affine, figures = output["heatmap"].affine, output["result"]
    contrast = output.get("contrast")
    row = {
        "contrast": "+".join(output.get("contrasts", [contrast or ""])),
        "lesion_volume_ml": f"{figures['lesion_volume_ml']:.2f}",
        "lesions": len(figures["lesions"]),
        "max_score": f"{figures['max_score']:.3f}",
        "mean_score": f"{figures['mean_score']:.3f}",
        "not_examined_percent": f"{figures['not_examined_percent']:.1f}",
    }
    percent = row["not_examined_percent"]
    left_out = "" if percent == "0.0" else f", {percent} % of the brain not examined"
    doubt = f"\nFLAGGED: {output['flags']}" if output.get("flags") else ""
    file = output["image"].meta["filename_or_obj"]
    header = nifti_header(file)
    fusion = find_lesions.calibration.load(contrast).fusion
    rule = None if fusion is None else fusion.rule
    output_dir.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=output_dir))

    def place(what: str) -> Path:
        return partial / result_path(output_dir, name, what).name

    try:
        for kind, dtype in zip(VOLUMES, (np.float32, np.uint8, np.uint8)):
            volume = np.asarray(output[kind][0]).astype(dtype)
            write_result(place(f"{kind}{result_ending(file)}"), volume, affine, header)
            if "bids" in output:
                told = {"Score": figures["score"], "Threshold": figures["threshold"], "Contrast": row["contrast"]}
                told |= {"Sources": output["sources"]} if "sources" in output else {}
                write_json(place(f"{kind}.json"), sidecar(kind, output["bids"], told))
        if is_dicom_scan(file) and has_highdicom():
            told = {k: figures[k] for k in ("score", "threshold") if k in figures}
            _write_segmentation(place("lesion.seg.dcm"), output, told)
        view = View.of_result(output)
        threshold = find_lesions.threshold(contrast=contrast)
        scale = heat_scale(find_lesions.score, rule, threshold)
        found = f"{row['lesions']} lesions, {row['lesion_volume_ml']} ml, threshold {threshold:.2f}"
        title = f"{name}: {found}{left_out}{doubt}"
        draw_report(place("report.png"), title, view, figures["lesions"], *scale)
        back = os.path.relpath(output_dir / "report.html", result_path(output_dir, name, "report.html").parent)
        doubts = output.get("flags") or ""
        write_viewer(place("report.html"), name, view, figures, *scale, flags=doubts, back=Path(back).as_posix())
        apply_umask(partial)
        _put(partial, output_dir, name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return row


def _write_segmentation(path: Path, output: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """The lesions as DICOM; a series that cannot be referred to has the other results all the same."""
    lesion, meta = output["lesion"], output["image"].meta
    try:
        with dicom_files(meta["filename_or_obj"], meta.get("named_contrast") or None) as files:
            write_segmentation(path, np.asarray(lesion[0]), lesion.affine, files, facts)
    except InputError as error:
        warnings.warn(f"{meta['filename_or_obj']}: no DICOM Segmentation: {error.message}")


def result_file(output_dir: str | Path, name: str, kind: str) -> Path | None:
    """File of a result, in whichever format it is; None where there is none."""
    files = [result_path(output_dir, name, f"{kind}{ending}") for ending in RESULT_ENDINGS]
    return next((file for file in files if file.is_file()), None)


def require_ours(folder: Path) -> None:
    """Raises: InputError: what is there is not the results of a scan."""
    volumes = {f"{kind}{ending}" for kind in VOLUMES for ending in RESULT_ENDINGS}
    results = {f"{folder.name}_{what}" for what in (*volumes, "lesion.seg.dcm", "report.png", "report.html")}
    if folder.exists() and not (
        folder.is_dir() and all(f.name in results or f.name.startswith(".") for f in folder.iterdir())
    ):
        raise InputError(
            f"{folder}: would be replaced by results, but holds files that are none; choose another output folder"
        )


def _put(new: Path, output_dir: Path, name: str) -> None:
    """Put the files of the folder ``new`` in the place of a scan's results."""
    heatmap = result_path(output_dir, name, f"heatmap{RESULT_ENDINGS[0]}")
    if heatmap.parent == output_dir / name:
        return _replace_folder(new, heatmap.parent)
    remove_results(output_dir, name)
    heatmap.parent.mkdir(parents=True, exist_ok=True)
    for file in sorted(new.iterdir(), key=lambda file: file.name == heatmap.name):  # last: it says that all are there
        file.replace(heatmap.parent / file.name)


def remove_results(output_dir: Path, name: str) -> None:
    """Remove what an earlier run has left of a scan."""
    folder = result_path(output_dir, name, "report.png").parent
    if folder == output_dir / name:
        if folder.is_dir():
            require_ours(folder)
            shutil.rmtree(folder)
        return
    for kind in (*VOLUMES, "report"):
        for ending in (*RESULT_ENDINGS, ".json", ".png", ".html"):
            result_path(output_dir, name, kind + ending).unlink(missing_ok=True)


def _replace_folder(new: Path, old: Path) -> None:
    """Put folder ``new`` in the place of ``old``, which is moved away first: a rename cannot replace a full folder."""
    require_ours(old)
    if old.exists():
        away = Path(tempfile.mkdtemp(prefix=".replaced-", dir=old.parent))
        old.replace(away / old.name)
        new.replace(old)
        shutil.rmtree(away)
    else:
        new.replace(old)

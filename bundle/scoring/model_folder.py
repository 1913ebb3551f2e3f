"""The files that make up a model of a contrast, by their names in a folder."""

from __future__ import annotations

from pathlib import Path

from bundle.data.files import model_file, require_contrast
from bundle.transforms.normative import normative_file

# maps that are made with a file of their own
PARTS = ("reconstruction", "segmentation", "embedding")


def part_file(part: str, ckpt_dir: str | Path, contrast: str) -> str:
    """The file beside the model without which a map cannot be made: a network's weights, or the embedding's maps."""
    return str(Path(ckpt_dir) / (f"embedding_{contrast}.json" if part == "embedding" else f"{part}_{contrast}.pt"))


def model_files(ckpt_dir: str | Path, contrast: str) -> dict[str, str]:
    """All files of a contrast, there or not: "model", "landmarks", "normative", "calibration", and each of `PARTS`.

    Args:
        ckpt_dir: folder of the models.
        contrast: "t1", "t2", "flair", or "auto": names that stand for every contrast (`of_contrast`).

    Raises:
        InputError: another contrast.
    """
    require_contrast(contrast)
    files = {"model": model_file(ckpt_dir, contrast), "normative": normative_file(ckpt_dir, contrast)}
    files |= {kind: f"{ckpt_dir}/{kind}_{contrast}.json" for kind in ("landmarks", "calibration")}
    return files | {part: part_file(part, ckpt_dir, contrast) for part in PARTS}

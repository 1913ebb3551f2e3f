"""How far the lesions of labelled scans lie from healthy people: planted ones should be as strong as real ones.

For each prepared dataset and size (at least 0.1 ml of the person's own volume) the mean z-score of every lesion,
voxel-wise against the normative map of the model and to the lesions' side, and that minus the median of the brain 2 to
8 mm around the lesion. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bundle.data import load_datalist  # noqa: E402
from bundle.data.own_volume import own_voxel_mm3  # noqa: E402
from bundle.data.planting import LESION_LOOK  # noqa: E402
from bundle.errors import report_in_one_line  # noqa: E402
from bundle.reports.table import print_table  # noqa: E402
from bundle.transforms import load_normative, normative_file  # noqa: E402
from scripts.configs import config_part  # noqa: E402

SIZES_ML = (0.1, 1.0, 10.0, np.inf)
AROUND_MM = (2.0, 8.0)


def lesion_strengths(
    z: np.ndarray, label: np.ndarray, inside: np.ndarray, spacing: float, voxel_ml: float
) -> Iterator[tuple[float, float, float]]:
    """Volume (ml), mean z-score, and that minus the median around, of each lesion (26 neighbours).

    Args:
        z, label, inside: ``[H, W, D]``; the last two bool.
        spacing: of the cubic voxels, mm.
        voxel_ml: of the person's own volume in a voxel.
    """
    regions, _ = ndimage.label(label, np.ones((3, 3, 3)))
    margin = int(np.ceil(AROUND_MM[1] / spacing)) + 1
    for number, place in enumerate(ndimage.find_objects(regions), start=1):
        box = tuple(slice(max(side.start - margin, 0), side.stop + margin) for side in place)
        lesion = (regions[box] == number) & inside[box]
        distance = ndimage.distance_transform_edt(~lesion) * spacing
        around = (distance > AROUND_MM[0]) & (distance <= AROUND_MM[1]) & inside[box] & ~label[box]
        if lesion.any() and around.any():
            mean = float(z[box][lesion].mean())
            yield lesion.sum() * voxel_ml, mean, mean - float(np.median(z[box][around]))


def strengths_of(dataset_dir: str, section: str, contrast: str, ckpt_dir: str) -> np.ndarray:
    """`lesion_strengths` of all scans of a section, ``[N, 3]``."""
    preprocessing = config_part("evaluate", "preprocessing", ckpt_dir=ckpt_dir, contrast=contrast)
    normative = load_normative(normative_file(ckpt_dir, contrast))
    rows: list[tuple[float, float, float]] = []
    for item in load_datalist(dataset_dir, section, contrast, ["label"]):
        data = preprocessing(item)
        image, label = data["image"].as_tensor(), data["label"].as_tensor()[0].numpy() > 0
        spacing = float(np.linalg.norm(np.asarray(data["image"].affine)[:3, 0]))
        voxel_ml = own_voxel_mm3(data["image"], item.get("to_atlas")) / 1000
        rows += lesion_strengths(
            normative.z(image, contrast)[0].numpy(), label, image[0].numpy() > 0, spacing, voxel_ml
        )
    return np.array(rows).reshape(-1, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", required=True, nargs="+", help="prepared, with labels")
    parser.add_argument("--contrast", default="t1", choices=LESION_LOOK)
    parser.add_argument("--section", default="test")
    parser.add_argument("--ckpt_dir", default=str(ROOT / "models"))
    args = parser.parse_args()
    report_in_one_line()
    rows = []
    for folder in args.dataset_dir:
        found = strengths_of(folder, args.section, args.contrast, args.ckpt_dir)
        for low, high in zip(SIZES_ML[:-1], SIZES_ML[1:]):
            some = found[(found[:, 0] >= low) & (found[:, 0] < high)]
            if len(some):
                size = f"{low:g} to {high:g} ml" if high < np.inf else f"above {low:g} ml"
                cells = [f"{m:.1f} ({a:.1f} to {b:.1f})" for a, m, b in np.quantile(some[:, 1:], [0.1, 0.5, 0.9], 0).T]
                rows.append([Path(folder).name, size, str(len(some)), *cells])
    title = f"{args.contrast}, {args.section}: z-scores of lesions, median (10th to 90th percentile)"
    print_table(title, ["dataset", "lesion", "lesions", "mean z-score", "minus that around"], rows)


if __name__ == "__main__":
    main()

"""How much brighter or darker regions of the brain are in real scans than the normative map expects.

So synthetic scans, which that map was made from, are held against real ones. The regions are those of the synthesis
(`bundle.synthesis.tissue.REGIONS`), where people of a prepared dataset with anatomical labels have them. The scans need
no lesion masks: a median over a region leaves lesions out. Last comes the share of the brain whose z-score, to the
lesions' side, is above 3. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import Compose

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bundle.data import load_datalist  # noqa: E402
from bundle.errors import report_in_one_line  # noqa: E402
from bundle.reports.table import print_table  # noqa: E402
from bundle.synthesis import REGION_NAMES, SCHEMES, TISSUE_ORDER  # noqa: E402
from bundle.transforms import load_normative, normative_file  # noqa: E402
from scripts.configs import config_part  # noqa: E402

PEOPLE = 20
HIGH_Z = 3.0


def region_masks(shares: Iterable[np.ndarray]) -> np.ndarray:
    """Where regions lie, ``[7, H, W, D]`` bool, from the shares ``[7, H, W, D]`` of several people: the voxels whose
    mean share is at least half of the region's largest. Of cortex that can be fewer than half of the people.
    """
    total: Any = sum(shares)
    return total >= 0.5 * total.max((1, 2, 3), keepdims=True).clip(1e-6)


def differences(image: np.ndarray, mean: np.ndarray, masks: np.ndarray) -> list[float]:
    """Median over each region of intensity minus what is expected, ``[H, W, D]`` both; NaN without brain there."""
    places = (mask & (image > 0) for mask in masks)
    return [float(np.median((image - mean)[p])) if p.any() else np.nan for p in places]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", required=True, nargs="+", help="prepared real scans")
    parser.add_argument("--anatomy_dir", required=True, help="prepared dataset with anatomical labels")
    parser.add_argument("--label_scheme", default="dlmuse", choices=SCHEMES, help="of those labels")
    parser.add_argument("--contrast", default="flair", choices=TISSUE_ORDER)
    parser.add_argument("--section", default="test")
    parser.add_argument("--ckpt_dir", default=str(ROOT / "models"))
    args = parser.parse_args()
    report_in_one_line()
    normative = load_normative(normative_file(args.ckpt_dir, args.contrast))
    anatomy = Compose(config_part("synthesis", "volumes", contrast="flair", label_scheme=args.label_scheme))
    people = load_datalist(args.anatomy_dir, "training", require=["anatomy_label"])[:PEOPLE]
    masks = region_masks(anatomy(person)["regions"].numpy() for person in people)
    preprocessing = config_part("evaluate", "preprocessing", ckpt_dir=args.ckpt_dir, contrast=args.contrast)
    rows: list[list[str]] = []
    for folder in args.dataset_dir:
        for item in load_datalist(folder, args.section, args.contrast):
            volume = preprocessing(item)["image"].as_tensor()
            high = normative.z(volume, args.contrast)[volume > 0] > HIGH_Z
            image = volume[0].numpy()
            mean, spread, _ = (m[0].numpy() for m in normative.on(image.shape))
            if not rows:
                rows = [["spread", *(f"{np.median(spread[mask]):.2f}" for mask in masks), ""]]
            found = [f"{d:+.2f}" for d in differences(image, mean, masks)]
            rows.append([item["name"], *found, f"{100 * high.float().mean():.1f} %"])
    columns = ["scan", *REGION_NAMES, f"z above {HIGH_Z:g}"]
    print_table(f"{args.contrast}: brightness minus what is expected", columns, rows)


if __name__ == "__main__":
    main()

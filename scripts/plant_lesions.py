"""Plant lesions of real shape into healthy scans of a prepared dataset, to measure what is found of them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bundle.data.planting import LESION_LOOK, plant_masks
from bundle.errors import InputError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset_dir", required=True, type=Path, help="prepared dataset")
    parser.add_argument("--mask_dir", required=True, type=Path, help="lesion masks in atlas space (NIfTI)")
    parser.add_argument("--output_dir", required=True, type=Path, help="new dataset with the sections tuning and test")
    parser.add_argument("--contrast", default="t1", choices=LESION_LOOK)
    parser.add_argument("--section", default="validation", help="of the healthy scans")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        print(plant_masks(**vars(args)))
    except InputError as error:
        sys.exit(f"plant_lesions: {error}")


if __name__ == "__main__":
    main()

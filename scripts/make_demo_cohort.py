"""Write the demo's cohort of phantoms: a prepared dataset on the 2 mm grid, made from the MNI152 anatomy."""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from bundle.data.phantom import make_cohort


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--training", type=int, default=24, help="subjects to train on")
    parser.add_argument("--validation", type=int, default=4)
    parser.add_argument("--calibration", type=int, default=10)
    parser.add_argument("--test", type=int, default=6, help="subjects with lesions")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    grid = yaml.safe_load((Path(__file__).parents[1] / "configs" / "grid_2mm.yaml").read_text())
    subjects = {section: getattr(args, section) for section in ("training", "validation", "calibration", "test")}
    file = make_cohort(
        args.output_dir, subjects, grid["spacing"], grid["spatial_size"], (0.0, -17.0, 5.0), seed=args.seed
    )
    print(f"{file}: " + ", ".join(f"{n} {section}" for section, n in subjects.items()))


if __name__ == "__main__":
    main()

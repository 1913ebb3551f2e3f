"""Write BRATS 2013's z-scored FLAIR scans as a scanner's files would be (6 more, times 100), and beside them their
brain and lesion masks: ready for a preparation with `--dataset folder`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bundle.data.volumes import write_volume  # noqa: E402
from bundle.errors import InputError, report_in_one_line  # noqa: E402
from scripts.retention import real_scans  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source_dir", type=Path, required=True, help="holds a folder of each patient")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    patients = sorted(f.parent for f in args.source_dir.glob("*/flair_zscored.nii.gz"))
    if not patients:
        raise InputError(f"{args.source_dir}: no patient with a flair_zscored.nii.gz there")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for patient in patients:
        for _, file, lesion, brain in real_scans(patient, args.output_dir):
            affine = nib.load(file).affine  # type: ignore[attr-defined]
            for name, mask in (("brain_mask", brain), ("lesion", lesion)):
                write_volume(args.output_dir / f"{patient.name}_{name}.nii.gz", mask.astype(np.uint8), affine)
        print(f"{patient.name}: written to {args.output_dir}")


if __name__ == "__main__":
    report_in_one_line()
    main()

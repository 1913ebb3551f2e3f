"""Plant lesions of real shape into raw healthy scans and prepare them: what is found through the whole chain.

OUT/raw holds the planted scans as a scanner would have made them, OUT is the prepared dataset with the sections tuning
and test, of different subjects. No lesion lies in a person's fluid, as far as anatomical labels tell where it is. Can
be stopped and started again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from monai.bundle import ConfigParser

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bundle.data.anatomy import Anatomies  # noqa: E402
from bundle.data.planted_cohort import plant_masks  # noqa: E402
from bundle.data.planting import LESION_LOOK  # noqa: E402
from bundle.errors import InputError, report_in_one_line  # noqa: E402
from bundle.synthesis import SCHEMES  # noqa: E402


def add_planting(parser: argparse.ArgumentParser) -> None:
    """The options of all that plants lesions."""
    parser.add_argument(
        "--strength",
        type=float,
        nargs=2,
        metavar=("LEAST", "MOST"),
        help="of the lesions, in [0, 1]; default: about as strong as real ones (bundle.data.planting.LESION_LOOK)",
    )
    parser.add_argument(
        "--anatomy_dir",
        default="",
        help="prepared dataset with anatomical labels of the healthy people, whose fluid gets no lesion; default: what "
        "labels the healthy dataset itself has",
    )
    parser.add_argument("--label_scheme", default="dlmuse", choices=SCHEMES, help="of those labels")


def chosen_anatomies(args: argparse.Namespace, healthy: Sequence[str | Path]) -> Anatomies | None:
    """Of the named dataset, or of the healthy ones; that there are none is told."""
    found = Anatomies([args.anatomy_dir] if args.anatomy_dir else healthy, SCHEMES[args.label_scheme])
    if args.anatomy_dir and not found:
        raise InputError(
            f"{args.anatomy_dir}: has no anatomical labels; name a dataset of which the preparation had some"
        )
    if not found:
        print("no anatomical labels (--anatomy_dir): lesions can lie in fluid, where real ones do not")
    return found or None


def prepare(raw_dir: Path, dataset_dir: Path, overrides: list[str]) -> None:
    """Run the whole preparation (configs/prepare.json) over the planted scans."""
    parser = ConfigParser()
    parser.read_config(str(ROOT / "configs/prepare.json"))
    settings = dict(item.split("=", 1) for item in overrides)
    parser.update({key: yaml.safe_load(value) for key, value in settings.items()})
    folders = {"source_dir": str(raw_dir), "dataset_dir": str(dataset_dir)}
    parser.update({"bundle_root": str(ROOT), "dataset": "planted", **folders})
    parser.get_parsed_content("run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", required=True, type=Path, help="prepared dataset of healthy subjects")
    parser.add_argument("--mask_dir", required=True, type=Path, nargs="+", help="lesion masks in atlas space (NIfTI)")
    parser.add_argument("--output_dir", required=True, type=Path, help="new dataset with the sections tuning and test")
    parser.add_argument("--contrast", default="t1", choices=LESION_LOOK)
    parser.add_argument(
        "--section",
        nargs="+",
        default=[],
        help="of the healthy scans, divided by subject; default: tuning and test as they are, or validation",
    )
    parser.add_argument("--repeats", type=int, default=1, help="how many scans get each mask; default: %(default)s")
    parser.add_argument("--given_mask", action="store_true", help="keep the healthy scan's brain mask")
    add_planting(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--override", nargs="*", default=[], metavar="NAME=VALUE", help="of configs/prepare.json")
    args = parser.parse_args()
    report_in_one_line()
    raw = plant_masks(
        args.dataset_dir,
        args.mask_dir,
        args.output_dir / "raw",
        args.contrast,
        args.section,
        args.given_mask,
        strength=args.strength,
        seed=args.seed,
        anatomies=chosen_anatomies(args, [args.dataset_dir]),
        repeats=args.repeats,
    )
    prepare(raw, args.output_dir, args.override)


if __name__ == "__main__":
    main()

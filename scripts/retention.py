"""What the chain leaves of lesions: planted into raw scans in their own voxels, and followed through it step by step.

Planted: each lesion goes into one raw healthy scan, whose twin is the same scan without it. Not into fluid, where
anatomical labels tell it, nor where only the prepared mask sees brain and neither the atlas nor the chain's own mask of
the twin does: automatic labels take the sagittal sinus for cortex. Mask and alignment are found on the planted scan, as
for a patient's, and serve both; field and normalisation are each scan's own. The figure is the lesion's contrast to its
surroundings (`bundle.metrics.retention.planted_contrast`) after a step as a share of what a chain would leave that the
lesion does not disturb: up to the grid, of what was planted; then, of the same change with the twin's own field and
scale. So neither a field that rightly lifts a lesion in the dark nor a brain that is more even without its shading
passes for a gain. What the mask cut off is lost; what the twin's own mask ("healthy mask") leaves of the same change
tells whether the lesion is the cause. Whether a lesion pulls the registration is not seen here.

Shading: raw scans are shaded by a sum of Gaussian coil sensitivities (+-30 % in the brain); the share of it that is
gone after the bias correction. And the variation of white matter (where the atlas has little else) before and after it,
and the z-scores of the brain, which tell whether other scanners' healthy tissue looks healthy.

Real lesions: AUPRC of plain brightness (darkness on T1w) inside the brain of the scan's own voxels before the chain,
after every step (brought back to those voxels; what a mask left out comes last), and contrast to the surroundings.

Prints Markdown. With --ckpt_dir it is the chain of inference.json with that model's normative map, else prepare.json's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
import yaml
from monai.data import MetaTensor
from monai.transforms import ResampleToMatch
from scipy import ndimage
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bundle.data import list_scans, load_datalist  # noqa: E402
from bundle.data.anatomy import Anatomies  # noqa: E402
from bundle.data.atlas import load_atlas  # noqa: E402
from bundle.data.files import AUTO, read_json, write_json  # noqa: E402
from bundle.data.planted_cohort import read_masks, read_raw  # noqa: E402
from bundle.data.planting import LESION_LOOK, plant_lesion, share_of_voxels  # noqa: E402
from bundle.data.volumes import nifti_header, write_volume  # noqa: E402
from bundle.errors import InputError, explain, report_in_one_line  # noqa: E402
from bundle.metrics import average_precision  # noqa: E402
from bundle.metrics.retention import planted_contrast, real_contrast, robust_spread, shading_removed, variation  # noqa: E402
from bundle.reports.table import print_table  # noqa: E402
from bundle.synthesis import coil_shading  # noqa: E402
from bundle.transforms import load_normative, normative_file  # noqa: E402
from scripts.configs import config_part  # noqa: E402
from scripts.plant_lesions import add_planting, chosen_anatomies  # noqa: E402

STEPS = {
    "BrainMaskd": "mask",
    "RecoverBraind": "recovered",
    "ResampleToGridd": "grid",
    "CorrectBiasFieldd": "bias field",
    "NormalizeBrainIntensityd": "normalised",
}
HEALTHY_MASK = "healthy mask"  # what the twin's own mask leaves of the same change
SPHERES_MM = (5, 10, 20, 40, 60)
SIZES_ML = (0, 1, 10, 50, 200)
SHADING = 0.3
LEAST_CONTRAST = 0.3  # spreads; what is planted fainter (fluid made dark) has no share that means anything


class Step(NamedTuple):
    """Volumes ``[X, Y, Z]`` after a step: the scan, its twin, the soft lesion; the brain (bool); affine to mm."""

    name: str
    scan: np.ndarray
    twin: np.ndarray
    soft: np.ndarray
    inside: np.ndarray
    affine: np.ndarray
    image: MetaTensor  # the scan with its meta data


def in_file_order(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """A volume ``[X, Y, Z]`` with its axes in RAS order, in the order of the file, whose affine this is."""
    order = nib.orientations.ornt_transform(nib.io_orientation(np.eye(4)), nib.io_orientation(affine))
    return nib.orientations.apply_orientation(volume, order)


class Chain:
    """The transforms of a config, one by one."""

    def __init__(self, contrast: str, ckpt_dir: str, overrides: dict[str, Any]) -> None:
        self.ckpt_dir = ckpt_dir
        self.brains: dict[Path | str, np.ndarray] = {}
        config = "inference" if ckpt_dir else "prepare"
        settings = {"contrast": contrast, "ckpt_dir": ckpt_dir} if ckpt_dir else {"dataset": "folder"}
        chain = config_part(config, "preprocessing", **{**settings, **overrides}).transforms
        # the head with its skull is for pictures only
        kept = [t for t in chain if type(t).__name__ != "CopyItemsd" and getattr(t, "mask_key", "") is not None]
        names = [type(t).__name__ for t in kept]
        self.load, self.own = kept[: names.index("BrainMaskd")], kept[names.index("BrainMaskd") :]
        self.atlas = load_atlas(kept[names.index("RecoverBraind")].atlas).brain_mask

    def read(self, file: Path | str) -> dict[str, Any]:
        data: dict[str, Any] = {"image": str(file), "name": Path(file).name}
        for transform in self.load:
            data = transform(data)
        return data

    def brain(self, file: Path | str) -> np.ndarray:
        """Brain of a scan, ``[X, Y, Z]`` bool, as the first step finds it; found once for each file."""
        if file not in self.brains:
            self.brains[file] = self.own[0](self.read(file))["brain_mask"].as_tensor()[0].numpy() > 0
        return self.brains[file]

    def agreed(self, brain: np.ndarray, file: Path | str, affine: np.ndarray, to_atlas: np.ndarray) -> np.ndarray:
        """A brain ``[X, Y, Z]`` (bool) in a scan's own voxels without what neither `brain` nor the atlas calls so.

        Args:
            affine, to_atlas: from the voxels to the scan's and to the atlas' world.
        """
        found = in_file_order(self.brain(file), affine)
        matrix = np.linalg.inv(np.asarray(self.atlas.affine, float)) @ to_atlas
        expected = ndimage.affine_transform(self.atlas[0].numpy(), matrix, output_shape=brain.shape, order=0) > 0
        return brain & (found | expected)

    def follow(self, scan: Path | str, twin: Path | str, soft: Path | str | None = None) -> Iterator[Step]:
        """A scan, its twin and the lesion's share of voxels (files on one grid) through the chain."""
        data, other = self.read(scan), self.read(twin)["image"].as_tensor()
        share = self.read(soft)["image"].as_tensor() if soft else torch.zeros_like(other)
        pair: list[dict[str, Any]] | None = None
        for transform in self.own:
            name = type(transform).__name__
            if pair is None and name == "ResampleToGridd":  # one geometry for all, from here on each its own
                image = data["image"]
                moved = [MetaTensor(v.clone()).copy_meta_from(image) for v in (image.as_tensor(), other, share)]
                share = transform.resample(moved[2]).as_tensor()
                mask = data["brain_mask"]
                pair = [{**data, "image": v, "brain_mask": mask.clone()} for v in moved[:2]]
                for one in pair:
                    one.pop("coverage", None)
            if pair is None:
                data = transform(data)
                now, twin_now = data, other
            else:
                pair = [transform(one) for one in pair]
                now, twin_now = pair[0], pair[1]["image"].as_tensor()
            if name in STEPS:
                image, inside = now["image"], now["brain_mask"].as_tensor()[0].numpy() > 0
                arrays = [v[0].float().numpy() for v in (image.as_tensor(), twin_now, share)]
                scan_now, twin_now, soft_now = arrays
                affine = np.asarray(image.affine, float)
                yield Step(STEPS[name], scan_now, twin_now, soft_now, inside, affine, image)


def lesions(masks: dict[str, str], cases: int) -> Iterator[tuple[str, Any]]:
    """Families of lesions: diameters of spheres, or masks (voxels and affine in the atlas' world) of all sizes."""
    for diameter in SPHERES_MM:
        for _ in range(cases):
            yield f"sphere {diameter} mm", diameter
    for family, folder in masks.items():
        found = read_masks(folder, (SIZES_ML[0], SIZES_ML[-1]))
        for low, high in zip(SIZES_ML[:-1], SIZES_ML[1:]):
            some = [m for m in found if low <= m[1] < high]
            # fewer masks than cases: some in several heads
            for pick in np.linspace(0, len(some) - 1, cases if some else 0).round().astype(int):
                yield f"{family} {low} to {high} ml", some[pick][2:]


def soft_lesion(
    what: Any, brain: np.ndarray, affine: np.ndarray, to_atlas: np.ndarray, rng: np.random.RandomState
) -> np.ndarray:
    """Share of lesion in the voxels of a raw scan: a mask in its place, or a sphere anywhere in the brain, which may
    reach its surface.
    """
    if not isinstance(what, (int, float)):
        mask, mask_affine = what
        return share_of_voxels(mask, mask_affine, brain.shape, to_atlas) * brain
    places = np.argwhere(brain)
    middle = (affine @ [*places[rng.randint(len(places))], 1])[:3]
    fine = min(1.0, what / 10)
    width = int(np.ceil(what / fine)) + 4
    index = np.indices((width,) * 3) - (width - 1) / 2
    sphere = (np.sqrt((index**2).sum(0)) * fine <= what / 2).astype(np.float32)
    sphere_affine = np.diag([fine, fine, fine, 1.0])
    sphere_affine[:3, 3] = middle - fine * (width - 1) / 2
    return share_of_voxels(sphere, sphere_affine, brain.shape, affine) * brain


def follow_planted(
    chain: Chain,
    scan: dict[str, Any],
    what: Any,
    contrast: str,
    seed: list[int],
    strength: tuple[float, float] | None = None,
    anatomies: Anatomies | None = None,
) -> dict[str, float]:
    """Share of the contrast left after every step; ``planted`` is that contrast in spreads of the raw scan, ``ml`` the
    lesion's volume. Empty if the lesion does not show.
    """
    rng = np.random.RandomState(seed)
    image, affine, brain, to_atlas = read_raw(scan)
    soft = soft_lesion(what, brain, affine, to_atlas, rng)
    brain = chain.agreed(brain, scan["source"]["image"], affine, to_atlas)
    soft = soft * brain
    soft = anatomies.without_fluid(soft, scan, to_atlas) if anatomies else soft
    volume, inside, share = (torch.as_tensor(v, dtype=torch.float32)[None] for v in (image, brain, soft))
    planted = plant_lesion(volume, inside, share, contrast, strength, rng)[0][0].numpy()
    first = planted_contrast(planted, image, soft, brain, affine)
    if not abs(first) >= LEAST_CONTRAST:
        return {}
    found = {"planted": first, "ml": float(soft.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000)}
    expected = planted_contrast(planted, image, soft, brain, affine, 1.0)  # of a chain that the lesion does not disturb
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{name}.nii.gz" for name in ("scan", "soft")]
        for file, array in zip(files, (planted, soft)):
            write_volume(file, array.astype(np.float32), affine, nifti_header(scan["source"]["image"]))
        on_grid, kept, spread = None, 1.0, 1.0
        for step in chain.follow(files[0], scan["source"]["image"], files[1]):
            if step.name == "mask":
                healthy = chain.brain(scan["source"]["image"])
                unchanged = planted_contrast(step.scan, step.twin, step.soft, healthy, step.affine, 1.0)
                found[HEALTHY_MASK] = unchanged / expected
            elif step.name == "grid":
                on_grid = step
            elif step.name == "bias field" and on_grid is not None:
                # the field of the twin on the planted change: it lifts a lesion in the dark, as it should
                field = np.where(step.twin > 0, on_grid.twin / np.where(step.twin > 0, step.twin, 1), 1)
                ideal = step.twin + (on_grid.scan - on_grid.twin) / np.where(field > 0, field, 1)
                expected = planted_contrast(ideal, step.twin, step.soft, step.inside, step.affine, 1.0) / kept
                spread = robust_spread(step.twin[step.inside])
            scale = robust_spread(step.twin[step.inside]) / spread if step.name == "normalised" else 1.0
            now = planted_contrast(step.scan, step.twin, step.soft, step.inside, step.affine, scale)
            found[step.name] = now / expected
            if step.name == "grid":
                kept = found["grid"]
    return found


def follow_shading(chain: Chain, scan: dict[str, Any], seed: list[int]) -> float:
    """Share of a planted shading that the bias correction took away."""
    image, affine, brain, _ = read_raw(scan)
    field = coil_shading(brain, affine, SHADING, np.random.RandomState(seed))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scan.nii.gz"
        write_volume(file, image * field, affine, nifti_header(scan["source"]["image"]))
        ratio, lit = {}, np.ones(1, bool)
        for step in chain.follow(file, scan["source"]["image"]):
            if step.name in ("grid", "bias field"):  # where there is next to no signal a ratio means nothing
                lit = lit & step.inside & (step.twin > 0.1 * np.median(step.twin[step.inside])) & (step.scan > 0)
                ratio[step.name] = step.scan / np.where(lit, step.twin, 1)
    return shading_removed(ratio["grid"][lit], ratio["bias field"][lit])


def white_matter(image: MetaTensor) -> np.ndarray:
    """Where the atlas has little but white matter, on the grid of ``image``."""
    from nilearn.datasets import load_mni152_wm_template

    template: Any = load_mni152_wm_template(resolution=2)
    data = torch.as_tensor(np.asarray(template.dataobj, np.float32))[None]
    share: Any = ResampleToMatch(mode="bilinear", padding_mode="zeros")(
        MetaTensor(data, affine=torch.as_tensor(template.affine)), img_dst=image
    )
    return share[0].numpy() > 0.9


def follow_variation(chain: Chain, file: str) -> dict[str, Any]:
    """Coefficient of variation of white matter before and after the bias correction; of a chain with a model also the
    contrast that the scan was taken for, and the median distance of the brain from the normative mean, in its spreads.
    """
    found: dict[str, Any] = {}
    for step in chain.follow(file, file):
        if step.name in ("grid", "bias field"):
            found[step.name] = variation(step.scan[step.inside & white_matter(step.image)])
        elif step.name == "normalised" and chain.ckpt_dir:
            found["contrast"] = step.image.meta["contrast"]
            normative = load_normative(normative_file(chain.ckpt_dir, found["contrast"]))
            z = normative.z(step.image.as_tensor(), found["contrast"])[0].numpy()
            found["z"] = float(np.median(np.abs(z[step.inside])))
    return found


def real_scans(folder: Path, scratch: Path) -> Iterator[tuple[str, Path, np.ndarray, np.ndarray]]:
    """Contrast, file, lesion and brain (bool) of a patient's scans: ``t1``, ``t2``, ``flair`` with ``lesion``, or a
    z-scored FLAIR, made like a scanner's by 6 more and times 100.
    """
    zscored = folder / "flair_zscored.nii.gz"
    if zscored.is_file():
        image, mask, tumour = (
            np.asarray(nib.load(folder / f"{n}.nii.gz").dataobj, np.float32)  # type: ignore[attr-defined]
            for n in ("flair_zscored", "brain_mask", "tumour_labels")
        )
        brain = mask > 0.5
        file = scratch / f"{folder.name}_flair.nii.gz"
        write_volume(file, np.where(brain, (image + 6) * 100, 0).astype(np.float32), nib.load(zscored).affine)  # type: ignore[attr-defined]
        yield "flair", file, tumour > 0, brain
        return
    for contrast in LESION_LOOK:
        file = folder / f"{contrast}.nii.gz"
        if file.is_file():
            image, label = (np.asarray(nib.load(f).dataobj) for f in (file, folder / "lesion.nii.gz"))  # type: ignore[attr-defined]
            yield contrast, file, label > 0, image != 0


def follow_real(
    chain: Chain, contrast: str, file: Path, lesion: np.ndarray, brain: np.ndarray
) -> dict[str, tuple[float, float]]:
    """AUPRC of plain brightness in the scan's own voxels, and contrast to the surroundings, by step."""
    sign = -1.0 if contrast == "t1" else 1.0
    loaded = nib.load(file)
    image, affine = np.asarray(loaded.dataobj, np.float32), np.asarray(loaded.affine)  # type: ignore[attr-defined]

    def area(values: np.ndarray, there: np.ndarray) -> float:
        score = np.where(there, sign * values, -np.inf)
        score[~there] = score[there & brain].min() - 1  # left out: found last
        return average_precision(torch.as_tensor(score[brain]), torch.as_tensor(lesion[brain]))

    found = {"before": (area(image, brain), real_contrast(image, lesion, brain, affine))}
    with tempfile.TemporaryDirectory() as folder:
        soft = Path(folder) / "lesion.nii.gz"
        write_volume(soft, lesion.astype(np.float32), affine)
        like: Any = None
        for step in chain.follow(file, file, soft):
            if step.name in ("mask", "recovered"):
                like = step.image
            contrasted = real_contrast(step.scan, step.soft >= 0.5, step.inside, step.affine)
            back = [np.where(step.inside, step.scan, 0), step.inside.astype(np.float32)]
            if step.name not in ("mask", "recovered"):
                tensors = [MetaTensor(torch.as_tensor(v)[None], affine=step.image.affine) for v in back]
                resample: Any = ResampleToMatch(mode="bilinear", padding_mode="zeros")
                back = [resample(v, img_dst=like)[0].numpy() for v in tensors]
            values, there = (in_file_order(v, affine) for v in back)
            found[step.name] = (area(values / np.maximum(there, 0.01), there > 0.01), contrasted)
    return found


def healthy_scans(dataset_dirs: list[str], contrast: str, section: str) -> list[dict[str, Any]]:
    scans: list[dict[str, Any]] = []
    for folder in dataset_dirs:
        content = read_json(Path(folder) / "datalist.json", "list of the dataset")
        if any(item.get("contrast", contrast) == contrast for item in content.get(section, [])):
            scans += load_datalist(folder, section, contrast, ["brain_mask"])
    return scans


def bench_planted(chain: Chain, scans: list[dict[str, Any]], contrast: str, args: Any) -> list[dict[str, Any]]:
    cases = []
    todo = list(lesions(dict(args.masks), args.cases))
    for scan in scans if args.anatomies else []:
        args.anatomies.file_of(scan)
    for number, (family, what) in enumerate(tqdm(todo, desc=contrast, unit="lesion")):
        scan = scans[number % len(scans)]
        for attempt in range(5):  # a sphere that does not show is put elsewhere
            try:
                seed = [args.seed, number, attempt]
                found = follow_planted(chain, scan, what, contrast, seed, args.strength, args.anatomies)
            except Exception as error:  # one broken case must not stop the others
                print(f"{scan['name']}, {family}: failed: {explain(error)}")
                break
            if found:
                cases.append({"contrast": contrast, "family": family, "scan": scan["name"], **found})
                break
            if not isinstance(what, (int, float)):
                print(f"{scan['name']}, {family}: does not show there, left out")
                break
    return cases


def print_planted(contrast: str, cases: list[dict[str, Any]]) -> None:
    steps = [name for name in (HEALTHY_MASK, *STEPS.values()) if name in cases[0]]
    rows = []
    for family in (*dict.fromkeys(case["family"] for case in cases), "all"):
        some = [case for case in cases if family in (case["family"], "all")]
        ml = [case["ml"] for case in some]
        row = [family, str(len(some)), f"{min(ml):.2g} to {max(ml):.2g}"]
        for step in steps:
            shares = [case[step] for case in some]
            row.append(f"{np.median(shares):.2f} ({min(shares):.2f})")
        rows.append(row)
    title = f"{contrast}: contrast left of planted lesions, median (worst)"
    print_table(title, ["lesion", "cases", "ml", *steps], rows)


def pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"'{text}' must be NAME=VALUE")
    return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--healthy", nargs="+", default=[], metavar="DATA", help="prepared, of healthy subjects")
    parser.add_argument("--masks", nargs="+", type=pair, default=[], metavar="FAMILY=DIR", help="in atlas space")
    parser.add_argument("--real", nargs="+", type=Path, default=[], metavar="FOLDER", help="a patient each")
    parser.add_argument(
        "--scans",
        nargs="+",
        default=[],
        metavar="FILE_OR_DIR",
        help="for white matter's variation and the z-scores of healthy tissue",
    )
    parser.add_argument("--contrast", nargs="+", default=list(LESION_LOOK), choices=LESION_LOOK)
    parser.add_argument("--section", default="test", help="of the healthy scans")
    add_planting(parser)
    parser.add_argument("--cases", type=int, default=4, help="of each family and size, and of variation")
    parser.add_argument("--ckpt_dir", default="", help="folder of models, for the chain of inference")
    parser.add_argument("--override", nargs="+", type=pair, default=[], metavar="NAME=VALUE", help="of the config")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON with every case")
    args = parser.parse_args()
    report_in_one_line()
    torch.set_num_threads(1)
    for name in ("healthy", "masks", "real", "scans"):
        if not getattr(args, name):
            print(f"no --{name}: skipped")
    args.anatomies = chosen_anatomies(args, args.healthy) if args.healthy else None
    chains = {
        contrast: Chain(contrast, args.ckpt_dir, {k: yaml.safe_load(v) for k, v in args.override})
        for contrast in args.contrast
    }
    results: dict[str, list[dict[str, Any]]] = {"planted": [], "shading": [], "variation": [], "real": []}
    for contrast, chain in chains.items():
        scans = healthy_scans(args.healthy, contrast, args.section)
        if not scans:
            print(f"{contrast}: no healthy scans in '{args.section}', skipped")
            continue
        cases = bench_planted(chain, scans, contrast, args)
        results["planted"] += cases
        if cases:
            print_planted(contrast, cases)
        shaded = [follow_shading(chain, scan, [args.seed, n]) for n, scan in enumerate(scans)]
        results["shading"] += [{"contrast": contrast, "scan": s["name"], "removed": r} for s, r in zip(scans, shaded)]
        removed = f"{np.median(shaded):.2f} (worst {min(shaded):.2f}, {len(shaded)} scans)"
        print(f"\n{contrast}: planted shading of +-30 % removed: {removed}")
        for scan in scans[: args.cases]:
            found = follow_variation(chain, scan["source"]["image"])
            results["variation"].append({"contrast": contrast, "scan": scan["name"], **found})
    overrides = {k: yaml.safe_load(v) for k, v in args.override}
    any_chain = Chain(AUTO, args.ckpt_dir, overrides) if args.ckpt_dir else next(iter(chains.values()))
    for place in args.scans:
        for scan in list_scans(place):
            try:
                results["variation"].append({"scan": scan["name"], **follow_variation(any_chain, scan["image"])})
            except Exception as error:
                print(f"{scan['image']}: failed: {explain(error)}")
    if results["variation"]:
        rows = [
            [
                r.get("contrast", ""),
                r["scan"],
                f"{r['grid']:.3f}",
                f"{r['bias field']:.3f}",
                f"{r.get('z', np.nan):.2f}",
            ]
            for r in results["variation"]
        ]
        columns = ["", "scan", "before", "after the bias field", "median of the brain's absolute z-score"]
        print_table("White matter's coefficient of variation", columns, rows)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for folder in args.real:
            if not folder.is_dir():
                raise InputError(f"{folder}: not a folder of a patient")
            for contrast, file, lesion, brain in real_scans(folder, Path(scratch)):
                if contrast in chains:
                    steps = follow_real(chains[contrast], contrast, file, lesion, brain)
                    results["real"].append({"patient": folder.name, "contrast": contrast, "steps": steps})
                    cells = [f"{a:.3f} ({c:+.2f})" for a, c in steps.values()]
                    kept = steps["normalised"][0] / steps["before"][0]
                    rows.append([folder.name, contrast, *cells, f"{kept:.3f}"])
                    columns = ["patient", "contrast", *steps, "kept"]
    if rows:
        print_table("Real lesions: AUPRC of plain brightness (contrast to the surroundings)", columns, rows)
    if args.output:
        write_json(args.output, results)


if __name__ == "__main__":
    main()

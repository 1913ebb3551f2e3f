"""Lesions of real shape planted into raw healthy scans: a bench whose truth is known to the voxel.

It measures whether a change of brightness of this shape, size and place is found, through the whole chain: the scans
are those that the scanner made, and are prepared after the planting. Real lesions also pull, swell and have edges of
their own; what is reached here is no promise for patients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

from bundle.errors import InputError

from .anatomy import Anatomies
from .datalist import load_datalist
from .files import claim_folder, read_json, write_json
from .formats import is_nifti, stem
from .planting import LESION_LOOK, plant_lesion, share_of_voxels
from .volumes import nifti_header, write_volume


def read_raw(scan: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The raw file that an item of a prepared dataset came from.

    Args:
        scan: item of `load_datalist` with ``source``, ``to_atlas`` and ``brain_mask``.

    Returns:
        the raw scan ``[X, Y, Z]``, float32; its affine; its brain, by the prepared mask, on the same voxels, bool; and
        the affine from its voxels to the atlas' world.

    Raises:
        InputError: the item does not tell where it came from, or no NIfTI file with one volume is there.
    """
    file = scan.get("source", {}).get("image", "")
    if not file or "to_atlas" not in scan:
        raise InputError(
            f"{scan['image']}: its item names no raw scan ('source', 'to_atlas'); lesions are planted into raw scans, "
            "so use a dataset that the preparation made"
        )
    if not is_nifti(file) or not Path(file).is_file():
        raise InputError(f"{file}: not there, or no NIfTI file; it is the raw scan of {scan['image']}")
    image: Any = nib.squeeze_image(nib.load(file))
    volume = np.asarray(image.dataobj, np.float32)
    if volume.ndim != 3:
        raise InputError(f"{file}: holds {volume.ndim} dimensions; a scan has three")
    affine, to_atlas = np.asarray(image.affine, float), scan["to_atlas"] @ image.affine
    brain: Any = nib.load(scan["brain_mask"])
    to_grid = np.linalg.inv(brain.affine) @ to_atlas
    share = ndimage.affine_transform(np.asarray(brain.dataobj, np.float32), to_grid, output_shape=volume.shape, order=1)
    return volume, affine, (share >= 0.5) & np.isfinite(volume), to_atlas


def read_masks(mask_dir: str | Path, volume_ml: tuple[float, float]) -> list[tuple[str, float, np.ndarray, np.ndarray]]:
    """Lesion masks of a folder: name, ml, voxels (0 and 1, ``[A, B, C]``) and affine of each, the smallest first.

    Raises:
        InputError: none there, or none of the size.
    """
    files = sorted(f for f in Path(mask_dir).glob("*") if is_nifti(f))
    if not files:
        raise InputError(f"{mask_dir}: no lesion masks (.nii, .nii.gz) here")
    found = []
    for file in files:
        image: Any = nib.squeeze_image(nib.load(file))
        mask = (np.asarray(image.dataobj) > 0).astype(np.uint8)
        ml = float(mask.sum()) * abs(np.linalg.det(image.affine[:3, :3])) / 1000
        if volume_ml[0] <= ml <= volume_ml[1]:
            found.append((stem(file), ml, mask, image.affine))
    if not found:
        raise InputError(f"{mask_dir}: no mask of {volume_ml[0]:g} to {volume_ml[1]:g} ml")
    return sorted(found, key=lambda mask: mask[1])


def divide_people(
    dataset_dir: str | Path, contrast: str, sections: Sequence[str] = (), seed: int = 0
) -> dict[str, list[dict[str, Any]]]:
    """Healthy scans of a prepared dataset for "tuning" and for "test", of different people.

    Args:
        dataset_dir: prepared dataset.
        contrast: of the scans.
        sections: whose people are divided in two halves. None named: those of its sections "tuning" and "test", if it
            has both, else the people of "test" or, if there is no such section, of "validation".
        seed: of the division.

    Raises:
        InputError: no scans, or fewer than two people.
    """
    content = read_json(Path(dataset_dir) / "datalist.json", "list of the dataset")
    if not sections and content.get("tuning") and content.get("test"):
        return {part: load_datalist(dataset_dir, part, contrast, ["brain_mask"]) for part in ("tuning", "test")}
    sections = sections or ["test" if content.get("test") else "validation"]
    scans = [scan for section in sections for scan in load_datalist(dataset_dir, section, contrast, ["brain_mask"])]
    people = sorted({scan.get("person", scan["name"]) for scan in scans})
    if len(people) < 2:
        raise InputError(f"{dataset_dir}: one person in {', '.join(sections)}; tuning and test need one each")
    np.random.RandomState(seed).shuffle(people)
    for_test = set(people[: len(people) // 2])
    halves: dict[str, list[dict[str, Any]]] = {"tuning": [], "test": []}
    for scan in scans:
        halves["test" if scan.get("person", scan["name"]) in for_test else "tuning"].append(scan)
    return halves


def plant_masks(
    dataset_dir: str | Path,
    mask_dir: str | Path | Sequence[str | Path],
    output_dir: str | Path,
    contrast: str,
    sections: Sequence[str] = (),
    given_mask: bool = False,
    volume_ml: tuple[float, float] = (0.3, 200.0),
    strength: tuple[float, float] | None = None,
    seed: int = 0,
    anatomies: Anatomies | None = None,
    repeats: int = 1,
) -> Path:
    """Deal lesion masks out to the raw scans of healthy people, one per copy of a scan, and write the copies as a
    cohort that the recipe ``planted`` prepares: ``SECTION/NAME_CONTRAST.nii.gz`` and ``..._lesion.nii.gz`` in the
    scan's own voxels, with its header.

    The sections are "tuning" and "test": of different people, and with every second mask by size each, so that both
    hold all sizes and choices made on the one can be measured on the other. A mask lies where it lies in atlas space,
    or mirrored. A folder's earlier cohort of the contrast is replaced; what is there already is kept.

    Args:
        dataset_dir: prepared dataset whose items tell their raw scans.
        mask_dir: NIfTI masks in atlas space, one folder or several.
        output_dir: of the new cohort.
        contrast: which scans are used, and how lesions look on them.
        sections: of the healthy scans, see `divide_people`; never the training's.
        given_mask: write the prepared brain mask beside the scan (``..._brain_mask.nii.gz``). Otherwise the chain has
            to find the brain, which belongs to what is measured.
        volume_ml: masks that are smaller or larger are left out.
        strength: see `plant_lesion`.
        seed: of everything.
        anatomies: of the healthy people, whose fluid gets no lesion; None: lesions may lie in fluid.
        repeats: how many scans get each mask. More make the figures more precise; the first of each is as with one.

    Returns:
        the cohort's folder.

    Raises:
        InputError: no masks, or none of the size; no scans, fewer than ``repeats``, or without their raw files; a
            person without anatomy.
    """
    healthy = divide_people(dataset_dir, contrast, sections, seed)
    fewest = min(len(scans) for scans in healthy.values())
    if not 1 <= repeats <= fewest:
        raise InputError(f"{dataset_dir}: each mask goes into 1 to {fewest} scans here, not {repeats}")
    if anatomies:
        for scan in (*healthy["tuning"], *healthy["test"]):
            anatomies.file_of(scan)  # before any lesion is planted
    strength = strength or LESION_LOOK[contrast].strength
    folders = [mask_dir] if isinstance(mask_dir, (str, Path)) else list(mask_dir)
    if len({Path(folder).name for folder in folders}) < len(folders):
        raise InputError(f"{folders[-1]}: mask folders of one name cannot be told apart; rename one")
    families = {Path(folder).name: read_masks(folder, volume_ml) for folder in folders}
    folder = Path(output_dir)
    claim_folder(folder)
    list_file = folder / f"planted_{contrast}.json"
    before = read_json(list_file, "list of planted lesions; remove it") if list_file.is_file() else {}
    planted: dict[str, dict[str, Any]] = {}
    for part, start in (("tuning", 0), ("test", 1)):
        dealt = [(family, mask) for family, masks in families.items() for mask in masks[start::2]]
        order = np.random.RandomState([seed, start]).permutation(len(dealt))
        deals = [(repeat, *deal) for repeat in range(repeats) for deal in enumerate(order)]
        for repeat, number, pick in tqdm(deals, desc=f"planting {part}", unit="lesion"):
            family, (lesion, _, mask, affine) = dealt[pick]
            scan = healthy[part][(number + repeat) % len(healthy[part])]
            seeds = [seed, start, number, *([repeat] if repeat else [])]
            rng = np.random.RandomState(seeds)
            mirrored = bool(rng.rand() < 0.5)
            base = f"{part}/{scan.get('subject', scan['name'])}__{f'{family}-' if len(families) > 1 else ''}{lesion}"
            files = {"image": f"{base}_{contrast}.nii.gz", "label": f"{base}_lesion.nii.gz"}
            if given_mask:
                files["brain_mask"] = f"{base}_brain_mask.nii.gz"
            facts = {
                "scan": scan.get("source", {}).get("image", ""),
                "mask": f"{family}/{lesion}",
                "mirrored": mirrored,
                "seed": seeds,
                "strength": list(strength),
                "fluid": [anatomies.file_of(scan), *anatomies.fluid] if anatomies else [],
                "files": files,
            }
            known = before.get(base, {})
            if {**known, **facts} == known and all((folder / file).is_file() for file in files.values()):
                planted[base] = known
                continue
            image, own_affine, brain, to_atlas = read_raw(scan)
            mirror = np.diag([-1.0 if mirrored else 1.0, 1, 1, 1])  # the atlas is symmetric about its midline
            soft = share_of_voxels(mask, mirror @ affine, image.shape, to_atlas)
            soft = anatomies.without_fluid(soft, scan, to_atlas) if anatomies else soft
            volume, inside, lesion_share = (torch.as_tensor(v, dtype=torch.float32)[None] for v in (image, brain, soft))
            changed, label = plant_lesion(volume, inside, lesion_share, contrast, strength, rng)
            if not label.any():  # too small for the scan's voxels, or outside its brain's tissue
                print(f"{base}: no voxel of {image.shape} is lesion by half; left out")
                continue
            header = nifti_header(scan["source"]["image"])
            write_volume(folder / files["image"], changed[0].numpy(), own_affine, header)
            write_volume(folder / files["label"], label[0].numpy().astype(np.uint8), own_affine, header)
            if given_mask:
                write_volume(folder / files["brain_mask"], brain.astype(np.uint8), own_affine, header)
            ml = float(label.sum()) * abs(np.linalg.det(own_affine[:3, :3])) / 1000
            planted[base] = {**facts, "ml": round(ml, 3)}
    for base in set(before) - set(planted):
        for file in before[base]["files"].values():
            (folder / file).unlink(missing_ok=True)
    write_json(list_file, planted)
    return folder

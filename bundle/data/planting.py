"""Lesions of real shape planted into healthy scans: a bench whose truth is known to the voxel.

It measures whether a change of brightness of this shape, size and place is found. Real lesions also pull, swell and
have edges of their own; what is reached here is no promise for patients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage, ResampleToMatch
from scipy import ndimage
from tqdm import tqdm

from bundle.errors import InputError

from .datalist import load_datalist, write_item
from .files import is_nifti, stem, write_json

# what a lesion's brightness tends to: a quantile of the brain's own intensities, and the range of factors on it.
# T1w: nearly as dark as fluid; T2w: nearly as bright as fluid; FLAIR: brighter than any healthy tissue.
LESION_LOOK = {"t1": (0.05, (0.5, 1.0)), "t2": (0.95, (0.8, 1.0)), "flair": (0.99, (1.0, 1.3))}


def plant_lesion(
    image: torch.Tensor,
    brain_mask: torch.Tensor,
    soft: torch.Tensor,
    contrast: str,
    strength: tuple[float, float],
    rng: np.random.RandomState,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend a lesion into a scan: ``image + strength * soft * (lesion's brightness - image)``, so that the tissue's
    texture shows through as much as the lesion is weak.

    Args:
        image, brain_mask: ``[1, X, Y, Z]``.
        soft: ``[1, X, Y, Z]``, how much of each voxel is lesion, in [0, 1].
        contrast: one of `LESION_LOOK`.
        strength: range that the strength is drawn from, in [0, 1].
        rng: draws strength and brightness.

    Returns:
        the scan with the lesion, and the lesion's mask (0 and 1; voxels of at least half lesion inside the brain).
    """
    inside = brain_mask > 0
    quantile, factors = LESION_LOOK[contrast]
    brightness = float(np.quantile(image[inside].numpy(), quantile)) * rng.uniform(*factors)
    soft = soft * inside
    return image + rng.uniform(*strength) * soft * (brightness - image), (soft >= 0.5).to(image.dtype)


def plant_masks(
    dataset_dir: str | Path,
    mask_dir: str | Path,
    output_dir: str | Path,
    contrast: str,
    section: str = "validation",
    volume_ml: tuple[float, float] = (0.3, 200.0),
    strength: tuple[float, float] = (0.25, 0.75),
    seed: int = 0,
) -> Path:
    """Deal lesion masks out to healthy scans of a prepared dataset, one per copy of a scan, and write the copies as
    the sections "tuning" and "test" of a new one: every second mask by size, so that both hold all sizes and choices
    made on the one can be measured on the other. A mask lies where it lies in atlas space, or mirrored.

    Args:
        dataset_dir: prepared dataset.
        mask_dir: NIfTI masks in atlas space.
        output_dir: of the new dataset.
        contrast: which scans are used, and how lesions look on them.
        section: of the healthy scans; never the training's.
        volume_ml: masks that have less or more in the brain are left out.
        strength: see `plant_lesion`.
        seed: of everything.

    Returns:
        the ``datalist.json`` written.

    Raises:
        InputError: no masks, or none of the size.
    """
    scans = load_datalist(dataset_dir, section, contrast, require=["brain_mask"])
    files = sorted(f for f in Path(mask_dir).glob("*") if is_nifti(f))
    if not files:
        raise InputError(f"{mask_dir}: no lesion masks (.nii, .nii.gz) here")
    rng, folder = np.random.RandomState(seed), Path(output_dir)
    load, resample = LoadImage(ensure_channel_first=True), ResampleToMatch(mode="bilinear", padding_mode="zeros")
    grid = load(scans[0]["brain_mask"])
    voxel_ml = float(np.abs(np.linalg.det(grid.affine[:3, :3]))) / 1000
    shapes: list[tuple[float, str, torch.Tensor]] = []
    for file in files:
        mask = (load(file) > 0).float()
        # averaged over coarser voxels, not picked
        voxels = (np.linalg.norm(m.affine[:3, :3], axis=0) for m in (grid, mask))
        width = np.maximum(np.divide(*voxels) - 1, 0) / 2
        smooth = MetaTensor(torch.as_tensor(ndimage.gaussian_filter(mask[0].numpy(), width))[None], affine=mask.affine)
        soft = torch.as_tensor(np.asarray(resample(smooth, img_dst=grid)))
        if volume_ml[0] <= float(soft.sum()) * voxel_ml <= volume_ml[1]:
            shapes.append((float(soft.sum()), stem(file), soft))
    if not shapes:
        raise InputError(f"{mask_dir}: no mask of {volume_ml[0]:g} to {volume_ml[1]:g} ml in the grid of {dataset_dir}")
    shapes.sort(key=lambda shape: shape[0])
    datalist: dict[str, list[dict[str, Any]]] = {"tuning": [], "test": []}
    for part, dealt in (("tuning", shapes[::2]), ("test", shapes[1::2])):
        order = rng.permutation(len(dealt))
        for number, pick in enumerate(tqdm(order, desc=f"planting {part}", unit="lesion")):
            scan, (_, lesion, soft) = scans[number % len(scans)], dealt[pick]
            volumes = {key: load(scan[key]) for key in ("image", "brain_mask")}
            image, brain = (v.as_tensor() for v in volumes.values())
            if rng.rand() < 0.5:
                soft = soft.flip(1)  # the grid is symmetric about the midline
            planted, label = plant_lesion(image, brain, soft, contrast, strength, rng)
            name = f"{scan['name']}_{lesion}"
            changed = {"image": planted, "brain_mask": brain, "label": label}
            item = write_item(folder, name, contrast, changed, volumes["image"].affine)
            datalist[part].append({**item, "person": scan.get("person", scan["name"])})
    write_json(folder / "datalist.json", datalist)
    return folder / "datalist.json"

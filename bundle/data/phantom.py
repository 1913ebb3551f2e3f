"""A small cohort of people who do not exist, from anatomy that does: for the demo and the tests, without a download.

Every subject is the MNI152 2009a anatomy (nilearn's wheel carries it), deformed, given its own contrast, shading,
blur and noise. Some get lesions of known shape. It shows that everything works; it measures nothing about patients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import (
    Compose,
    Rand3DElastic,
    RandAdjustContrast,
    RandBiasField,
    RandGaussianNoise,
    RandGaussianSmooth,
)
from scipy import ndimage
from tqdm import tqdm

from .atlas import grid_affine, load_atlas, mni152_2mm
from .datalist import write_item
from .files import write_json
from .planting import plant_lesion

# voxels around the grid from which a deformation may bring tissue in
_MARGIN = 8


def load_anatomy(affine: np.ndarray, spatial_size: Sequence[int]) -> torch.Tensor:
    """T1w, grey matter, white matter and brain mask of the atlas on a grid and a margin of 8 voxels around it:
    ``[4, X + 16, Y + 16, Z + 16]``, all in [0, 1].
    """
    from nilearn.datasets import load_mni152_gm_template, load_mni152_wm_template

    atlas = load_atlas()
    maps = [atlas.template, *map(mni152_2mm, (load_mni152_gm_template, load_mni152_wm_template)), atlas.brain_mask]
    affine = affine.copy()
    affine[:3, 3] -= affine[:3, :3].sum(1) * _MARGIN
    size = tuple(n + 2 * _MARGIN for n in spatial_size)
    resampled = [
        ndimage.affine_transform(m[0].numpy(), np.linalg.inv(m.affine.numpy()) @ affine, output_shape=size, order=1)
        for m in maps
    ]
    return torch.as_tensor(np.stack(resampled), dtype=torch.float32).clamp(0, 1)


def make_subject(anatomy: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One healthy subject.

    Args:
        anatomy: of `load_anatomy`.
        seed: who it is.

    Returns:
        T1w image (0 outside the brain) and brain mask, ``[1, X, Y, Z]`` each.
    """
    rng = np.random.RandomState(seed)
    # displacements of a few mm that change over a few cm, and the rest that an affine registration leaves
    deform = Rand3DElastic(
        sigma_range=(5, 7),
        magnitude_range=(60, 180),
        prob=1.0,
        rotate_range=[0.04] * 3,
        translate_range=[1.0] * 3,
        scale_range=[0.03] * 3,
        mode="bilinear",
        padding_mode="zeros",
    )
    deform.set_random_state(seed)
    core = (slice(_MARGIN, -_MARGIN),) * 3
    t1, grey, white, brain = torch.as_tensor(deform(anatomy))[:, *core].split(1)
    inside = brain > 0.5
    # tissues of their own brightness, then a curve through all of them
    image = (t1 + rng.normal(0, 0.04) * grey + rng.normal(0, 0.04) * white).clamp(0.02, 1.2)
    look = Compose(
        [
            RandAdjustContrast(prob=1.0, gamma=(0.85, 1.2)),
            RandBiasField(prob=1.0, degree=2, coeff_range=(-0.1, 0.1)),
            RandGaussianSmooth(sigma_x=(0.2, 0.6), sigma_y=(0.2, 0.6), sigma_z=(0.2, 0.6), prob=0.5),
            RandGaussianNoise(prob=1.0, std=0.02),
        ]
    )
    look.set_random_state(seed + 1)
    image = torch.as_tensor(look(image)).clamp(min=0.01)
    return torch.where(inside, image, 0.0), inside.float()


def plant_blob(
    image: torch.Tensor, brain_mask: torch.Tensor, radius_mm: float, spacing: float, rng: np.random.RandomState
) -> tuple[torch.Tensor, torch.Tensor]:
    """Darken an irregular blob inside the brain, as an old infarct looks on T1w: nearly as dark as fluid.

    Args:
        image, brain_mask: ``[1, X, Y, Z]``.
        radius_mm: about the lesion's radius.
        spacing: voxel size, mm.
        rng: chooses place, shape and strength.

    Returns:
        the image with the lesion, and the lesion's mask (0 and 1).
    """
    inside = brain_mask[0].numpy() > 0
    depth = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1, 1:-1] * spacing
    places = np.argwhere(depth > 0.8 * radius_mm)
    center = places[rng.randint(len(places))]
    distance = np.linalg.norm(np.moveaxis(np.indices(inside.shape), 0, -1) - center, axis=-1) * spacing
    bumps = ndimage.gaussian_filter(rng.standard_normal(inside.shape), 4 / spacing)
    edge = radius_mm * (1 + 0.3 * bumps / bumps.std()) - distance
    soft = torch.as_tensor(inside / (1 + np.exp(-edge / (0.5 * spacing))), dtype=torch.float32)[None]
    return plant_lesion(image, brain_mask, soft, "t1", (0.8, 0.95), rng)


def make_cohort(
    dataset_dir: str | Path,
    subjects: Mapping[str, int],
    spacing: float,
    spatial_size: Sequence[int],
    center: Sequence[float],
    radii_mm: tuple[float, float] = (8.0, 16.0),
    seed: int = 0,
) -> Path:
    """Write a prepared dataset of phantoms; those of the section "test" carry one to three lesions and a label.

    Args:
        dataset_dir: result.
        subjects: section -> number.
        spacing, spatial_size, center: of the grid, see `grid_affine`.
        radii_mm: smallest and largest radius of the lesions.
        seed: of everything.

    Returns:
        the ``datalist.json`` written.
    """
    folder = Path(dataset_dir)
    affine = grid_affine(spacing, spatial_size, center)
    anatomy = load_anatomy(affine, spatial_size)
    datalist: dict[str, list[dict[str, Any]]] = {section: [] for section in subjects}
    everyone = [section for section, number in subjects.items() for _ in range(number)]
    for number, section in enumerate(tqdm(everyone, desc="making subjects", unit="subject")):
        name = f"phantom{number:03d}"
        image, brain_mask = make_subject(anatomy, seed + 1000 * (number + 1))
        volumes = {"brain_mask": brain_mask}
        if section == "test":
            rng = np.random.RandomState(seed + number)
            label = torch.zeros_like(image)
            for _ in range(rng.randint(1, 4)):
                image, lesion = plant_blob(image, brain_mask, rng.uniform(*radii_mm), spacing, rng)
                label = torch.maximum(label, lesion)
            volumes["label"] = label
        datalist[section].append(write_item(folder, name, "t1", {"image": image, **volumes}, affine))
    write_json(folder / "datalist.json", datalist)
    return folder / "datalist.json"

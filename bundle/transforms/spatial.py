"""Geometry: from the scan's own space to the atlas grid, and back."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.networks.layers import GaussianFilter
from monai.transforms import InvertibleTransform, MapTransform, SpatialResample
from monai.utils import ensure_tuple_rep

from bundle.data.atlas import LPS, Atlas, atlas_overlap, grid_affine, load_atlas, to_sitk
from bundle.errors import InputError

# overlap of its brain with the atlas' above which a scan is taken to be aligned; registered ones reach 0.95
_ALREADY_ALIGNED = 0.9


class ResampleToGrid(SpatialResample):
    """Resample a volume once, from whatever voxels it has, to the atlas grid. Invertible.

    Where the grid is coarser than the scan, the scan is first smoothed to the grid's resolution (a Gaussian whose
    full width at half maximum makes up the difference), so that a 1 mm scan sampled at 2 mm looks like a 2 mm scan
    instead of carrying the noise of every eighth voxel.

    Args:
        spacing: mm.
        spatial_size: voxels of the grid.
        center: of the grid, atlas mm.
    """

    def __init__(self, spacing: float, spatial_size: Sequence[int], center: Sequence[float]) -> None:
        super().__init__(padding_mode="zeros", align_corners=True, dtype=np.float32)
        self.spacing = float(spacing)
        self.spatial_size = tuple(spatial_size)
        self.grid_affine = torch.as_tensor(grid_affine(spacing, spatial_size, center))

    def __call__(self, img: MetaTensor, mode: str = "bilinear") -> Any:
        """Args: img ``[C, X, Y, Z]``; mode "bilinear", or "nearest" for labels, which are never smoothed."""
        if mode == "bilinear":
            voxel = np.linalg.norm(np.asarray(img.affine)[:3, :3], axis=0)
            fwhm = np.sqrt(np.maximum(self.spacing**2 - voxel**2, 0)) / voxel
            if (fwhm > 0.1).any():
                img = img.clone()
                img.set_(GaussianFilter(3, (fwhm / 2.355).tolist())(img.as_tensor()[None].float())[0])
        return super().__call__(img, dst_affine=self.grid_affine, spatial_size=self.spatial_size, mode=mode)


class ResampleToGridd(MapTransform, InvertibleTransform):
    """Dictionary form of `ResampleToGrid`; ``mode`` may be one for all keys or one per key."""

    def __init__(
        self,
        keys: KeysCollection,
        spacing: float,
        spatial_size: Sequence[int],
        center: Sequence[float],
        mode: str | Sequence[str] = "bilinear",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.modes = ensure_tuple_rep(mode, len(self.keys))
        self.resample = ResampleToGrid(spacing, spatial_size, center)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key, mode in self.key_iterator(d, self.modes):
            d[key] = self.resample(d[key], mode)
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.resample.inverse(d[key])
        return d


def register_to_atlas(image: MetaTensor, brain_mask: MetaTensor, atlas: Atlas, seed: int = 0) -> np.ndarray:
    """Affine registration, brain to brain: Mattes mutual information in three resolutions, started from the masks.

    Args:
        image: scan ``[1, X, Y, Z]``, any contrast, RAS affine.
        brain_mask: its brain, on the same grid.
        atlas: template and brain mask.
        seed: of the metric's random sampling.

    Returns:
        4x4 matrix (RAS mm) from the scan's world to the atlas' world.

    Raises:
        InputError: ITK found no overlap or no optimum.
    """
    fixed, fixed_mask = to_sitk(atlas.template * atlas.brain_mask), to_sitk(atlas.brain_mask, np.uint8)
    moving, moving_mask = to_sitk(image * brain_mask), to_sitk(brain_mask, np.uint8)
    start = sitk.CenteredTransformInitializer(
        sitk.Cast(fixed_mask, sitk.sitkFloat32),
        sitk.Cast(moving_mask, sitk.sitkFloat32),
        sitk.AffineTransform(3),
        sitk.CenteredTransformInitializerFilter.MOMENTS,
    )
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    # brain and a rim around it: the outline of the brain is the strongest guide an affine transform has
    method.SetMetricFixedMask(sitk.BinaryDilate(fixed_mask, (3, 3, 3)))
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentagePerLevel([0.5, 0.3, 0.2], seed)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 150, relaxationFactor=0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([4, 2, 1])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(sitk.AffineTransform(start), inPlace=False)
    try:
        found = method.Execute(fixed, moving)
    except RuntimeError as error:
        raise InputError(f"alignment to the atlas failed: {str(error).strip().splitlines()[-1]}") from error
    found = sitk.AffineTransform(found.GetNthTransform(0) if isinstance(found, sitk.CompositeTransform) else found)
    atlas_to_scan = np.eye(4)
    matrix, c = np.array(found.GetMatrix()).reshape(3, 3), np.array(found.GetCenter())
    atlas_to_scan[:3, :3], atlas_to_scan[:3, 3] = matrix, np.array(found.GetTranslation()) + c - matrix @ c
    return np.linalg.inv(LPS @ atlas_to_scan @ LPS)


class AlignToAtlasd(MapTransform, InvertibleTransform):
    """Bring scans into the atlas' world by changing their affine; no voxel is touched, so nothing is lost.

    The registration is found once, from ``image_key`` and ``mask_key``, and given to every key. The inverse puts the
    scan's own affine back.

    Args:
        keys: volumes to move (``[1, X, Y, Z]``, one world).
        image_key: the scan to register.
        mask_key: its brain mask.
        method: "affine" (register), "none" (the scan is already in atlas space) or "auto": register unless the
            scan comes from a prepared dataset (its item says ``prepared``) or lies there already
            (`atlas_overlap` of at least 0.9).
    """

    def __init__(
        self,
        keys: KeysCollection,
        image_key: str = "image",
        mask_key: str = "brain_mask",
        method: str = "affine",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if method not in ("affine", "none", "auto"):
            raise InputError(f"alignment '{method}' is unknown: use 'affine', 'auto' or 'none'")
        self.image_key, self.mask_key, self.method = image_key, mask_key, method

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        scan_to_atlas = self._find(d)
        for key in self.key_iterator(d):
            image = d[key].clone()
            scan_affine = image.affine.clone()
            image.affine = torch.as_tensor(scan_to_atlas) @ scan_affine
            self.push_transform(image, extra_info={"scan_affine": scan_affine.tolist()})
            d[key] = image
        return d

    def _find(self, d: Mapping[Hashable, Any]) -> np.ndarray:
        """4x4 matrix from the scan's world to the atlas'."""
        if self.method == "none" or (self.method == "auto" and d.get("prepared")):
            return np.eye(4)
        atlas = load_atlas()
        if self.method == "auto" and atlas_overlap(d[self.mask_key], atlas) >= _ALREADY_ALIGNED:
            return np.eye(4)
        return register_to_atlas(d[self.image_key], d[self.mask_key], atlas)

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            info = self.pop_transform(d[key])["extra_info"]
            d[key].affine = torch.as_tensor(info["scan_affine"], dtype=torch.float64)
        return d

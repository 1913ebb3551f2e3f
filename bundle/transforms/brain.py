"""Where the brain is."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Hashable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import FillHoles, KeepLargestConnectedComponent, MapTransform, ResampleToMatch, SpatialCrop
from monai.transforms.utils import generate_spatial_bounding_box
from scipy import ndimage
from skimage.morphology import isotropic_closing

from bundle.data.volumes import write_volume
from bundle.errors import InputError, flag

# A stripped scan is mostly zeros, and what is left has the size of a brain. Zeros alone prove nothing: scanners blank
# the air around a whole head too.
_STRIPPED_BACKGROUND = 0.3
_LARGEST_BRAIN_ML = 2200.0
_SMALLEST_BRAIN_ML = 200.0
_MOST_LOST = 0.001  # of the brain, that may be filled
# what of a face of the volume a head's neck covers at least, and a brain at most that is whole (heads as scanned: 107,
# and 35 where a scan just ends at the brain); how much of what is not 0 is brain in a stripped scan that is cut off
_CUT_CM2, _STRIPPED_SHARE = 40.0, 0.8
_AIR_SHARE = 0.5  # of the brain's brightness, that air never has


def close_mask(mask: torch.Tensor, voxel_mm: np.ndarray, close_mm: float) -> torch.Tensor:
    """Morphological closing of ``[1, X, Y, Z]`` with a ball of radius ``close_mm``: an anatomical label map becomes
    a brain with its sulci.
    """
    pad = np.ceil(close_mm / voxel_mm).astype(int) + 1
    inside = np.pad(mask[0].cpu().numpy() > 0, [(p, p) for p in pad])
    closed = isotropic_closing(inside, close_mm, spacing=voxel_mm)[tuple(slice(p, -p) for p in pad)]
    return torch.as_tensor(closed, dtype=torch.float32)[None]


@lru_cache(maxsize=2)
def _deepbet(device: str) -> Any:
    """The two networks of deepbet (Fisch et al. 2024, doi:10.1016/j.compbiomed.2024.108845), from its wheel."""
    try:
        from deepbet import BrainExtraction
    except ImportError as error:
        raise InputError(f"no brain mask given and deepbet is missing ({error}): pip install deepbet") from error
    networks = BrainExtraction(no_gpu=True)
    networks.model.to(device)
    networks.bbox_model.to(device)
    return networks


def strip_with_deepbet(image: MetaTensor, device: str) -> np.ndarray:
    """Brain mask ``[X, Y, Z]`` of a whole head ``[1, X, Y, Z]`` (RAS, any contrast), by deepbet."""
    networks = _deepbet(device)
    share = networks.run_model(image.as_tensor()[0].cpu().float().numpy())
    return np.asarray(networks.postprocess(share > 0.5))


def strip_with_hd_bet(image: MetaTensor, device: str) -> np.ndarray:
    """The same by HD-BET 2 (Isensee et al. 2019, doi:10.1002/hbm.24750), which talks in files."""
    try:
        from HD_BET.checkpoint_download import maybe_download_parameters
        from HD_BET.hd_bet_prediction import get_hdbet_predictor, hdbet_predict
    except ImportError as error:
        raise InputError(f"skull_strip 'hd-bet' is not installed ({error}): pip install hd-bet") from error
    maybe_download_parameters()
    with tempfile.TemporaryDirectory() as folder:
        scan, brain = (str(Path(folder) / f"{n}.nii.gz") for n in ("scan", "brain"))
        write_volume(scan, image[0].numpy(), image.affine)
        predictor = get_hdbet_predictor(device=torch.device(device))
        hdbet_predict(scan, brain, predictor, keep_brain_mask=True, compute_brain_extracted_image=False)
        mask: Any = nib.load(brain.replace(".nii.gz", "_bet.nii.gz"))
        return np.asarray(mask.dataobj) > 0


STRIPPERS: dict[str, Callable[[MetaTensor, str], np.ndarray]] = {
    "deepbet": strip_with_deepbet,
    "hd-bet": strip_with_hd_bet,
}


class BrainMaskd(MapTransform):
    """Make sure that there is a brain mask: the one given with the scan, the scan's own outline if it is stripped
    already, or a computed one.

    Leaves in ``mask_key`` a float ``[1, X, Y, Z]`` of 0 and 1 on the scan's grid, and 0 where the scan is not finite
    outside the brain.

    Args:
        keys: the scan (one key), RAS.
        mask_key: where a given mask is found and the result is put. A given mask may be any label map (> 0 is brain)
            on any grid that shares the scan's world.
        close_mm: radius by which a given mask is closed; 0 takes it as it is. Label maps of tissue need some.
        method: what strips a whole head: "deepbet", "hd-bet", or "none" to refuse it.
        device: of the stripping network.

    Raises:
        InputError: an empty or inverted mask; a head that cannot be stripped; more than a thousandth of the brain not
            finite. Less is filled from the nearest voxels, and flagged.
    """

    def __init__(
        self,
        keys: str = "image",
        mask_key: str = "brain_mask",
        close_mm: float = 0.0,
        method: str = "deepbet",
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(keys)
        if method not in (*STRIPPERS, "none"):
            raise InputError(f"skull_strip '{method}' is unknown: use {', '.join(STRIPPERS)} or none")
        self.mask_key, self.close_mm = mask_key, float(close_mm)
        self.method, self.device = method, str(device)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        image = d[self.keys[0]]
        name = image.meta.get("filename_or_obj", "scan")
        finite = image.as_tensor().isfinite()
        if not finite.all():  # some programs write NaN around the brain
            image = MetaTensor(torch.where(finite, image.as_tensor(), 0.0)).copy_meta_from(image)
        if self.mask_key in d:
            mask = self._given(d[self.mask_key], image)
            file = d[self.mask_key].meta.get("filename_or_obj", name)
            problem = f"{file}: empty on the grid of {name}"
            _check_given(mask, image, file, 2 * _LARGEST_BRAIN_ML if d.get("prepared") else _LARGEST_BRAIN_ML)
        elif is_stripped(image):
            mask, problem = _outline(image), f"{name}: holds nothing"
            if largest_face_cm2(mask, image) > _CUT_CM2:
                mask = self._doubted(mask, image, name)
        else:
            mask, problem = self._computed(image, name), ""
            air, brain = (float(v.median()) for v in (_corners(image), image.as_tensor()[mask > 0]))
            if air > _AIR_SHARE * brain:
                d = flag(d, f"its air is {air / brain:.0%} as bright as its brain; was something added to its values?")
            face = largest_face_cm2(mask, image)
            if face > _CUT_CM2:
                d = flag(d, f"the scan ends within the brain ({face:.0f} cm2 of it lie on one side); places may be off")
        if not mask.any():
            raise InputError(f"{problem}; give its brain mask with --brain_mask FILE")
        lost = (mask > 0) & ~finite
        if lost.any():
            if lost.sum() > _MOST_LOST * (mask > 0).sum():
                raise InputError(f"{name}: {int(lost.sum())} brain voxels are not finite; repair the scan")
            filled = torch.where(lost, _nearest_of(image.as_tensor(), finite), image.as_tensor())
            image = MetaTensor(filled).copy_meta_from(image)
            d = flag(d, f"{int(lost.sum())} brain voxels were not finite; filled from their neighbours")
        d[self.keys[0]] = image
        # the mask moves with the scan from here on: same affine, same history
        d[self.mask_key] = MetaTensor(mask).copy_meta_from(image)
        return d

    def _given(self, mask: Any, image: MetaTensor) -> torch.Tensor:
        if mask.shape[1:] != image.shape[1:] or not torch.allclose(mask.affine, image.affine, atol=1e-3):
            mask = ResampleToMatch(mode="nearest", padding_mode="zeros")(mask, img_dst=image)
        inside = (mask.as_tensor() > 0).float()
        if self.close_mm:
            voxel = np.linalg.norm(np.asarray(image.affine, float)[:3, :3], axis=0)
            inside = torch.as_tensor(FillHoles()(close_mask(inside, voxel, self.close_mm)))
        return inside

    def _doubted(self, outline: torch.Tensor, image: MetaTensor, name: str) -> torch.Tensor:
        """What is brain where what is not 0 goes through a side of the volume: the outline of a stripped brain that is
        cut off or cropped close; of a small head on blanked air, whose neck does so, what is found in it.
        """
        try:
            found = self._computed(image, name)
        except InputError:
            return outline
        return outline if found.sum() > _STRIPPED_SHARE * outline.sum() else found

    def _computed(self, image: MetaTensor, name: str) -> torch.Tensor:
        if self.method == "none":
            raise InputError(
                f"{name}: not skull-stripped and no brain mask given; pass its mask with --brain_mask FILE"
            )
        try:
            mask = _without_padding(STRIPPERS[self.method], image, self.device)
        except InputError:
            raise
        except torch.cuda.OutOfMemoryError:
            warnings.warn(f"GPU memory exhausted: {self.method} goes on on the CPU, which takes longer")
            self.device = "cpu"
            return self._computed(image, name)
        except (AssertionError, IndexError, ValueError) as error:  # what the networks' own checks raise
            raise InputError(f"{name}: {self.method} found no brain in it; is it a scan of a head?") from error
        volume_ml = mask_volume_ml(mask, image)
        if not _SMALLEST_BRAIN_ML <= volume_ml <= _LARGEST_BRAIN_ML:
            raise InputError(
                f"{name}: no brain but {volume_ml:.0f} ml were found by {self.method}; is it a scan of a head?"
            )
        return torch.as_tensor(mask.astype(np.float32))[None]


def _without_padding(strip: Callable[[MetaTensor, str], np.ndarray], image: MetaTensor, device: str) -> np.ndarray:
    """``strip`` on the box of what is not 0, where that is a third of the volume or less: in wider paddings deepbet
    finds no brain.
    """
    start, end = generate_spatial_bounding_box(image, lambda values: values != 0)
    mask = np.zeros(image.shape[1:], bool)
    box = tuple(map(slice, start, end))
    if not 0 < 3 * mask[box].size <= mask.size:
        return strip(image, device)
    inner: Any = SpatialCrop(roi_start=start, roi_end=end)(image)
    mask[box] = strip(inner, device) > 0
    return mask


def _check_given(mask: torch.Tensor, image: MetaTensor, file: str, largest_ml: float) -> None:
    """Refuse a mask of the air around a head: more than any brain holds (on the atlas' grid up to twice as much),
    or most corners of the volume.
    """
    volume_ml, corners = mask_volume_ml(mask, image), mask[0, :: mask.shape[1] - 1, :: mask.shape[2] - 1]
    if volume_ml > largest_ml or corners[..., :: mask.shape[3] - 1].sum() > 4:
        raise InputError(
            f"{file}: marks {volume_ml:.0f} ml, and not as a brain lies; is it inverted, or of a whole head?"
        )


def _nearest_of(image: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Each voxel of ``[1, X, Y, Z]`` replaced by the nearest ``known`` one."""
    index = ndimage.distance_transform_edt(~known[0].numpy(), return_distances=False, return_indices=True)
    return torch.as_tensor(image[0].numpy()[tuple(index)])[None]


def _outline(image: MetaTensor) -> torch.Tensor:
    """What is not 0, in one piece and without holes."""
    largest: Any = KeepLargestConnectedComponent()((image.as_tensor() != 0).float())
    return torch.as_tensor(FillHoles()(largest)).float()


def _corners(image: MetaTensor) -> torch.Tensor:
    """Voxels at the eight corners of a scan, a tenth of each edge: air."""
    ends = [np.r_[: max(1, n // 10), n - max(1, n // 10) : n] for n in image.shape[1:]]
    return image.as_tensor()[0][np.ix_(*ends)].flatten()


def largest_face_cm2(mask: torch.Tensor, image: MetaTensor) -> float:
    """Area of a mask ``[1, X, Y, Z]`` on that side of the volume where it has the most, cm^2."""
    edges = np.asarray(image.affine, float)[:3, :3].T
    areas = []
    for axis in range(3):
        sides = (mask[0].select(axis, 0), mask[0].select(axis, mask.shape[axis + 1] - 1))
        one = np.linalg.norm(np.cross(*np.delete(edges, axis, 0))) / 100
        areas += [float((side > 0).sum()) * one for side in sides]
    return float(max(areas))


def is_stripped(image: MetaTensor) -> bool:
    """Whether a scan ``[1, X, Y, Z]`` is a brain on a background of zeros."""
    brain = image.as_tensor() != 0
    background = 1 - brain.float().mean().item()
    return background >= _STRIPPED_BACKGROUND and mask_volume_ml(brain, image) <= _LARGEST_BRAIN_ML


def mask_volume_ml(mask: Any, image: MetaTensor) -> float:
    """Volume of a mask on the grid of ``image``, ml."""
    return float(mask.sum()) * abs(float(np.linalg.det(np.asarray(image.affine, float)[:3, :3]))) / 1000

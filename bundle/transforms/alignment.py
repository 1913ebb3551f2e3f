"""Registration: where in the atlas' world a scan lies."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, cast

import numpy as np
import SimpleITK as sitk
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import InvertibleTransform, MapTransform, SpatialCrop, generate_spatial_bounding_box
from scipy.linalg import polar

from bundle.data.atlas import LPS, Atlas, atlas_overlap, load_atlas, to_sitk
from bundle.errors import InputError, flag

from .brain import mask_volume_ml

# overlap of its brain with the atlas' above which a scan is taken to be aligned; registered ones reach 0.955 and more
_ALREADY_ALIGNED = 0.95
# below the one, what lies there is no whole brain; below the other, somebody should look
_LEAST_OVERLAP, _USUAL_OVERLAP = 0.8, 0.92
# above it, the upright start has found the head: 12 heads (six of IXI, two patients in three contrasts) reach 0.953 and
# more, and when they were turned by half a turn, 36 times, it reached at most 0.901
_FITS_UPRIGHT = 0.93
_USUAL_BRAIN_ML = (800.0, 2100.0)  # those of 150 adults (IXI) have 920 to 1500, the atlas' 1970

# Heads lie tilted in the scanner. From a start that is 25 degrees off about any one axis, 30 degrees are found again.
# Where a header is wrong, they lie back to front or upside down: by half a turn about one axis.
_START_DEGREES = 25.0
_TILTS = [np.zeros(3), *(s * np.deg2rad(_START_DEGREES) * axis for axis in np.eye(3) for s in (-1.0, 1.0))]
_HALF_TURNS = [np.diag(signs) for signs in ((1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0))]
_STARTS = [*((np.eye(3), tilt) for tilt in _TILTS), *((turn, np.zeros(3)) for turn in _HALF_TURNS)]


def _shrunken(image: sitk.Image, voxel_mm: float) -> sitk.Image:
    """Average whole voxels until they are nearly ``voxel_mm``."""
    return sitk.BinShrink(image, [max(1, int(voxel_mm / s)) for s in image.GetSpacing()])


def _cropped(brain: MetaTensor, inside: torch.Tensor, margin_mm: float) -> tuple[MetaTensor, torch.Tensor]:
    """The box of the brain and ``margin_mm`` around it: what lies beyond is 0, and costs as much as the brain."""
    margin = torch.ceil(margin_mm / affine_to_spacing(brain.affine)).int().tolist()
    first, last = generate_spatial_bounding_box(inside, margin=margin, allow_smaller=True)
    crop = SpatialCrop(roi_start=first, roi_end=last)
    return cast(MetaTensor, crop(brain)), inside[:, *crop.slices]


def _turned(image: sitk.Image, turn: np.ndarray, center: np.ndarray) -> sitk.Image:
    """``image`` turned by ``turn`` about ``center``; its voxels stay as they are."""
    turned = sitk.Image(image)
    turned.SetDirection((turn @ np.reshape(image.GetDirection(), (3, 3))).ravel().tolist())
    turned.SetOrigin((center + turn @ (np.array(image.GetOrigin()) - center)).tolist())
    return turned


def _moved(volume: MetaTensor, scan_to_atlas: Any) -> MetaTensor:
    """A volume of the scan's world in the atlas': another affine, the same voxels."""
    return MetaTensor(volume.as_tensor(), affine=torch.as_tensor(scan_to_atlas) @ volume.affine)


def _centroid(mask: sitk.Image) -> np.ndarray:
    index = np.argwhere(sitk.GetArrayViewFromImage(mask) > 0).mean(0)[::-1]
    return np.array(mask.TransformContinuousIndexToPhysicalPoint(index.tolist()))


def _optimise(
    fixed: sitk.Image,
    fixed_mask: sitk.Image,
    moving: sitk.Image,
    transform: sitk.Transform,
    levels_mm: Sequence[float],
    shares: Sequence[float],
    iterations: int,
    seed: int,
) -> float:
    """Improve ``transform`` (atlas to scan) in place, from coarse to fine; returns the metric, lower is better.

    Raises:
        InputError: ITK found no overlap or no optimum.
    """
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricFixedMask(fixed_mask)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentagePerLevel(list(shares), seed + 1)  # SimpleITK takes 0 for the clock
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-2, iterations, relaxationFactor=0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([max(1, round(mm / fixed.GetSpacing()[0])) for mm in levels_mm])
    method.SetSmoothingSigmasPerLevel([mm / 2 for mm in levels_mm])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(transform, inPlace=True)
    try:
        method.Execute(fixed, moving)
    except RuntimeError as error:
        raise InputError(f"alignment to the atlas failed: {str(error).strip().splitlines()[-1]}") from error
    return method.GetMetricValue()


@contextmanager
def _one_itk_thread() -> Iterator[None]:
    """Several threads add up in an order of their own, and a scan would come out a little different each time."""
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def register_to_atlas(image: MetaTensor, brain_mask: MetaTensor, atlas: Atlas, seed: int = 0) -> np.ndarray:
    """Affine registration, brain to brain, by Mattes mutual information, which any contrast shares with the template.

    From the masks' centres, a similarity transform is fitted to coarse images and goes on as an affine one in three
    resolutions. If the brain does not lie on the atlas' then, nine other rotations are tried, and the one that fits the
    coarse images best goes on: a scan that lies far tilted, back to front or upside down is turned.

    Args:
        image: scan ``[1, X, Y, Z]``, any contrast, any affine.
        brain_mask: its brain, on the same grid.
        atlas: template and brain mask.
        seed: of the metric's random sampling.

    Returns:
        4x4 matrix (RAS mm) from the scan's world to the atlas' world.

    Raises:
        InputError: ITK found no overlap or no optimum.
    """
    fixed, fixed_mask = to_sitk(atlas.template * atlas.brain_mask), to_sitk(atlas.brain_mask, np.uint8)
    inside = brain_mask.as_tensor() > 0
    # formats keep a header to different digits, and the optimiser amplifies the last ones
    affine = image.affine.double().round(decimals=4)
    brain, inside = _cropped(MetaTensor(torch.where(inside, image.as_tensor(), 0.0), affine=affine), inside, 20.0)
    moving, moving_mask = to_sitk(brain), to_sitk(MetaTensor(inside.float(), affine=brain.affine), np.uint8)
    coarse, fine = _shrunken(moving, 4.0), _shrunken(moving, 2.0)
    center, middle = _centroid(fixed_mask), _centroid(moving_mask)
    # brain and a rim around it: the outline of the brain is the strongest guide an affine transform has
    rim = [max(1, round(9.0 / s)) for s in fixed.GetSpacing()]
    fixed_mask = sitk.BinaryDilate(fixed_mask, rim)

    def fit(turn: np.ndarray, tilt: np.ndarray) -> tuple[float, sitk.Similarity3DTransform, np.ndarray] | InputError:
        tilted = sitk.Euler3DTransform(center.tolist(), *tilt.tolist(), (middle - center).tolist())
        start = sitk.Similarity3DTransform()
        start.SetCenter(center.tolist())
        start.SetMatrix(tilted.GetMatrix())
        start.SetTranslation((middle - center).tolist())
        # the scan is turned, and not the transform: a versor of half a turn lies at the edge of what it can say
        scan = _turned(coarse, turn, middle)
        try:
            return _optimise(fixed, fixed_mask, scan, start, [8.0], [1.0], 40, seed), start, turn
        except InputError as error:  # one start may fall off the brain; all of them may not
            return error

    def refine(start: sitk.Similarity3DTransform, turn: np.ndarray) -> np.ndarray:
        found = sitk.AffineTransform(3)
        found.SetCenter(start.GetCenter())
        found.SetMatrix(start.GetMatrix())
        found.SetTranslation(start.GetTranslation())
        _optimise(fixed, fixed_mask, _turned(fine, turn, middle), found, [8.0, 4.0, 2.0], [0.5, 0.3, 0.1], 150, seed)
        atlas_to_scan, back = np.eye(4), np.eye(4)
        matrix, c = np.array(found.GetMatrix()).reshape(3, 3), np.array(found.GetCenter())
        atlas_to_scan[:3, :3], atlas_to_scan[:3, 3] = matrix, np.array(found.GetTranslation()) + c - matrix @ c
        back[:3, :3], back[:3, 3] = turn, middle - turn @ middle  # half a turn undoes itself
        return np.linalg.inv(LPS @ back @ atlas_to_scan @ LPS)

    with _one_itk_thread():
        upright = fit(*_STARTS[0])
        if not isinstance(upright, InputError):
            with suppress(InputError):
                found = refine(*upright[1:])
                if atlas_overlap(_moved(brain_mask, found), atlas) >= _FITS_UPRIGHT:
                    return found
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            tried = [upright, *pool.map(lambda start: fit(*start), _STARTS[1:])]
        fitted = [t for t in tried if not isinstance(t, InputError)]
        if not fitted:
            raise next(t for t in tried if isinstance(t, InputError))
        return refine(*min(fitted, key=lambda f: f[0])[1:])


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
            (`atlas_overlap` of at least 0.95).
        atlas: template file, see `load_atlas`.

    Flagged are a brain that overlaps the atlas' by less than 0.92 (Dice; registered heads reach 0.955) and, of those
    that are registered, one that had to be turned by more than a right angle or has less than 800 or more than 2100 ml.

    Raises:
        InputError: after a registration, the overlap is below 0.8: half a head, or something that is no head; a failed
            registration.
    """

    def __init__(
        self,
        keys: KeysCollection,
        image_key: str = "image",
        mask_key: str = "brain_mask",
        method: str = "affine",
        atlas: str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if method not in ("affine", "none", "auto"):
            raise InputError(f"alignment '{method}' is unknown: use 'affine', 'auto' or 'none'")
        if atlas:
            load_atlas(atlas)  # one that cannot be read is told before the work
        self.image_key, self.mask_key, self.method, self.atlas = image_key, mask_key, method, atlas

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        found = self._find(d)
        scan_to_atlas = np.eye(4) if found is None else found
        d = self._judge(d, scan_to_atlas, registered=found is not None)
        for key in self.key_iterator(d):
            image = d[key].clone()
            scan_affine = image.affine.clone()
            image.affine = torch.as_tensor(scan_to_atlas) @ scan_affine
            info = {"scan_affine": scan_affine.tolist(), "scan_to_atlas": np.asarray(scan_to_atlas).tolist()}
            self.push_transform(image, extra_info=info)
            d[key] = image
        return d

    def _find(self, d: Mapping[Hashable, Any]) -> np.ndarray | None:
        """4x4 matrix from the scan's world to the atlas', None where they are the same."""
        if self.method == "none" or (self.method == "auto" and d.get("prepared")):
            return None
        atlas = load_atlas(self.atlas)
        if self.method == "auto" and atlas_overlap(d[self.mask_key], atlas) >= _ALREADY_ALIGNED:
            return None
        return register_to_atlas(d[self.image_key], d[self.mask_key], atlas)

    def _judge(self, d: Mapping[Hashable, Any], scan_to_atlas: np.ndarray, registered: bool) -> dict[Hashable, Any]:
        """``d``, flagged, or refused, if its brain does not lie on the atlas as brains do. One that came in the atlas'
        space has its size, and is not refused: somebody else has seen to it.
        """
        mask = d[self.mask_key]
        volume_ml = mask_volume_ml(mask, mask)
        overlap = atlas_overlap(_moved(mask, scan_to_atlas), load_atlas(self.atlas))
        if registered and overlap < _LEAST_OVERLAP:
            name = d[self.image_key].meta.get("filename_or_obj", self.image_key)
            raise InputError(
                f"{name}: its brain overlaps the atlas' by {overlap:.2f} only (Dice; heads reach 0.95); is it a whole "
                "head, and does its header tell how it lies?"
            )
        judged = dict(d)
        if overlap < _USUAL_OVERLAP:
            judged = flag(judged, f"lies badly on the atlas (Dice {overlap:.2f})")
        if np.trace(polar(scan_to_atlas[:3, :3])[0]) < 1:  # 1 + 2 cos(angle)
            judged = flag(judged, "lies back to front or upside down by its header, and was turned; left may be right")
        if registered and not _USUAL_BRAIN_ML[0] <= volume_ml <= _USUAL_BRAIN_ML[1]:
            judged = flag(judged, f"its brain has {volume_ml:.0f} ml, adults' 900 to 1500; is its voxel size right?")
        return judged

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            info = self.pop_transform(d[key])["extra_info"]
            d[key].affine = torch.as_tensor(info["scan_affine"], dtype=torch.float64)
        return d

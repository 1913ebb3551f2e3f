"""Shading: what a coil adds to a scan is taken away, what a lesion adds is not."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from numpy.polynomial.legendre import legval

from bundle.data.atlas import from_sitk, to_sitk
from bundle.errors import InputError, flag

METHODS = ("tissue", "n4", "none")
# of the brain's mean: less is no signal, and a single voxel near 0 would stretch the range of logarithms
_LEAST_SIGNAL = 0.1
_DEGREE = 2  # of the polynomial: what coils around a head make; one degree more follows a large tumour
_CLASSES = 5  # of brightness
_NARROWEST = 0.08  # standard deviation of a class, of log brightness
# robust standard deviations above the median: what is brighter, once the field is known roughly, is lesion or fluid
_BRIGHTEST, _BRIGHTEST_EVEN = 2.0, 1.5
_OUTLIERS = 0.01  # density of what belongs to no class, times the range of log brightness
_LATTICE_MM = 6.0
_ROUNDS = 40
_WIDEST_FIELD = 3.0  # ratio of its brightest to its darkest part; birdcage and array coils stay below
# ANTs' defaults, and with them the paper's
_KNOTS_MM, _LEVELS, _N4_ROUNDS = 200.0, 4, 50


def _polynomials(shape: Sequence[int], step: int = 1) -> np.ndarray:
    """Products of Legendre polynomials up to `_DEGREE`, without the constant: ``[X, Y, Z, P]``."""
    axes = [np.linspace(-1, 1, n, dtype=np.float32)[::step] for n in shape]
    powers = [[legval(x, np.eye(_DEGREE + 1)[k]) for k in range(_DEGREE + 1)] for x in axes]
    terms = [
        powers[0][i][:, None, None] * powers[1][j][:, None] * powers[2][k]
        for i, j, k in np.ndindex((_DEGREE + 1,) * 3)
        if 0 < i + j + k <= _DEGREE
    ]
    return np.stack(terms, -1)


def tissue_field(image: np.ndarray, inside: np.ndarray, spacing: float) -> np.ndarray:
    """The smooth field that makes a scan's own tissues even: brightness of few classes times a polynomial of degree 2.

    Classes of log brightness (Gaussians, with their spreads) and field are estimated in turn by expectation
    maximisation, after Wells et al. 1996 (doi:10.1109/42.511747); what fits no class has no weight (Van Leemput et
    al. 2001, doi:10.1109/42.938237), nor has what is brighter than nearly all of the brain. A lesion is a class, or
    none, but it is no shading; and where tissues are even already, nothing changes.

    Args:
        image: ``[X, Y, Z]``, raw intensities.
        inside: ``[X, Y, Z]`` bool, the brain.
        spacing: of the (cubic) voxels, mm.

    Returns:
        the field ``[X, Y, Z]``, median 1 in the brain; all 1 where there is too little to fit it to.
    """
    values = image[inside]
    middle = np.median(values)
    reach = middle + _BRIGHTEST * 1.4826 * np.median(np.abs(values - middle))
    step = max(1, round(_LATTICE_MM / spacing))
    sparse = (slice(None, None, step),) * 3
    used = inside[sparse] & (image[sparse] > _LEAST_SIGNAL * values.mean()) & (image[sparse] <= reach)
    basis = _polynomials(image.shape, step)[used]
    if len(basis) < 20 * basis.shape[1]:
        return np.ones_like(image)
    log = np.log(image[sparse][used]).astype(np.float64)
    mean = np.quantile(log, np.linspace(0.06, 0.94, _CLASSES))
    variance = np.full(_CLASSES, ((mean[-1] - mean[0]) / _CLASSES) ** 2 + 0.01)
    share = np.full(_CLASSES, 1 / _CLASSES)
    nowhere = 10 * _OUTLIERS / max(float(np.ptp(log)), 1.0)
    even, dim = log, np.ones(len(log), bool)
    for number in range(_ROUNDS):
        if number and number % 10 == 0:
            level = np.exp(even)
            middle = np.median(level)
            dim = level <= middle + _BRIGHTEST_EVEN * 1.4826 * np.median(np.abs(level - middle))
        density = share * np.exp(-0.5 * (even[:, None] - mean) ** 2 / variance) / np.sqrt(2 * np.pi * variance)
        belongs = density / (density.sum(1, keepdims=True) + nowhere) * dim[:, None]
        total = belongs.sum(0) + 1e-9
        mean = (belongs * even[:, None]).sum(0) / total
        variance = np.maximum((belongs * (even[:, None] - mean) ** 2).sum(0) / total, _NARROWEST**2)
        share = total / total.sum()
        weight = (belongs / variance).sum(1)
        expected = (belongs * mean / variance).sum(1) / np.maximum(weight, 1e-9)
        normal = basis.T @ (basis * weight[:, None]) + 1e-4 * weight.sum() * np.eye(basis.shape[1])
        factors = np.linalg.solve(normal, basis.T @ (weight * (log - expected)))
        even = log - basis @ factors
    field = np.exp(_polynomials(image.shape) @ factors)
    return (field / np.median(field[inside])).astype(image.dtype)


def n4_field(image: MetaTensor, inside: torch.Tensor) -> np.ndarray:
    """The field of N4 (Tustison et al. 2010, doi:10.1109/TMI.2010.2046908; ITK's) with ANTs' defaults.

    Its knots end 25 mm apart, so that it follows large lesions and takes most of their brightness away: it is here for
    those who want the paper's chain.

    Args:
        image: ``[1, X, Y, Z]``, not negative.
        inside: ``[1, X, Y, Z]`` bool, the brain.

    Returns:
        ``[X, Y, Z]``.
    """
    scan, mask = to_sitk(image), to_sitk(MetaTensor(inside.float()).copy_meta_from(image), np.uint8)
    shrink = [max(1, int(4.0 / s + 0.5)) for s in scan.GetSpacing()]
    small, small_mask = sitk.Shrink(scan, shrink), sitk.Shrink(mask, shrink)
    least = _LEAST_SIGNAL * float(image.as_tensor()[inside].float().mean())
    small_mask = sitk.And(small_mask, sitk.Cast(small > least, sitk.sitkUInt8))
    correct = sitk.N4BiasFieldCorrectionImageFilter()
    correct.SetMaximumNumberOfIterations([_N4_ROUNDS] * _LEVELS)
    extent = np.multiply(small.GetSize(), small.GetSpacing())
    correct.SetNumberOfControlPoints([int(np.ceil(e / _KNOTS_MM)) + 3 for e in extent])
    correct.Execute(small, small_mask)
    return from_sitk(correct.GetLogBiasFieldAsImage(scan))[0].exp().numpy()


class CorrectBiasFieldd(MapTransform):
    """Divide out the shading of the coils, which make tissue brighter near them: a localiser takes it for a landmark,
    and a voxel-wise comparison with healthy people for a lesion.

    Args:
        keys: volumes ``[1, X, Y, Z]`` on a grid of cubic voxels.
        mask_key: brain mask on the same grid.
        method: "tissue" (`tissue_field`), "n4" (`n4_field`), or "none" to leave the scan as it is. Items of a
            prepared dataset (``prepared``) are left too.

    Flagged is a field that makes one part of the brain more than three times as bright as another.

    Raises:
        InputError: more than a twentieth of the brain is negative; N4 failed.
    """

    def __init__(self, keys: KeysCollection, mask_key: str = "brain_mask", method: str = "tissue") -> None:
        super().__init__(keys)
        if method not in METHODS:
            raise InputError(f"bias_field '{method}' is unknown: use {', '.join(METHODS)}")
        self.mask_key, self.method = mask_key, method

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if self.method == "none" or d.get("prepared"):
            return d
        inside = d[self.mask_key].as_tensor() > 0
        for key in self.key_iterator(d):
            image = d[key]
            values = image.as_tensor().cpu()[inside.cpu()]
            name = image.meta.get("filename_or_obj", key)
            if not values.numel():
                continue  # told by what comes next
            negative = float((values < 0).float().mean())
            if negative > 0.05:  # shading multiplies: without a true 0 it cannot be told; interpolation leaves a few
                raise InputError(
                    f"{name}: {negative:.0%} of the brain is negative, but the bias field needs raw intensities; "
                    "--bias_field none leaves it out"
                )
            positive = MetaTensor((image.as_tensor() * inside).clamp(min=0).cpu().float()).copy_meta_from(image)
            if self.method == "n4":
                try:
                    field = n4_field(positive, inside.cpu())
                except RuntimeError as error:
                    raise InputError(
                        f"{name}: bias-field correction failed; --bias_field none leaves it out"
                    ) from error
            else:
                spacing = float(np.linalg.norm(np.asarray(image.affine, float)[:3, 0]))
                field = tissue_field(positive[0].numpy(), inside[0].cpu().numpy(), spacing)
            low, high = np.percentile(field[inside[0].cpu().numpy()], [1, 99])
            if high > _WIDEST_FIELD * low:
                d = flag(
                    d, f"its brightness changes {high / low:.1f} times across the brain; no coil's field is that wide"
                )
            d[key] = MetaTensor(image.as_tensor() / torch.as_tensor(field).to(image.as_tensor())).copy_meta_from(image)
        return d

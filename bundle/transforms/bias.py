"""Shading: what a coil adds to a scan is taken away, what a lesion adds is not."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, ResampleToMatch
from numpy.polynomial.legendre import legval
from scipy.ndimage import gaussian_filter

from bundle.data.atlas import Atlas, from_sitk, load_atlas, to_sitk
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
_LATTICE_MM = 4.0
_LEAST_PLACES = 100  # of the lattice, for each term of the field
_ROUNDS = 40
_LAG_MM = 8.0  # between the places whose brightness is compared
_LARGEST_STEP = 0.18  # of log brightness over that lag: more is a border
_DIFFERENCE_ROUNDS = 14
_AROUND_MM = 6.0  # sigma of the neighbourhood that a lesion must fill to be left out of the fit
_UNUSUAL = 1.5  # robust standard deviations of such neighbourhoods
_WIDEST_FIELD = 3.0  # ratio of its brightest to its darkest part; birdcage and array coils stay below
# ANTs' defaults, and with them the paper's
_KNOTS_MM, _LEVELS, _N4_ROUNDS = 200.0, 4, 50


def _legendre(size: int, step: int = 1) -> np.ndarray:
    """Legendre polynomials up to `_DEGREE` at every ``step``-th of ``size`` voxels: ``[n, _DEGREE + 1]``."""
    x = np.linspace(-1, 1, size)[::step]
    return np.stack([legval(x, row) for row in np.eye(_DEGREE + 1)], -1)


# which products of Legendre polynomials along the three axes make the field; the constant is no shading
_TERMS = tuple(np.array([t for t in np.ndindex((_DEGREE + 1,) * 3) if 0 < sum(t) <= _DEGREE]).T)


def _polynomials(shape: Sequence[int], step: int) -> np.ndarray:
    """The field's terms on a lattice: ``[x, y, z, P]``."""
    x, y, z = (_legendre(n, step) for n in shape)
    i, j, k = _TERMS
    return x[:, None, None, i] * y[None, :, None, j] * z[None, None, :, k]


def _weighted_fit(columns: np.ndarray, values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Least squares, each column held to 0 by a ten thousandth of what the data say about it."""
    normal = columns.T @ (columns * weight[:, None])
    normal += np.diag(1e-4 * np.diag(normal) + 1e-9)
    return np.linalg.solve(normal, columns.T @ (weight * values))


def _median_and_deviation(values: np.ndarray) -> tuple[np.floating, np.floating]:
    """Median, and median absolute deviation from it; 1.4826 times that is a robust standard deviation."""
    middle = np.median(values)
    return middle, np.median(np.abs(values - middle))


def _biweight(residual: np.ndarray, reach: float) -> np.ndarray:
    """Tukey's weights: 1 at 0, none from ``reach`` on."""
    return np.maximum(1 - (residual / reach) ** 2, 0) ** 2


def difference_fit(log: np.ndarray, usable: np.ndarray, basis: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Factors of the field by how brightness changes from each place to the next.

    A field changes little over 8 mm, and everywhere; a lesion changes much, at its border, and not within. So the
    differences are fitted by the field's and by those of the atlas (whose tissues are as bright as the fit wants),
    and what is far off both has no weight (Tukey's biweight, its reach drawn in over the first rounds).

    Args:
        log: of brightness, on a lattice of 4 mm, ``[x, y, z]``.
        usable: where ``log`` counts.
        basis: the field's terms, ``[x, y, z, P]``.
        expected: the atlas there, ``[x, y, z, K]``.

    Returns:
        ``[P]``.
    """
    terms, lag = np.concatenate([basis, expected], -1), round(_LAG_MM / _LATTICE_MM)
    columns, values = [], []
    for axis in range(3):
        here, there = ((slice(None),) * axis + (s,) for s in (slice(None, -lag), slice(lag, None)))
        both = usable[here] & usable[there]
        columns.append((terms[there] - terms[here])[both])
        values.append((log[there] - log[here])[both])
    column, value = np.concatenate(columns), np.concatenate(values)
    found = np.zeros(column.shape[1])
    for number in range(_DIFFERENCE_ROUNDS):
        reach = _LARGEST_STEP * max(1.0, 3 - number / 2)
        found = _weighted_fit(column, value, _biweight(value - column @ found, reach))
    return found[: basis.shape[-1]]


def neighbourhood_deviation(residual: np.ndarray, usable: np.ndarray, sigma: float) -> np.ndarray:
    """How many robust standard deviations the mean of each neighbourhood lies above the median one: single voxels of a
    faint lesion may look healthy, what surrounds them does not.

    Args:
        residual: what is not as expected, ``[x, y, z]``; 0 where it is not ``usable``.
        usable: ``[x, y, z]`` bool.
        sigma: of the neighbourhood, a Gaussian, in voxels.

    Returns:
        ``[x, y, z]``; of no meaning where it is not ``usable``.
    """
    share = gaussian_filter(usable.astype(float), sigma)
    around = gaussian_filter(residual, sigma) / np.maximum(share, 1e-3)
    middle, deviation = _median_and_deviation(around[usable])
    return (around - middle) / (1.4826 * deviation + 1e-6)


def usual_places(even: np.ndarray, usable: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Where a scan is as bright as the rest of it lets expect, over 6 mm: a large lesion is not.

    Args:
        even: log of brightness without shading, on a lattice of 4 mm, ``[x, y, z]``.
        usable, expected: see `difference_fit`.

    Returns:
        ``[x, y, z]`` bool, within ``usable``.
    """
    columns = np.concatenate([expected, np.ones_like(expected[..., :1])], -1)[usable]
    values, weight = even[usable], np.ones(int(usable.sum()))
    for _ in range(10):
        residual = values - columns @ _weighted_fit(columns, values, weight)
        spread = 1.4826 * np.median(np.abs(residual)) + 1e-6
        weight = _biweight(residual, 3 * spread)
    unexpected = np.zeros_like(even)
    unexpected[usable] = residual.clip(-4 * spread, 4 * spread)
    return usable & (np.abs(neighbourhood_deviation(unexpected, usable, _AROUND_MM / _LATTICE_MM)) <= _UNUSUAL)


def class_fit(log: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Factors of the field that makes classes of brightness even.

    Classes (Gaussians of log brightness, with their spreads) and field are estimated in turn by expectation
    maximisation, after Wells et al. 1996 (doi:10.1109/42.511747); what fits no class has no weight (Van Leemput et
    al. 2001, doi:10.1109/42.938237), nor has what is brighter than nearly all of the brain.

    Args:
        log: of brightness, ``[N]``.
        basis: the field's terms there, ``[N, P]``.

    Returns:
        ``[P]``.
    """
    mean = np.quantile(log, np.linspace(0.06, 0.94, _CLASSES))
    variance = np.full(_CLASSES, ((mean[-1] - mean[0]) / _CLASSES) ** 2 + 0.01)
    share = np.full(_CLASSES, 1 / _CLASSES)
    nowhere = 10 * _OUTLIERS / max(float(np.ptp(log)), 1.0)
    even, dim, factors = log, np.ones(len(log), bool), np.zeros(basis.shape[1])
    for number in range(_ROUNDS):
        if number and number % 10 == 0:
            level = np.exp(even)
            middle, deviation = _median_and_deviation(level)
            dim = level <= middle + _BRIGHTEST_EVEN * 1.4826 * deviation
        density = share * np.exp(-0.5 * (even[:, None] - mean) ** 2 / variance) / np.sqrt(2 * np.pi * variance)
        belongs = density / (density.sum(1, keepdims=True) + nowhere) * dim[:, None]
        total = belongs.sum(0) + 1e-9
        mean = (belongs * even[:, None]).sum(0) / total
        variance = np.maximum((belongs * (even[:, None] - mean) ** 2).sum(0) / total, _NARROWEST**2)
        share = total / total.sum()
        weight = (belongs / variance).sum(1)
        expected = (belongs * mean / variance).sum(1) / np.maximum(weight, 1e-9)
        factors = _weighted_fit(basis, log - expected, weight)
        even = log - basis @ factors
    return factors


def atlas_terms(image: MetaTensor, atlas: Atlas) -> np.ndarray:
    """Brightness of the atlas' brain (0 to 1) and its square on the grid of ``image``, 0 outside: ``[X, Y, Z, 2]``; any
    contrast's tissues are nearly a sum of the two.
    """
    brain: Any = atlas.template * atlas.brain_mask
    resample: Any = ResampleToMatch(mode="bilinear", padding_mode="zeros")
    there = resample(brain / brain.max(), img_dst=image)[0].numpy()
    return np.stack([there, there**2], -1)


def tissue_field(image: np.ndarray, inside: np.ndarray, spacing: float, expected: np.ndarray) -> np.ndarray:
    """The smooth field, a polynomial of degree 2, that makes a scan's own tissues even and leaves lesions alone.

    First roughly, by differences between neighbours, which a lesion of any size hardly moves (`difference_fit`). In the
    scan that is even then, places that are unusual for the atlas are left out (`usual_places`), and the classes of
    brightness of the rest decide (`class_fit`): they follow no difference between this scan's anatomy and the atlas'.

    Args:
        image: ``[X, Y, Z]``, raw intensities.
        inside: ``[X, Y, Z]`` bool, the brain.
        spacing: of the (cubic) voxels, mm.
        expected: `atlas_terms` there.

    Returns:
        the field ``[X, Y, Z]``, median 1 in the brain; all 1 where there is too little to fit it to.
    """
    step = max(1, round(_LATTICE_MM / spacing))
    sparse = (slice(None, None, step),) * 3
    values, lattice = image[inside], image[sparse]
    usable = inside[sparse] & (lattice > _LEAST_SIGNAL * values.mean())
    basis = _polynomials(image.shape, step)
    if usable.sum() < _LEAST_PLACES * basis.shape[-1]:
        return np.ones_like(image)
    log = np.log(np.where(usable, lattice, 1), dtype=np.float64)
    atlas = expected[sparse].astype(np.float64)
    rough = difference_fit(log, usable, basis, atlas)
    middle, deviation = _median_and_deviation(values)
    reach = middle + _BRIGHTEST * 1.4826 * deviation
    usual = usual_places(log - basis @ rough, usable, atlas) & (lattice <= reach)
    if usual.sum() < _LEAST_PLACES * basis.shape[-1]:
        usual = usable
    cube = np.zeros((_DEGREE + 1,) * 3)
    cube[_TERMS] = class_fit(log[usual], basis[usual])
    field = np.exp(np.einsum("ijk,xi,yj,zk->xyz", cube, *(_legendre(n) for n in image.shape), optimize=True))
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
        atlas: see `load_atlas`; scans lie on it.

    Flagged is a field that makes one part of the brain more than three times as bright as another.

    Raises:
        InputError: more than a twentieth of the brain is negative; N4 failed.
    """

    def __init__(
        self, keys: KeysCollection, mask_key: str = "brain_mask", method: str = "tissue", atlas: str | None = None
    ) -> None:
        super().__init__(keys)
        if method not in METHODS:
            raise InputError(f"bias_field '{method}' is unknown: use {', '.join(METHODS)}")
        self.mask_key, self.method, self.atlas = mask_key, method, atlas

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
                expected = atlas_terms(positive, load_atlas(self.atlas))
                field = tissue_field(positive[0].numpy(), inside[0].cpu().numpy(), spacing, expected)
            low, high = np.percentile(field[inside[0].cpu().numpy()], [1, 99])
            if high > _WIDEST_FIELD * low:
                d = flag(
                    d, f"its brightness changes {high / low:.1f} times across the brain; no coil's field is that wide"
                )
            d[key] = MetaTensor(image.as_tensor() / torch.as_tensor(field).to(image.as_tensor())).copy_meta_from(image)
        return d

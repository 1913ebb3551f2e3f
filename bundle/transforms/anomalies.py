"""Made-up anomalies in healthy volumes, for a network that learns to mark what does not belong there.

The idea is that of foreign patches (Tan et al. 2020, arXiv 2011.04197) and of DRAEM (Zavrtanik et al. 2021,
arXiv 2108.07610). Shapes and brightness are drawn by other rules than those of the test benches
(`bundle.data.planting`), and no lesion mask is used here.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable
from monai.utils import convert_to_dst_type
from scipy import ndimage
from scipy.special import expit

from .intensity import LOWEST_BRAIN_INTENSITY
from .normative import ALL, LESION_SIGN, load_normative

_BORDER = 2  # voxels around a shape for its soft border
_FINEST = 0.7  # voxels, finest scale of the noise that clusters are made of
# how bright tissue is: what lies beyond is fluid
_TISSUE = {"t1": (0.35, math.inf), "t2": (0.0, 0.8), "flair": (0.35, math.inf)}
_LEAST_SPREAD = 0.03  # no place is drawn more often than those of this healthy spread


def fluid_in(image: np.ndarray, contrast: str) -> np.ndarray:
    """What is as bright as fluid in a normalised volume (bool); 0 is outside the brain."""
    darkest, brightest = _TISSUE[contrast]
    return (image > 0) & ((image < darkest) | (image > brightest))


def _log_uniform(rng: np.random.RandomState, low: float, high: float, smallness: float = 1.0) -> float:
    lowest, highest = np.log(low), np.log(max(low, high))
    return float(np.exp(lowest + (highest - lowest) * rng.random_sample() ** smallness))


def _direction(rng: np.random.RandomState) -> np.ndarray:
    vector = rng.normal(size=3)
    return vector / max(float(np.linalg.norm(vector)), 1e-6)


def random_shape(diameter: float, rng: np.random.RandomState) -> np.ndarray:
    """A smooth shape of random form: balls along a random walk that melt into each other, flattened in a random
    direction, with a wavy and more or less soft border.

    Args:
        diameter: of the shape at its longest, voxels.
        rng: draws all of it.

    Returns:
        share of each voxel that is the shape's, ``[n, n, n]`` in [0, 1], the shape around the middle; n is odd.
    """
    centres, radii = [np.zeros(3)], [1.0]
    for _ in range(rng.randint(0, 5)):
        centres.append(centres[-1] + _direction(rng) * radii[-1] * rng.uniform(0.5, 1.1))
        radii.append(rng.uniform(0.4, 1.0))
    balls, radius = np.array(centres), np.array(radii)
    balls = balls - (balls * radius[:, None]).sum(0) / radius.sum()
    shrink = diameter / 2 / (np.linalg.norm(balls, axis=1) + radius).max()
    balls, radius = balls * shrink, radius * shrink
    half = int(np.ceil(diameter / 2)) + _BORDER
    axis = np.arange(-half, half + 1, dtype=np.float32)
    grid = [g - rng.uniform(-0.5, 0.5) for g in np.meshgrid(axis, axis, axis, indexing="ij", sparse=True)]
    # a stretch of the space along one direction flattens the shape there
    normal, stretch = _direction(rng), rng.uniform(0, 1.5)
    along = sum(n * g for n, g in zip(normal, grid))
    depth = 0.0  # about the distance to the border, in radii: above 0 inside
    for centre, r in zip(balls, radius):
        squares = sum((g - c) ** 2 for g, c in zip(grid, centre))
        squares = squares + (stretch**2 + 2 * stretch) * (along - normal @ centre) ** 2
        depth = depth + np.exp(4 * (1 - np.sqrt(squares) / r))
    depth = np.log(depth) / 4
    cells = max(2, round(diameter / _log_uniform(rng, 2.0, 8.0)))
    waves = ndimage.zoom(rng.normal(size=(cells,) * 3), depth.shape[0] / cells, order=1, grid_mode=True, mode="nearest")
    depth = depth + rng.uniform(0, 0.35) * waves
    softness = _log_uniform(rng, 0.15, max(0.4, diameter / 8))
    mean_radius = float(radius.mean())
    return expit(depth * mean_radius / softness)


def random_cluster(diameter: float, rng: np.random.RandomState) -> np.ndarray:
    """Spots of many sizes and irregular form that lie together: where smooth noise is highest, within an ellipsoid.
    (DRAEM, Zavrtanik et al. 2021, thresholds noise for its shapes, too.) How much of it is spots was set so that their
    sizes and surfaces are about those of the benches' tuning masks of multiple sclerosis.

    Args:
        diameter: of the ellipsoid at its longest, voxels.
        rng: draws all of it.

    Returns:
        share of each voxel that is a spot's, ``[n, n, n]`` in [0, 1], the ellipsoid around the middle; n is odd.
    """
    half = int(np.ceil(diameter / 2)) + _BORDER
    axis = np.arange(-half, half + 1, dtype=np.float32)
    grid = np.meshgrid(axis, axis, axis, indexing="ij", sparse=True)
    axes = np.exp(rng.uniform(-0.4, 0.0, 3))
    radius2 = sum((2 * g / (diameter * a)) ** 2 for g, a in zip(grid, axes))
    # the coarser scales weigh more or less than the finer ones, all stretched alike
    roughness, stretch = rng.uniform(-0.5, 1.5), np.exp(rng.uniform(-0.5, 0.5, 3))
    height, scale = np.zeros(radius2.shape), _FINEST
    while scale <= max(_FINEST, diameter / 5):
        noise = ndimage.gaussian_filter(rng.normal(size=height.shape), scale * stretch, mode="wrap", truncate=3.0)
        height += noise / noise.std() * scale**roughness
        scale *= 2
    height = height / height.std() - rng.uniform(0, 4) * radius2
    within = radius2 <= 1
    share = max(_log_uniform(rng, 0.005, 0.2), 2 / within.sum())
    above = height - np.quantile(height[within], 1 - share)
    return np.where(within, expit(above / _log_uniform(rng, 0.05, 0.3)), 0.0)


class Anomaliesd(MapTransform):
    """Put made-up anomalies into a healthy volume, the same ones into the same person's scan each time, and mark them.

    They are brighter or darker than what was there: mostly to the side to which lesions are in this contrast, by some
    healthy spreads of their place or by an absolute amount. The texture is the tissue's own, that of even matter, or
    that of another place of the same brain.

    Args:
        keys: normalised volume ``[1, H, W, D]``, 0 outside the brain (one key).
        contrast: "t1", "t2" or "flair"; tells the side.
        normative: JSON file of the normative map; read when the first volume comes.
        label_key: where the mask ``[1, H, W, D]`` (0 and 1) goes: voxels that are anomaly at least by half and are
            changed by at least ``least`` healthy spreads, since what nobody can see is not to be learned.
        number: fewest and most anomalies.
        diameter: smallest and largest, voxels.
        smallness: 1 draws sizes log-uniformly; with more, more are small: of the way from the smallest to the largest
            logarithm, ``u ** smallness`` is gone, u uniform in [0, 1].
        clusters: share of the anomalies that are a cluster of spots (`random_cluster`) of a quarter of the largest
            diameter to all of it.
        in_tissue: they change nothing that is as bright as fluid in this contrast, where lesions do not lie.
        alike: centres are drawn more often where healthy people are alike, in proportion to the healthy spread to the
            power of minus this; 0: anywhere.
        spreads, amount: least and largest change, in healthy spreads and in intensities; either is drawn.
        likely_side: share of the anomalies that are changed to the lesions' side.
        least: see ``label_key``.
        seed: of the draws, beside the name of the file.
        held: the network sees intensities held to a range (`with_normative`): a change beyond it cannot be seen.
    """

    def __init__(
        self,
        keys: KeysCollection,
        contrast: str,
        normative: str,
        label_key: str = "label",
        number: tuple[int, int] = (2, 9),
        diameter: tuple[float, float] = (1.0, 30.0),
        smallness: float = 1.0,
        clusters: float = 0.0,
        in_tissue: bool = False,
        alike: float = 0.0,
        spreads: tuple[float, float] = (1.5, 8.0),
        amount: tuple[float, float] = (0.12, 0.8),
        likely_side: float = 0.85,
        least: float = 1.0,
        seed: int = 0,
        held: bool = False,
    ) -> None:
        super().__init__(keys)
        self.contrast, self.sign, self.in_tissue = contrast, LESION_SIGN[contrast], in_tissue
        self.normative, self.label_key = normative, label_key
        self.number, self.diameter, self.smallness, self.alike = number, diameter, smallness, alike
        self.clusters = clusters
        self.spreads, self.amount, self.likely_side = spreads, amount, likely_side
        self.least, self.seed, self.held = least, seed, held

    def generator(self, data: Mapping[Hashable, Any]) -> np.random.RandomState:
        """What the anomalies of this volume are drawn from."""
        return np.random.RandomState([self.seed, zlib.crc32(str(data.get("name", "")).encode())])

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d, rng = dict(data), self.generator(data)
        given = d[self.keys[0]]
        image = np.array(torch.as_tensor(given)[0].cpu(), np.float32)
        healthy = image.copy()
        normative = load_normative(self.normative)
        spread, seen_range = normative.on(image.shape)[1][0].numpy(), normative.telling if self.held else ALL
        label = np.zeros(image.shape, bool)
        tissue = (image > 0) & ~(self.in_tissue & fluid_in(image, self.contrast))
        places = np.flatnonzero(tissue)
        likely = np.cumsum(np.maximum(spread.ravel()[places], _LEAST_SPREAD) ** -self.alike)
        for _ in range(rng.randint(self.number[0], self.number[1] + 1) if len(places) else 0):
            shape = self._shape(rng)
            place = places[np.searchsorted(likely, rng.rand() * likely[-1])]
            centre = np.array(np.unravel_index(place, image.shape))
            first = centre - len(shape) // 2
            low, high = np.maximum(first, 0), np.minimum(first + len(shape), image.shape)
            box = tuple(slice(a, b) for a, b in zip(low, high))
            soft = shape[tuple(slice(a, b) for a, b in zip(low - first, high - first))] * tissue[box]
            if soft.max() < 0.5:
                continue
            there = np.clip(
                self._target(healthy, image[box], soft, spread[box], low, rng), LOWEST_BRAIN_INTENSITY, None
            )
            image[box] += (soft * (there - image[box])).astype(np.float32)
            change = np.abs(image[box].clip(*seen_range) - healthy[box].clip(*seen_range))
            # of foreign texture, some voxels happen to be as they were
            seen = np.maximum(change, ndimage.uniform_filter(change, 3)) > self.least * spread[box]
            label[box] |= (soft >= 0.5) & seen
        for key, values in ((self.keys[0], image), (self.label_key, label.astype(np.float32))):
            d[key] = convert_to_dst_type(values[None], given, dtype=torch.float32)[0]
        return d

    def _shape(self, rng: np.random.RandomState) -> np.ndarray:
        least, most = self.diameter
        if self.clusters and rng.rand() < self.clusters:
            return random_cluster(_log_uniform(rng, max(least, most / 4), most), rng)
        return random_shape(_log_uniform(rng, least, most, self.smallness), rng)

    def _target(
        self,
        healthy: np.ndarray,
        image: np.ndarray,
        soft: np.ndarray,
        spread: np.ndarray,
        low: np.ndarray,
        rng: np.random.RandomState,
    ) -> np.ndarray:
        """What the anomaly looks like, in a box of the volume that starts at ``low``."""
        weight = soft / soft.sum()
        side = self.sign if rng.rand() < self.likely_side else -self.sign
        in_spreads = _log_uniform(rng, *self.spreads) * float((spread * weight).sum())
        change = side * (in_spreads if rng.rand() < 0.5 else _log_uniform(rng, *self.amount))
        texture = rng.rand()
        if texture < 0.4:
            return image + change
        if texture < 0.9:
            level = float((image * weight).sum()) + change
            grain = ndimage.gaussian_filter(rng.normal(size=image.shape), rng.uniform(0.3, 1.5))
            grain *= rng.uniform(0, 0.1) / max(float(grain.std()), 1e-6)
            return level + grain + rng.choice([0.0, rng.rand()]) * (image - level + change)
        start = [rng.randint(0, whole - part + 1) for whole, part in zip(healthy.shape, image.shape)]
        foreign = healthy[tuple(slice(a, a + n) for a, n in zip(start, image.shape))]
        foreign = np.flip(foreign, tuple(axis for axis in range(3) if rng.rand() < 0.5))
        return np.where(foreign > 0, foreign + rng.choice([0.0, 0.5]) * change, image + change)


class RandAnomaliesd(Anomaliesd, Randomizable):
    """Other anomalies each time, from the transform's own random state instead of ``seed`` and name."""

    def generator(self, data: Mapping[Hashable, Any]) -> np.random.RandomState:
        return self.R

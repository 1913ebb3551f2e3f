"""Anatomy: from a label map to how much of each tissue every voxel holds."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage

from bundle.errors import InputError

TISSUES = ("csf", "grey", "deep_grey", "white")

# label schemes: labels of each tissue. The brainstem counts as white matter, amygdala and hippocampus as grey.
SCHEMES: dict[str, dict[str, set[int]]] = {
    # DLMUSE, as the MUSE atlas numbers it (NiChart)
    "dlmuse": {
        "csf": {1, 4, 11, 46, 49, 50, 51, 52},
        "deep_grey": {23, 30, 36, 37, 55, 56, 57, 58, 59, 60, 75, 76},
        "white": {35, 40, 41, 61, 62, 69, *range(81, 96)},
        "grey": {31, 32, 38, 39, 47, 48, 71, 72, 73, *range(100, 208)},
    },
    # FreeSurfer, as SynthSeg uses it; 500 and above are outside the brain there
    "freesurfer": {
        "csf": {4, 5, 14, 15, 24, 43, 44, 72},
        "deep_grey": {10, 11, 12, 13, 26, 49, 50, 51, 52, 58},
        "white": {2, 7, 16, 28, 30, 41, 46, 60, 62, 77, 85, *range(251, 256)},
        "grey": {3, 8, 17, 18, 42, 47, 53, 54},
    },
}

# Parts of the brain that FLAIR scans show brighter or darker than the rest of their tissue, put together by how much
# (scripts/region_brightness.py). To the ventral striatum goes the subcallosal cortex above it, to the thalamus the
# anterior limb of the internal capsule. "limbic" are hippocampus, insula, anterior cingulate, frontal pole and the
# medial frontal gyri; "primary" are visual, auditory and somatosensory cortex, and the upper vermis. FreeSurfer's
# scheme has one label for all cortex, so its scans have neither bright nor dark cortex.
REGIONS: dict[str, dict[str, set[int]]] = {
    "dlmuse": {
        "ventral_striatum": {23, 30, 186, 187},
        "amygdala": {31, 32},
        "limbic": {47, 48, *range(100, 104), 120, 121, 124, 125, 146, 147, 152, 153, 172, 173, 192, 193},
        "caudate": {36, 37},
        "pallidum": {55, 56},
        "thalamus": {59, 60, 91, 92},
        "primary": {71, 108, 109, 114, 115, 134, 135, 160, 161, 176, 177, 206, 207},
    },
    "freesurfer": {
        "ventral_striatum": {26, 58},
        "amygdala": {18, 54},
        "limbic": {17, 53},
        "caudate": {11, 50},
        "pallidum": {13, 52},
        "thalamus": {10, 49},
        "primary": set(),
    },
}
REGION_NAMES = tuple(REGIONS["dlmuse"])


class TissueFractionsd(MapTransform):
    """Shares of `TISSUES` in every voxel, ``tissue`` ``[4, X, Y, Z]``, that sum to 1 in the brain and are 0 outside.

    A label map on a coarse grid has steps where the brain has none. So the labels, smoothed, are only what is expected
    before the scan is looked at; where a T1w scan of the same head is there, its brightness decides between the
    tissues that are near (Bayes' rule, with a Gaussian around each tissue's median in this very scan). What is left
    over of the scan when the tissues are taken away, in units of its range from fluid to white matter, is ``texture``
    ``[1, X, Y, Z]``; without a scan there is none. Brain voxels without a label are fluid. With ``regions``,
    ``regions`` ``[7, X, Y, Z]`` are the shares of each voxel that are solid tissue of each of `REGIONS`.

    Args:
        keys: the label map ``[1, X, Y, Z]``.
        scheme: one of `SCHEMES`.
        image_key: T1w scan on the same grid, used if it is there.
        mask_key: brain mask.
        blur: sigma that the labels are smoothed with, voxels.
        regions: make them; only contrasts of `REGION_BRIGHTNESS` use them.

    Raises:
        InputError: an unknown scheme, or a label map that holds not all tissues.
    """

    def __init__(
        self,
        keys: str = "anatomy_label",
        scheme: str = "dlmuse",
        image_key: str = "image",
        mask_key: str = "brain_mask",
        blur: float = 0.6,
        regions: bool = True,
    ) -> None:
        super().__init__(keys)
        if scheme not in SCHEMES:
            raise InputError(f"label_scheme '{scheme}' is unknown: use one of {', '.join(SCHEMES)}")
        self.scheme, self.image_key, self.mask_key, self.blur = scheme, image_key, mask_key, blur
        self.regions = regions

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        labels = d[self.keys[0]]
        inside = d[self.mask_key].as_tensor()[0].numpy() > 0
        values = labels.as_tensor()[0].numpy()
        hard = np.stack([np.isin(values, list(SCHEMES[self.scheme][t])) & inside for t in TISSUES])
        missing = ", ".join(t for t, where in zip(TISSUES, hard) if not where.any())
        if missing:
            name = labels.meta.get("filename_or_obj", self.keys[0])
            raise InputError(f"{name}: holds no label of {missing}; is '{self.scheme}' its scheme?")
        hard[0] |= inside & ~hard.any(0)
        expected = np.stack([ndimage.gaussian_filter(h.astype(np.float32), self.blur) for h in hard])
        has_scan = self.image_key in d
        if has_scan:
            scan = d[self.image_key].as_tensor()[0].numpy()
            median = np.array([np.median(scan[h]) for h in hard])
            scale = max(float(median[3] - median[0]), 1e-6)
            distance = (scan - median[:, None, None, None]) / scale
            expected = (expected + 1e-3 * hard) * np.exp(-0.5 * (6 * distance) ** 2) + 1e-6 * hard
        share = expected / np.maximum(expected.sum(0), 1e-12) * inside
        if has_scan:
            texture = ((scan - np.tensordot(median, share, 1)) / scale * inside)[None]
            d["texture"] = MetaTensor(torch.as_tensor(texture, dtype=torch.float32)).copy_meta_from(labels)
        if self.regions:
            regions = (REGIONS[self.scheme][name] for name in REGION_NAMES)
            where = np.stack([np.isin(values, list(r)).astype(np.float32) for r in regions])
            where = ndimage.gaussian_filter(where, self.blur, axes=(1, 2, 3)) * (1 - share[TISSUES.index("csf")])
            d["regions"] = MetaTensor(torch.as_tensor(where * inside, dtype=torch.float32)).copy_meta_from(labels)
        d["tissue"] = MetaTensor(torch.as_tensor(share, dtype=torch.float32)).copy_meta_from(labels)
        return d

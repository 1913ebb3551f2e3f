"""Real scans, where they are at hand: beside the checkout, in ../shared/data (never part of it)."""

from __future__ import annotations

import numpy as np
import pytest
from monai.transforms import Compose, Orientationd

from bundle.data import find_scans, load_atlas, load_recipe
from bundle.data.atlas import atlas_overlap
from bundle.transforms import AlignToAtlasd, BrainMaskd, LoadScand, NormalizeBrainIntensityd, ResampleToGridd
from tests.conftest import CENTER, ROOT

DATA = ROOT.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real scans in {DATA}")


@pytest.mark.parametrize(
    ("recipe", "source", "contrast"),
    [
        ("ixi_dlmuse", "ixi_hh_2mm", "t1"),
        ("mslub_mni", "mslub_mni_1mm", "t2"),
        ("mslub_mni", "mslub_mni_1mm", "flair"),
    ],
)
def test_real_brains_land_on_the_atlas(recipe, source, contrast):
    cohort = load_recipe(ROOT / "configs/datasets", recipe)
    scan = next(s for s in find_scans(cohort, DATA / source) if s["contrast"] == contrast)
    keys = [k for k in ("image", "brain_mask") if k in scan]
    chain = Compose(
        [
            LoadScand(keys),
            Orientationd(keys, axcodes="RAS", labels=None),
            BrainMaskd("image", close_mm=cohort.close_mm),
            AlignToAtlasd(["image", "brain_mask"]),
            ResampleToGridd(["image", "brain_mask"], 2.0, (96, 96, 50), CENTER, mode=("bilinear", "nearest")),
            NormalizeBrainIntensityd("image"),
        ]
    )
    data = chain({k: scan[k] for k in keys})
    assert atlas_overlap(data["brain_mask"], load_atlas()) > 0.94
    image, inside = data["image"][0].numpy(), data["brain_mask"][0].numpy() > 0
    assert ((image > 0) == inside).all() and np.median(image[inside]) > 0.2

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from bundle.transforms import RandWideVentriclesd
from tests.conftest import ellipsoid, meta

SHAPE = (48, 52, 40)
BRAIN, VENTRICLE = ellipsoid(SHAPE, (22, 24, 18)) > 0, ellipsoid(SHAPE, (5, 9, 5)) > 0
SURFACE = BRAIN & (ndimage.distance_transform_edt(BRAIN) <= 2)
FLUID = {"t1": 0.2, "t2": 1.0, "flair": 0.2}


def scan(fluid):
    image = np.where(BRAIN, 0.5 + np.random.RandomState(0).normal(0, 0.02, SHAPE), 0.0)
    image[VENTRICLE | SURFACE] = fluid
    return meta(image)


def wide(contrast, **options):
    transform = RandWideVentriclesd("image", contrast, **{"prob": 1.0, "depth": 8.0, "reach": (2.0, 3.5), **options})
    transform.set_random_state(0)
    return transform


@pytest.mark.parametrize("contrast", FLUID)
def test_ventricles_become_wider_and_the_rest_is_pushed_away(contrast):
    fluid, put = FLUID[contrast], wide(contrast)
    image = scan(fluid)
    sizes = []
    for _ in range(8):
        out = put({"image": image})["image"]
        moved = out[0].numpy()
        assert isinstance(out, MetaTensor) and (out.affine == image.affine).all() and out.shape == image.shape
        # the outline of the brain and what fluid lies there stay
        assert np.mean((moved > 0) != BRAIN) < 0.002
        assert np.abs(moved - image[0].numpy())[SURFACE].mean() < 0.15 * abs(fluid - 0.5)
        assert moved.max() <= image.max() and moved[moved > 0].min() >= min(0.2, image[image > 0].min()) - 1e-6
        parts, _ = ndimage.label(np.abs(moved - fluid) < 0.2)
        sizes.append((parts == parts[24, 26, 20]).sum() / VENTRICLE.sum())
    assert min(sizes) > 1.05 and max(sizes) < 4 and np.ptp(sizes) > 0.2


def test_tissue_alone_stays_as_it_is():
    image = np.where(BRAIN, 0.5, 0.0)
    torch.testing.assert_close(wide("t2")({"image": meta(image)})["image"], meta(image))


def test_as_many_are_changed_as_asked_and_the_same_again_with_the_same_state():
    image, put = scan(1.0), wide("t2", prob=0.3)
    changed = [not torch.equal(put({"image": image})["image"], image) for _ in range(60)]
    assert 0.1 < np.mean(changed) < 0.5
    one, two = (wide("t2")({"image": image})["image"] for _ in range(2))
    assert torch.equal(one, two)


def test_nothing_happens_where_there_is_no_brain():
    assert not wide("t2")({"image": meta(np.zeros(SHAPE))})["image"].any()

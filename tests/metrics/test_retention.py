import numpy as np
import pytest
from scipy import ndimage

from bundle.metrics.retention import (
    planted_contrast,
    real_contrast,
    robust_spread,
    shading_removed,
    shell_of,
    variation,
)
from bundle.synthesis import average_slices

AFFINE = np.diag([2.0, 2, 2, 1])


@pytest.fixture
def brain():
    """A brain whose values are 100 +- 10 (robust spread 14.826), and a lesion of 4 x 4 x 4 voxels in its middle."""
    inside = np.zeros((30, 30, 30), bool)
    inside[2:-2, 2:-2, 2:-2] = True
    twin = np.where(np.indices(inside.shape).sum(0) % 2 == 0, 90.0, 110.0) * inside
    soft = np.zeros(inside.shape)
    soft[13:17, 13:17, 13:17] = 1
    return inside, twin, soft


def test_contrast_is_what_was_planted_in_spreads(brain):
    inside, twin, soft = brain
    assert robust_spread(twin[inside]) == pytest.approx(14.826)
    planted = twin + 0.5 * 40 * soft
    assert planted_contrast(planted, twin, soft, inside, AFFINE) == pytest.approx(20 / 14.826)
    # neither another scale and offset nor a change of all the brain alters it
    assert planted_contrast(3 * planted + 7, 3 * twin + 7, soft, inside, AFFINE) == pytest.approx(20 / 14.826)
    assert planted_contrast(planted + 5 * inside, twin, soft, inside, AFFINE) == pytest.approx(20 / 14.826)
    assert np.isnan(planted_contrast(planted, twin, soft * 0, inside, AFFINE))


def test_what_a_mask_or_a_field_takes_is_missing(brain):
    inside, twin, soft = brain
    planted = twin + 20 * soft
    cut = inside.copy()
    cut[15:] = False  # half of the lesion
    found = planted_contrast(planted * cut, twin * cut, soft, cut, AFFINE)
    assert found == pytest.approx(10 / 14.826)
    # a correction that follows the lesion, by a quarter of its contrast
    assert planted_contrast(planted - 5 * soft, twin, soft, inside, AFFINE) == pytest.approx(15 / 14.826)


def test_what_averaging_spreads_is_collected(brain):
    import torch

    inside, twin, soft = brain
    volumes = torch.as_tensor(np.stack([twin + 20 * soft, twin, soft, inside]))
    thick = np.concatenate([average_slices(volumes, 12, axis=2).numpy()])
    affine = np.diag([2.0, 2, 5, 1])
    assert planted_contrast(*thick[:3], thick[3] > 0.5, affine, 1.0) == pytest.approx(20)


def test_a_smooth_change_counts_for_what_it_is_however_thin_the_lesion(brain):
    """A field that darkens the middle of the brain by a hundredth takes a twentieth of a contrast of 20 there."""
    inside, twin, _ = brain
    soft = np.zeros(inside.shape)
    soft[12:18:3, 12:18:3, 12:18:3] = 1  # eight single voxels
    planted = twin + 20 * soft
    darker = np.where(shell_of(soft, inside, AFFINE), 1.0, 0.99)
    expected = 20 - 0.01 * (twin + 20)[soft > 0].mean()
    assert planted_contrast(planted * darker, twin, soft, inside, AFFINE, 1.0) == pytest.approx(expected, rel=0.02)
    blurred = twin + 20 * ndimage.gaussian_filter(soft, 1.0)  # which does take contrast away
    assert 0 < planted_contrast(blurred, twin, soft, inside, AFFINE, 1.0) < 5


def test_the_surroundings_are_told_in_mm(brain):
    inside, _, soft = brain
    line = shell_of(soft, inside, AFFINE)[:, 15, 15]
    assert list(np.flatnonzero(line)) == [*range(6, 11), *range(19, 24)]  # 6 to 14 mm


def test_real_lesions_shading_and_variation(brain):
    inside, twin, soft = brain
    lesion = soft > 0
    image = twin + 30 * lesion
    assert real_contrast(image, lesion, inside, AFFINE) == pytest.approx(30 / 14.826, rel=0.01)
    assert np.isnan(real_contrast(image, lesion, inside & ~lesion, AFFINE))
    field = np.exp(np.linspace(-0.3, 0.3, 50))
    assert shading_removed(field, field**0.25) == pytest.approx(0.75)
    assert shading_removed(field, field) == pytest.approx(0) and shading_removed(field, field**2) == pytest.approx(-1)
    assert variation(np.array([90.0, 110] * 5)) == pytest.approx(0.14826)

import numpy as np
import pytest
from scipy import ndimage

from bundle.errors import InputError
from bundle.transforms import BrainMaskd
from bundle.transforms.brain import close_mask
from tests.conftest import ellipsoid, meta

AFFINE = np.diag([4.0, 4.0, 4.0, 1.0])


def head(shape=(48, 52, 44)):
    return ellipsoid(shape, (18, 22, 17)) * (1 + np.random.rand(*shape))


def test_given_mask_is_made_binary():
    labels = ellipsoid((48, 52, 44), (15, 18, 12)) * 7
    out = BrainMaskd()({"image": meta(head(), AFFINE), "brain_mask": meta(labels, AFFINE)})
    np.testing.assert_array_equal(out["brain_mask"][0], labels > 0)


def test_mask_on_another_grid_is_brought_to_the_scans():
    coarse = np.diag([8.0, 8.0, 8.0, 1.0])
    coarse[:3, 3] = 2  # centre of the first coarse voxel among the fine ones
    mask = ellipsoid((24, 26, 22), (8, 10, 7))
    out = BrainMaskd()({"image": meta(head(), AFFINE), "brain_mask": meta(mask, coarse)})
    assert out["brain_mask"].shape == (1, 48, 52, 44)
    np.testing.assert_array_equal(out["brain_mask"][0], np.kron(mask, np.ones((2, 2, 2))))


def test_closing_fills_sulci_and_keeps_the_outline():
    mask = ellipsoid((40, 40, 40), (15, 15, 15))
    folded = mask.copy()
    folded[19:21, :, 10:] = 0  # a sulcus of 2 voxels
    closed = close_mask(meta(folded), np.array([1.0, 1.0, 1.0]), 3.0)[0].numpy()
    expected = ndimage.binary_closing(folded, ndimage.generate_binary_structure(3, 1), iterations=3)
    assert closed[20, 20, 20] == 1 and (closed >= folded).all()
    assert 2 * (closed * mask).sum() / (closed.sum() + mask.sum()) > 0.98
    assert np.abs(closed - expected).mean() < 0.01


def test_stripped_scan_is_its_own_mask():
    scan = head()
    scan[24, 26, 22] = 0  # a dark ventricle belongs to the brain
    scan[0, 0, 0] = 5  # a speck outside does not
    mask = BrainMaskd()({"image": meta(scan, AFFINE)})["brain_mask"][0].numpy()
    np.testing.assert_array_equal(mask, ellipsoid(scan.shape, (18, 22, 17)))


@pytest.mark.parametrize(
    "scan",
    [np.random.rand(48, 52, 44) + 1, ellipsoid((80, 90, 80), (30, 35, 38))],
    ids=["no background", "zero around a head of 10 litres"],
)
def test_whole_head_without_mask_is_refused(scan):
    with pytest.raises(InputError, match="--brain_mask"):
        BrainMaskd()({"image": meta(scan, AFFINE)})


def test_empty_mask_is_refused():
    with pytest.raises(InputError, match="empty"):
        BrainMaskd()({"image": meta(head(), AFFINE), "brain_mask": meta(np.zeros((48, 52, 44)), AFFINE)})

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, decollate_batch
from monai.transforms import Orientation

from bundle.transforms import AlignToAtlasd, MarkCoveraged, RestoreCoveraged
from tests.conftest import ellipsoid, meta

GRID = {"spacing": 2.0, "spatial_size": (20, 22, 10), "center": (3.0, -2.0, 1.0)}
SHAPE = (30, 26, 24)
SLANTED = np.array([[0.1, 0, -1.9, 24], [1.8, 0.2, 0.1, -28], [0, 2.0, 0.2, -26], [0, 0, 0, 1]])


def outside(affine):
    """Which voxel centres are off the grid, one by one."""
    off = np.zeros(SHAPE, bool)
    half = np.array(GRID["spatial_size"]) * GRID["spacing"] / 2
    for index in np.ndindex(SHAPE):
        off[index] = (np.abs((affine @ [*index, 1])[:3] - GRID["center"]) > half).any()
    return off


@pytest.mark.parametrize("affine", [SLANTED, np.diag([-1.0, 1, 1, 1]) @ SLANTED], ids=["slanted", "mirrored"])
def test_every_brain_voxel_is_on_the_grid_or_not(affine):
    brain = ellipsoid(SHAPE, (10, 11, 9))
    data = MarkCoveraged("brain_mask", **GRID)({"brain_mask": meta(brain, affine)})
    expected = np.where(brain > 0, 1 + outside(affine), 0)
    assert data["coverage"].dtype == torch.uint8 and set(np.unique(expected)) == {0, 1, 2}
    np.testing.assert_array_equal(data["coverage"][0], expected)
    assert data["not_examined"] == pytest.approx((expected == 2).sum() / (expected > 0).sum())
    np.testing.assert_array_equal(data["brain_mask"][0], brain)
    again = MarkCoveraged("brain_mask", **GRID)({"brain_mask": meta(brain, affine), "not_examined": 0.5})
    assert again["not_examined"] == pytest.approx(0.5 + 0.5 * data["not_examined"])


def test_a_brain_on_the_grid_was_looked_at_whole():
    brain = ellipsoid(SHAPE, (3, 3, 3))
    mark = MarkCoveraged("brain_mask", **GRID)
    data = mark({"brain_mask": meta(brain, SLANTED)})
    assert data["not_examined"] == 0
    np.testing.assert_array_equal(data["coverage"][0], brain)
    nothing = mark({"brain_mask": meta(np.zeros(SHAPE), SLANTED)})
    assert nothing["not_examined"] == 0 and not nothing["coverage"].any()
    far = mark({"brain_mask": meta(brain, SLANTED + 900 * np.eye(4, k=3))})
    assert far["not_examined"] == 1 and (far["coverage"][0].numpy() == 2 * brain).all()


def test_the_coverage_comes_back_voxel_by_voxel(monkeypatch):
    """Through alignment, a data loader and any order of axes, to the scan as it was."""
    to_atlas = np.array([[1.1, 0.2, 0, 3.013], [-0.2, 1.1, 0.1, 1.017], [0, -0.1, 1.2, -2.029], [0, 0, 0, 1]])
    monkeypatch.setattr("bundle.transforms.alignment.register_to_atlas", lambda *_: to_atlas)
    monkeypatch.setattr("bundle.transforms.alignment.atlas_overlap", lambda *_: 0.96)
    scan = meta(ellipsoid(SHAPE, (10, 11, 9)), SLANTED)
    assert nib.aff2axcodes(SLANTED) == ("A", "S", "L")
    turned = Orientation("RAS", labels=None)(scan)
    data = AlignToAtlasd(["image", "brain_mask"])({"image": turned, "brain_mask": turned.clone()})
    data = MarkCoveraged("brain_mask", **GRID)(data)
    assert 0.05 < data["not_examined"] < 0.95
    (data,) = decollate_batch(next(iter(DataLoader(Dataset([data]), batch_size=1))))
    data = RestoreCoveraged("coverage")({**data, "heatmap": scan})
    expected = np.where(scan[0] > 0, 1 + outside(to_atlas @ SLANTED), 0)
    np.testing.assert_array_equal(data["coverage"][0], expected)
    np.testing.assert_allclose(data["coverage"].affine, SLANTED)
    assert float(data["not_examined"]) == pytest.approx((expected == 2).sum() / (expected > 0).sum())

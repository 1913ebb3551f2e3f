import numpy as np
import pytest
import torch

from bundle.data.own_volume import own_voxel_mm3, scan_to_atlas
from bundle.errors import InputError
from bundle.transforms import AlignToAtlasd
from tests.conftest import meta

GROWN = np.array([[1.2, 0.1, 0, 5], [0, 1.1, 0, -3], [0, 0, 1.25, 9], [0, 0, 0, 1]])
MIRRORED = np.array([[-2.0, 0, 0, 8], [0, 0, 3, 1], [0, 1.5, 0, 2], [0, 0, 0, 1]])


def aligned(monkeypatch, affine=MIRRORED, matrix=GROWN):
    """A scan of which a registration says ``matrix``."""
    monkeypatch.setattr("bundle.transforms.alignment.register_to_atlas", lambda *_: matrix)
    monkeypatch.setattr("bundle.transforms.alignment.atlas_overlap", lambda *_: 0.96)
    align = AlignToAtlasd(["image", "brain_mask"])
    return align, align({key: meta(np.ones((4, 5, 6)), affine) for key in ("image", "brain_mask")})


def test_a_voxel_on_the_atlas_holds_what_it_held_in_the_scan(monkeypatch):
    align, data = aligned(monkeypatch)
    np.testing.assert_allclose(scan_to_atlas(data["image"]), GROWN)
    assert abs(torch.linalg.det(data["image"].affine[:3, :3])) == pytest.approx(9 * 1.2 * 1.1 * 1.25)
    assert own_voxel_mm3(data["image"]) == pytest.approx(9)
    grid = meta(np.ones((3, 3, 3)), np.diag([2.0, 2, 2, 1])).copy_meta_from(data["image"])
    grid.affine = torch.diag(torch.tensor([2.0, 2, 2, 1], dtype=torch.float64))
    assert own_voxel_mm3(grid) == pytest.approx(8 / (1.2 * 1.1 * 1.25))
    assert own_voxel_mm3(align.inverse(data)["image"]) == pytest.approx(9)


def test_of_prepared_items_the_matrix_counts_too(monkeypatch):
    prepared = meta(np.ones((3, 3, 3)), np.diag([2.0, 2, 2, 1]))
    assert own_voxel_mm3(prepared) == pytest.approx(8) == own_voxel_mm3(prepared, None)
    for matrix in (GROWN, torch.as_tensor(GROWN), GROWN.tolist(), np.diag([-1.0, 1, 1, 1]) @ GROWN):
        assert own_voxel_mm3(prepared, matrix) == pytest.approx(8 / 1.65)
    _, again = aligned(monkeypatch, matrix=np.diag([1.1, 1, 1, 1]))
    assert own_voxel_mm3(again["image"], GROWN) == pytest.approx(9 / 1.65)


@pytest.mark.parametrize("matrix", [np.diag([1.0, 1, 0, 1]), np.eye(3), np.full((4, 4), np.nan)])
def test_a_matrix_that_cannot_be_is_refused(matrix):
    with pytest.raises(InputError, match="'to_atlas' of its item"):
        own_voxel_mm3(meta(np.ones((2, 2, 2))), matrix)

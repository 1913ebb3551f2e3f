import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.spatial.transform import Rotation

from bundle.data import load_atlas
from bundle.errors import InputError
from bundle.transforms import register_rigidly
from tests.conftest import meta


def atlas_as(grid_affine, shape, to_atlas):
    """Template and brain of the atlas on another grid, in another world; ``to_atlas`` leads from that to the atlas'."""
    from monai.transforms import SpatialResample

    put = [MetaTensor(v, affine=torch.as_tensor(np.linalg.inv(to_atlas)) @ v.affine) for v in load_atlas()]
    sample = SpatialResample(padding_mode="zeros")
    image, brain = (sample(v, dst_affine=torch.as_tensor(grid_affine), spatial_size=shape) for v in put)
    return image, MetaTensor((brain > 0.5).float().as_tensor(), affine=brain.affine)


@pytest.mark.parametrize(
    ("degrees", "shift"), [((0, 0, 0), (0, 0, 0)), ((6, -4, 8), (5, -8, 6)), ((3, 2, 1), (0, 90, 0))]
)
def test_a_head_that_moved_is_found_again_in_another_contrast_and_grid(degrees, shift):
    """Slices across, and slices along; dark and bright exchanged."""
    moved = np.eye(4)
    moved[:3, :3], moved[:3, 3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix(), shift
    axial, sagittal = np.diag([2.0, 2.0, 4.0, 1.0]), np.diag([4.0, 2.0, 2.0, 1.0])
    axial[:3, 3] = (-90, -120, -75)
    sagittal[:3, 3] = np.array((-90, -120, -75)) - np.array(shift)
    fixed, fixed_brain = atlas_as(axial, (90, 110, 45), np.eye(4))
    moving, brain = atlas_as(sagittal, (46, 110, 90), moved)
    moving = MetaTensor((moving.max() - moving).as_tensor() * (brain > 0).as_tensor(), affine=moving.affine)
    found = register_rigidly(moving, brain, fixed, fixed_brain)
    np.testing.assert_allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3), atol=1e-6)
    places = np.argwhere(brain[0].numpy() > 0)[::501]
    places = np.c_[places, np.ones(len(places))] @ sagittal.T
    off = np.linalg.norm((places @ found.T - places @ moved.T)[:, :3], axis=1)
    assert np.median(off) < 1 and off.max() < 2


def test_heads_that_cannot_meet_are_told():
    empty = meta(np.zeros((8, 8, 8)))
    with pytest.raises(InputError, match=r"has no brain|do not overlap"):
        register_rigidly(empty, empty, empty, empty)

import numpy as np
import pytest
import torch
from monai.networks.layers import GaussianFilter
from monai.transforms import Compose, Invertd, MaskIntensityd
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bundle.data import grid_affine
from bundle.errors import InputError
from bundle.transforms import FillOutsided, KeepVolumed, ResampleToGrid, ResampleToGridd
from bundle.transforms.spatial import gaussian_blur
from tests.conftest import CENTER, ellipsoid, meta


def smooth_noise(shape, sigma=3):
    return ndimage.gaussian_filter(np.random.standard_normal(shape), sigma) + 1


def test_grids_of_two_spacings_share_their_edges():
    fine, coarse = grid_affine(1, (192, 192, 100), CENTER), grid_affine(2, (96, 96, 50), CENTER)
    np.testing.assert_allclose((fine @ [-0.5, -0.5, -0.5, 1])[:3], (coarse @ [-0.5, -0.5, -0.5, 1])[:3])
    np.testing.assert_allclose((fine @ [191.5, 191.5, 99.5, 1])[:3], (coarse @ [95.5, 95.5, 49.5, 1])[:3])
    np.testing.assert_allclose((fine @ [95.5, 95.5, 49.5, 1])[:3], CENTER)


def test_resampling_agrees_with_scipy():
    affine = np.array([[0, 0, -3.0, 40], [2.5, 0.2, 0, -70], [0, 2.8, 0.1, -60], [0, 0, 0, 1]])
    volume = smooth_noise((24, 26, 28))
    resample = ResampleToGrid(2.0, (20, 22, 18), CENTER)
    out = resample(meta(volume, affine))
    to_source = np.linalg.inv(affine) @ grid_affine(2.0, (20, 22, 18), CENTER)
    expected = ndimage.affine_transform(volume, to_source, output_shape=(20, 22, 18), order=1, mode="constant")
    core = ndimage.affine_transform(np.ones_like(volume), to_source, output_shape=(20, 22, 18), order=0) > 0
    core = ndimage.binary_erosion(core, iterations=2)  # borders are padded differently
    assert core.sum() > 500
    np.testing.assert_allclose(out[0].numpy()[core], expected[core], atol=2e-4)
    np.testing.assert_allclose(out.affine.numpy(), grid_affine(2.0, (20, 22, 18), CENTER), atol=1e-9)


@pytest.mark.parametrize("sigma", [(0.7, 1.3, 0.0), (3.0, 0.2, 0.5)])
def test_blur_agrees_with_monai(sigma):
    volume = torch.as_tensor(np.random.standard_normal((2, 9, 12, 7)), dtype=torch.float32)
    expected = GaussianFilter(3, list(sigma))(volume[:, None])[:, 0]
    torch.testing.assert_close(gaussian_blur(volume, sigma), expected, atol=1e-6, rtol=0)
    whole = (volume * 10).to(torch.int16)
    assert gaussian_blur(whole, sigma).dtype == torch.float32 and whole.dtype == torch.int16


def test_coarse_sampling_averages_instead_of_picking():
    """White noise at 1 mm loses most of its variance at 4 mm; a label keeps its values."""
    noise = meta(np.random.standard_normal((40, 40, 40)), grid_affine(1, (40, 40, 40), CENTER))
    resample = ResampleToGrid(4.0, (10, 10, 10), CENTER)
    assert resample(noise).std() < 0.3
    label = meta(np.random.choice([0, 2, 5], (40, 40, 40)), grid_affine(1, (40, 40, 40), CENTER))
    assert set(resample(label, "nearest").unique().tolist()) <= {0, 2, 5}


def test_inverse_restores_shape_affine_and_content():
    affine = np.diag([-2.0, 2, 2, 1])
    affine[:3, 3] = [25, -45, -20]
    volume = smooth_noise((26, 28, 25), 4)
    chain = Compose([ResampleToGridd("image", 1.5, (60, 60, 60), (0, -17, 5), mask_key=None)])
    data = chain({"image": meta(volume, affine)})
    data["copy"] = data["image"] * 1
    back = Invertd("copy", chain, orig_keys="image")(data)["copy"]
    assert back.shape == (1, 26, 28, 25)
    np.testing.assert_allclose(back.affine.numpy(), affine)
    np.testing.assert_allclose(back[0, 5:-5, 5:-5, 5:-5], volume[5:-5, 5:-5, 5:-5], atol=0.03)


def test_rim_is_not_darkened_by_the_outside():
    """A brain of constant score comes back constant after two interpolations, with the lowest score around it."""
    shape = (20, 20, 20)
    inside = ellipsoid(shape, (7, 8, 6))
    chain = Compose([ResampleToGridd("image", 1.7, (14, 14, 14), (9.5, 9.5, 9.5), allow_missing_keys=True)])
    data = chain({"image": meta(inside), "brain_mask": meta(inside)})
    data["heatmap"] = torch.where(data["brain_mask"] > 0, -3.0, -9.0) * torch.ones_like(data["image"])
    data = MaskIntensityd("heatmap", mask_key="brain_mask")(data)
    data = Invertd(["heatmap", "brain_mask"], chain, orig_keys="image", nearest_interp=False)(data)
    data = FillOutsided("heatmap")(data)
    brain = data["brain_mask"] > 0
    assert data["heatmap"].shape == (1, *shape) and 0.8 < brain.sum() / inside.sum() < 1.2
    torch.testing.assert_close(data["heatmap"].as_tensor(), torch.full((1, *shape), -3.0), atol=1e-4, rtol=0)


def test_nothing_outside_the_brain_comes_in():
    """Rims do not depend on what lies around the brain: a bright skull, zeros, or what is no number."""
    affine = grid_affine(1, (40, 40, 40), CENTER)
    inside = ellipsoid((40, 40, 40), (13, 15, 12))
    brain = inside * smooth_noise((40, 40, 40))
    chain = ResampleToGridd("image", 2.0, (20, 20, 20), CENTER)
    results = []
    for outside in (0.0, 9.0, np.nan):
        data = {"image": meta(np.where(inside > 0, brain, outside), affine), "brain_mask": meta(inside, affine)}
        results.append(chain(data))
    for result in results:
        torch.testing.assert_close(result["image"].as_tensor(), results[0]["image"].as_tensor())
    mask = results[0]["brain_mask"].as_tensor() > 0
    assert abs(mask.sum() * 8 / inside.sum() - 1) < 0.05
    values = results[0]["image"].as_tensor()[mask]
    assert values.min() > brain[inside > 0].min() and values.max() < brain[inside > 0].max()


def test_volumes_that_lie_elsewhere_than_their_scan_are_refused():
    mask = meta(np.ones((6, 6, 6)), np.diag([2.0, 2.0, 2.0, 1.0]))
    resample = ResampleToGridd(("image", "diffusion"), 2.0, (8, 8, 8), (5.0, 5.0, 5.0))
    image = {"image": mask.clone(), "brain_mask": mask}
    for other, message in (
        (meta(np.ones((6, 6, 6))), "lies elsewhere than its scan"),
        (meta(np.ones((6, 6, 5)), mask.affine), "6x6x5 voxels where its scan has 6x6x6"),
        (meta(np.where(np.arange(216) == 100, np.nan, 1).reshape(6, 6, 6), mask.affine), "voxels that are not finite"),
    ):
        with pytest.raises(InputError, match=message):
            resample({**image, "diffusion": other})


def test_spheres_keep_their_volume_there_and_back():
    """Native voxels of 0.5 x 0.5 x 4 mm, a tilted head, the 1 mm grid: 20 and 5 mm across, over many places."""
    shape, voxel = (120, 120, 16), np.array([0.5, 0.5, 4.0])
    chain = ResampleToGridd("label", 1.0, (72, 72, 72), (0, 0, 0), mode="nearest", mask_key=None)
    ratios: dict[int, list] = {5: [], 20: []}
    for diameter, found in ratios.items():
        for trial in range(10):
            turn = Rotation.from_euler("xyz", np.random.uniform(-15, 15, 3), degrees=True).as_matrix()
            affine = np.eye(4)
            affine[:3, :3] = turn @ np.diag(voxel)
            affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
            middle = (np.array(shape) - 1) / 2 + np.random.uniform(-6, 6, 3) / voxel
            planted = ellipsoid(shape, diameter / 2 / voxel, middle)
            data = chain({"label": meta(planted, affine)})
            data = Invertd("label", chain, nearest_interp=False)(data)
            back = KeepVolumed("label")(data)["label"][0].numpy()
            assert set(np.unique(back)) <= {0, 1}
            found.append(back.sum() / planted.sum())
            if diameter == 20:
                assert 2 * (back * planted).sum() / (back.sum() + planted.sum()) > 0.95, trial
    assert abs(np.array(ratios[20]) - 1).max() < 0.02
    assert abs(np.mean(ratios[5]) - 1) < 0.1


def test_regions_keep_their_volume():
    share = np.zeros((12, 12, 12), np.float32)
    share[2:5, 2:5, 2:5] = 0.4  # 27 voxels of 0.4: 11 stay
    share[8, 8, 8], share[8, 8, 9] = 0.9, 0.3
    kept = KeepVolumed("lesion")({"lesion": meta(share)})["lesion"][0].numpy()
    assert kept[:6].sum() == 11 and kept[8, 8, 8] == 1 and kept[6:].sum() == 1


def test_what_falls_off_a_region_is_no_finding():
    """A lesion with, on thin bridges, a splinter of 2 voxels and a lesion of 8, and a small one by itself; 8 mm^3."""
    share = np.zeros((16, 16, 16), np.float32)
    share[2:6, 2:6, 2:6] = share[2:4, 2:4, 9:11] = share[8:10, 2, 2] = share[14, 14, 14] = 1
    share[2, 2, 6:9] = share[6:8, 2, 2] = 0.05
    expected = share == 1
    volume = meta(share, np.diag([2.0, 2.0, 2.0, 1.0]))
    assert (KeepVolumed("lesion")({"lesion": volume})["lesion"][0].numpy() == expected).all()
    expected[8:10, 2, 2] = False
    assert (KeepVolumed("lesion", 50.0)({"lesion": volume})["lesion"][0].numpy() == expected).all()

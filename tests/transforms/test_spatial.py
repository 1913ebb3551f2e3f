import numpy as np
import pytest
import torch
from monai.transforms import Compose, Invertd
from scipy import ndimage

from bundle.data import Atlas, grid_affine, load_atlas
from bundle.data.atlas import atlas_overlap
from bundle.errors import InputError
from bundle.transforms import AlignToAtlasd, FillOutsided, MaskOutsided, ResampleToGrid, ResampleToGridd
from bundle.transforms.spatial import register_to_atlas
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
    chain = Compose([ResampleToGridd(["image"], 1.5, (60, 60, 60), (0, -17, 5))])
    data = chain({"image": meta(volume, affine)})
    data["copy"] = data["image"] * 1
    back = Invertd("copy", chain, orig_keys="image")(data)["copy"]
    assert back.shape == (1, 26, 28, 25)
    np.testing.assert_allclose(back.affine.numpy(), affine)
    np.testing.assert_allclose(back[0, 5:-5, 5:-5, 5:-5], volume[5:-5, 5:-5, 5:-5], atol=0.03)


@pytest.fixture(scope="module")
def atlas():
    """The MNI152 brain at 4 mm: registration in a second."""
    full = load_atlas()
    grid = ResampleToGrid(4.0, (48, 56, 48), (0, -17, 5))
    return Atlas(grid(full.template), grid(full.brain_mask, "nearest"))


@pytest.mark.parametrize("contrast", [lambda x: x, lambda x: (1 - x) ** 2], ids=["like the atlas", "inverted"])
def test_registration_finds_a_known_affine(atlas, contrast):
    angle = np.deg2rad(12)
    moved = np.array([[np.cos(angle), -np.sin(angle), 0, 9], [np.sin(angle), np.cos(angle), 0, -14], [0, 0, 1, 11]])
    world = np.vstack([moved @ np.diag([1.08, 0.94, 1.0, 1.0]), [0, 0, 0, 1]])
    image = meta(contrast(atlas.template[0].numpy()), world @ atlas.template.affine.numpy())
    mask = meta(atlas.brain_mask[0].numpy(), world @ atlas.template.affine.numpy())
    found = register_to_atlas(image, mask, atlas)
    corners = np.array([[x, y, z, 1] for x in (-60, 60) for y in (-90, 60) for z in (-40, 60)]).T
    assert np.abs((found @ world @ corners - corners)[:3]).max() < 3  # mm, at the surface of the brain


def test_alignment_is_undone_exactly(atlas, monkeypatch):
    monkeypatch.setattr("bundle.transforms.spatial.load_atlas", lambda *_: atlas)
    affine = np.diag([1.0, 1, 1, 1]) @ atlas.template.affine.numpy()
    affine[:3, 3] += 20
    data = {"image": meta(atlas.template[0], affine), "brain_mask": meta(atlas.brain_mask[0], affine)}
    align = AlignToAtlasd(["image", "brain_mask"])
    moved = align(data)
    assert not torch.allclose(moved["image"].affine, data["image"].affine)
    torch.testing.assert_close(moved["image"].affine, moved["brain_mask"].affine)
    assert atlas_overlap(moved["brain_mask"], atlas) > 0.97
    np.testing.assert_allclose(align.inverse(moved)["image"].affine.numpy(), affine)


def test_auto_leaves_what_is_aligned(atlas, monkeypatch):
    monkeypatch.setattr("bundle.transforms.spatial.load_atlas", lambda *_: atlas)
    monkeypatch.setattr("bundle.transforms.spatial.register_to_atlas", lambda *_: np.diag([2.0, 2, 2, 1]))
    align = AlignToAtlasd(["image", "brain_mask"], method="auto")
    data = {"image": atlas.template, "brain_mask": atlas.brain_mask}
    torch.testing.assert_close(align(data)["image"].affine, atlas.template.affine)
    far = {k: meta(v[0], np.diag([1.5, 1.5, 1.5, 1]) @ v.affine.numpy()) for k, v in data.items()}
    assert not torch.allclose(align(far)["image"].affine, far["image"].affine)
    torch.testing.assert_close(align({**far, "prepared": True})["image"].affine, far["image"].affine)
    with pytest.raises(InputError, match="alignment"):
        AlignToAtlasd("image", method="rigid")


def test_rim_is_not_darkened_by_the_outside():
    """A brain of constant score comes back constant after two interpolations, with the lowest score around it."""
    shape = (20, 20, 20)
    inside = ellipsoid(shape, (7, 8, 6))
    chain = Compose([ResampleToGridd(["image", "brain_mask"], 1.7, (14, 14, 14), (9.5, 9.5, 9.5))])
    data = chain({"image": meta(inside), "brain_mask": meta(inside)})
    data["brain_mask"] = (data["brain_mask"] > 0.5).float()
    data["heatmap"] = torch.where(data["brain_mask"] > 0, -3.0, -9.0) * torch.ones_like(data["image"])
    data = MaskOutsided("heatmap")(data)
    data = Invertd(["heatmap", "brain_mask"], chain, orig_keys="image", nearest_interp=False)(data)
    data = FillOutsided("heatmap")(data)
    brain = data["brain_mask"] > 0
    assert data["heatmap"].shape == (1, *shape) and 0.8 < brain.sum() / inside.sum() < 1.2
    torch.testing.assert_close(data["heatmap"].as_tensor(), torch.full((1, *shape), -3.0), atol=1e-4, rtol=0)

import numpy as np
import pytest
import torch
from monai.transforms import ConcatItemsd

from bundle.losses import BetaNLLLoss
from bundle.networks import PatchLocator, ResNetPatchLocator
from bundle.transforms import (
    AxialSlabsd,
    AxialSlicesd,
    CollateRandCentres,
    DenseLocationsd,
    FindBrainSlicesd,
    RandAxialSlabsd,
    RandAxialSlicesd,
    RandPatchesd,
    fit_normative,
    load_normative,
)
from tests.conftest import ellipsoid, meta


@pytest.fixture
def volume():
    """A brain whose intensity tells the place: 1 + row + 100 * column + 10000 * slice."""
    shape = (30, 26, 12)
    i, j, k = np.indices(shape)
    return meta((1 + i + 100 * j + 10000 * k) * ellipsoid(shape, (13, 11, 4)))


def with_slices(volume):
    return FindBrainSlicesd()({"image": volume})


def with_position(item):
    """As the configs do before the network sees the slice."""
    return ConcatItemsd(["image", "slice_position"], "image")(item)


def test_brain_slices_are_listed(volume):
    assert with_slices(volume)["brain_slices"].tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    thin = torch.zeros(1, 20, 20, 5)
    thin[0, 3, 3, 2] = 1  # a share below the least: the fullest slice is still listed
    assert with_slices(thin)["brain_slices"].tolist() == [2]


def test_slices_hold_intensity_and_position(volume):
    slices = AxialSlicesd("image", num_slices=3)(with_slices(volume))
    assert len(slices) == 3
    for s in slices:
        position = s["slice_position"].unique()
        k = round(float(position) * 12 - 0.5)
        assert len(position) == 1 and 0 < position < 1
        torch.testing.assert_close(s["image"][0], volume[0, :, :, k].as_tensor())
        assert (s["image"][0] > 0).any()


def test_random_slices_are_seeded_and_hold_brain(volume):
    sampler = RandAxialSlicesd("image", num_slices=40)
    positions = []
    for _ in range(2):
        sampler.set_random_state(3)
        positions.append([float(s["slice_position"][0, 0, 0]) for s in sampler(with_slices(volume))])
        assert len(set(positions[-1])) > 3
    assert positions[0] == positions[1]


def test_patches_know_where_they_come_from(volume):
    (image,) = map(with_position, AxialSlicesd("image", 1)(with_slices(volume)))
    sampler = RandPatchesd("image", patch_size=8, num_patches=30, min_brain_share=0.2).set_random_state(0)
    full = image["image"][0]
    for patch in sampler(image):
        assert patch["image"].shape == (2, 8, 8) and patch["label"].shape == (3, 1, 1)
        row, col, weight = patch["label"].flatten().tolist()
        i, j = round(row * 30 - 4), round(col * 26 - 4)
        torch.testing.assert_close(patch["image"][0], full[i : i + 8, j : j + 8])
        assert weight == 1 and (patch["image"][0] > 0).float().mean() >= 0.2


def test_an_empty_slice_gives_patches_without_weight():
    patches = RandPatchesd("image", patch_size=8, num_patches=5)({"image": torch.zeros(2, 20, 20)})
    assert len(patches) == 5 and all(p["label"][2] == 0 for p in patches)


def test_random_centres_over_all_slices_of_a_batch(volume):
    """Patches lie around voxels of any slice, also at the rim; places and slices are those of the voxels."""
    slices = [with_position({**s, "name": "a"}) for s in AxialSlicesd("image", 8)(with_slices(volume))]
    batch = CollateRandCentres(patch_size=8, num_centres=2000)([slices[:4], slices[4:]])
    patches, labels = batch["image"], batch["label"]
    assert patches.shape[1:] == (2, 8, 8) and labels.shape[1:] == (3, 1, 1) and len(patches) == len(labels)
    assert 100 < len(patches) < 2000 and (labels[:, 2] == 1).all() and batch["name"] == ["a"] * 8
    seen = set()
    for patch, label in zip(patches, labels):
        row, col = (float(label[a]) * n for a, n in enumerate((30, 26)))
        assert row == pytest.approx(round(row), abs=1e-4) and col == pytest.approx(round(col), abs=1e-4)
        k = int(patch[1, 0, 0] * 12)
        padded = torch.nn.functional.pad(volume.as_tensor()[0, :, :, k], (4, 4, 4, 4))
        i, j = round(row), round(col)
        torch.testing.assert_close(patch[0], padded[i : i + 8, j : j + 8])
        assert (patch[0] > 0).float().mean() >= 0.2 and (patch[1] == patch[1, 0, 0]).all()
        seen.add((k, i < 4))
    assert {k for k, _ in seen} == set(range(2, 10)) and any(rim for _, rim in seen)
    network = ResNetPatchLocator(patch_size=8)
    assert BetaNLLLoss(units=100)(network(patches), labels).isfinite()
    empty = CollateRandCentres(8, 50)([{"image": torch.zeros(2, 20, 20)}])
    assert BetaNLLLoss()(network(empty["image"]), empty["label"]) == 0


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_dense_locations_are_those_of_the_patches(volume, stride):
    (item,) = map(with_position, AxialSlicesd("image", 1)(with_slices(volume)))
    sampler = DenseLocationsd("image", patch_size=8, stride=stride).set_random_state(1)
    sizes = set()
    for _ in range(10):
        out = sampler(item)
        image, label = out["image"], out["label"]
        sizes.add((tuple(image.shape), tuple(label.shape)))
        assert (image.shape[1] - 8) // stride + 1 == label.shape[1]
        for i, j in np.ndindex(*label.shape[1:]):
            patch = image[0, stride * i : stride * i + 8, stride * j : stride * j + 8]
            share = (patch > 0).float().mean()
            assert (label[2, i, j] == 1) == (share >= 0.2)
            r, c = round(float(label[0, i, j]) * 30 - 4), round(float(label[1, i, j]) * 26 - 4)
            torch.testing.assert_close(patch, item["image"][0, r : r + 8, c : c + 8])
    assert len(sizes) == 1  # batches need one size, whatever the offset


def test_dense_and_patch_training_agree_on_the_same_patches(volume):
    """Same network, same patches: one pass over the slice gives the loss and gradient of all patches."""
    (item,) = map(with_position, AxialSlicesd("image", 1)(with_slices(meta(volume[0] / volume.max()))))
    network, loss = PatchLocator(patch_size=8, channels=4, features=8, stride=2).eval(), BetaNLLLoss()
    dense = DenseLocationsd("image", patch_size=8, stride=2)(item)
    value = loss(network(dense["image"][None]), dense["label"][None])
    value.backward()
    gradients = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    patches, labels = [], []
    for i, j in torch.nonzero(dense["label"][2]).tolist():
        patches.append(dense["image"][:, 2 * i : 2 * i + 8, 2 * j : 2 * j + 8])
        labels.append(dense["label"][:, i, j, None, None])
    alone = loss(network(torch.stack(patches)), torch.stack(labels))
    alone.backward()
    torch.testing.assert_close(alone, value)
    for p, g in zip(network.parameters(), gradients):
        torch.testing.assert_close(p.grad, g, atol=1e-6, rtol=1e-4)


@pytest.fixture(scope="module")
def normative(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "normative_flair.json"
    people = [{"image": meta(ellipsoid(SLABS, (5, 5, 4)) * (1 + 0.1 * np.random.rand(*SLABS)))} for _ in range(3)]
    fit_normative(people, path, "flair", {"spacing": 4.0, "spatial_size": list(SLABS), "center": [0, 0, 0]})
    return str(path)


SLABS = (14, 14, 10)


def test_slabs_are_slices_with_their_neighbours_and_z_scores(normative):
    image = meta(ellipsoid(SLABS, (5, 5, 4)) * np.random.rand(*SLABS))
    label = meta(np.random.rand(*SLABS) > 0.5)
    item = {**FindBrainSlicesd()({"image": image}), "label": label, "name": "a"}
    maps = load_normative(normative)
    values = image[0].numpy()
    z = np.clip((values - maps.mean[0].numpy()) / maps.spread[0].numpy() * (values > 0), -4, 10) / 4
    padded = [np.pad(v, ((0, 0), (0, 0), (2, 2))) for v in (values, z)]
    out = AxialSlabsd(contrast="flair", normative=normative, num_slices=3)(item)
    listed = item["brain_slices"].tolist()
    chosen = [listed[0], listed[round((len(listed) - 1) / 2)], listed[-1]]
    for sample, k in zip(out, chosen, strict=True):
        expected = [v[..., k + offset] for v in padded for offset in range(5)]
        np.testing.assert_allclose(sample["image"].numpy(), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(sample["label"][0].numpy(), label[0, ..., k].numpy())
        assert sample["name"] == "a"


def test_every_second_random_slab_holds_something_marked(normative):
    image, label = meta(ellipsoid(SLABS, (5, 5, 4))), np.zeros(SLABS)
    label[7, 7, 6] = 1
    draw = RandAxialSlabsd(contrast="flair", normative=normative, num_slices=8)
    item = FindBrainSlicesd()({"image": image})
    found = [bool(s["label"].any()) for s in draw({**item, "label": meta(label)})]
    assert all(found[1::2])
    assert not any(bool(s["label"].any()) for s in draw({**item, "label": meta(0 * label)}))  # healthy all over

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from bundle.transforms import Anomaliesd, NormalizeBrainIntensityd, RandAnomaliesd, anomalies, fit_normative
from bundle.transforms.anomalies import random_cluster, random_shape
from bundle.transforms.normative import load_normative
from tests.conftest import ellipsoid, meta

SHAPE = (24, 28, 20)
GRID = {"spacing": 4.0, "spatial_size": list(SHAPE), "center": [0, 0, 0]}
BRAIN = ellipsoid(SHAPE, (11, 13, 9))


def scan(seed=0):
    return meta(BRAIN * (0.5 + np.random.RandomState(seed).normal(0, 0.03, SHAPE)))


@pytest.fixture(scope="module")
def normative(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "normative_t1.json"
    scale = NormalizeBrainIntensityd("image")
    fit_normative([scale({"image": scan(s), "brain_mask": meta(BRAIN)}) for s in range(5)], path, "t1", GRID)
    return str(path)


@pytest.mark.parametrize("diameter", [1.0, 3.0, 9.0, 25.0])
def test_shapes_are_smooth_and_as_large_as_asked(diameter):
    sizes, rng = [], np.random.RandomState(0)
    for _ in range(20):
        shape = random_shape(diameter, rng)
        assert shape.min() >= 0 and shape.max() <= 1 and len(set(shape.shape)) == 1 and len(shape) % 2 == 1
        core = np.argwhere(shape >= 0.5)
        sizes.append(np.ptp(core, axis=0).max() + 1 if len(core) else 0)
    assert 0.6 * diameter - 1 <= max(sizes) <= 1.3 * diameter + 3  # a wavy border may reach beyond
    assert np.median(sizes) <= diameter + 1


@pytest.mark.parametrize("diameter", [3.0, 12.0, 25.0])
def test_clusters_are_spots_within_their_diameter(diameter):
    parts, shares, rng = [], [], np.random.RandomState(0)
    for _ in range(30):
        shape = random_cluster(diameter, rng)
        assert shape.min() >= 0 and shape.max() <= 1 and len(set(shape.shape)) == 1 and len(shape) % 2 == 1
        core = shape >= 0.5
        away = np.linalg.norm(np.argwhere(core) - len(shape) // 2, axis=1)
        assert away.size > 0 and away.max() <= diameter / 2
        parts.append(ndimage.label(core, np.ones((3, 3, 3)))[1])
        shares.append(core.sum() / (4 / 3 * np.pi * (diameter / 2) ** 3))
    assert max(shares) < 0.25 or diameter < 4  # never less than two voxels
    assert np.median(parts) > 2 or diameter < 20


def test_as_many_are_clusters_as_asked(normative, monkeypatch):
    drawn = {"random_shape": [], "random_cluster": []}
    for name, sizes in drawn.items():
        monkeypatch.setattr(
            anomalies, name, lambda diameter, rng, sizes=sizes: sizes.append(diameter) or np.ones((1, 1, 1))
        )
    put = Anomaliesd("image", "t1", normative, number=(500, 500), diameter=(1.0, 16.0), clusters=0.3)
    put({"image": scan(), "name": "a"})
    assert len(drawn["random_cluster"]) / 500 == pytest.approx(0.3, abs=0.06)
    assert min(drawn["random_cluster"]) >= 4 and max(drawn["random_cluster"]) <= 16 and min(drawn["random_shape"]) < 2


def test_what_is_marked_was_changed_and_the_rest_of_the_brain_was_not(normative):
    image = scan()
    put = Anomaliesd("image", "t1", normative, number=(3, 3), diameter=(4.0, 10.0))
    for name in ("a", "b", "c"):
        out = put({"image": image, "name": name})
        label, change = out["label"][0].numpy() > 0, (out["image"] - image).abs()[0].numpy()
        assert label.any() and not label[BRAIN == 0].any()
        assert (out["image"][0].numpy()[BRAIN == 0] == 0).all() and (out["image"][0].numpy()[BRAIN > 0] > 0).all()
        assert ndimage.uniform_filter(change, 3)[label].min() > 0
        far = ndimage.distance_transform_edt(~(change > 0)) > 0
        assert not label[far].any() and 0 < (change > 0).mean() < 0.5
        assert (out["image"].affine == image.affine).all()


def test_what_a_network_of_held_intensities_cannot_see_is_not_marked(normative):
    dark = meta(BRAIN * np.random.RandomState(0).uniform(0.05, 0.3, SHAPE))  # all below the range that tells
    about = {"number": (3, 3), "diameter": (4.0, 10.0)}
    every, seen = (
        Anomaliesd("image", "t1", normative, **about, held=held)({"image": dark, "name": "a"}) for held in (False, True)
    )
    torch.testing.assert_close(every["image"], seen["image"])
    assert 0 < seen["label"].sum() < every["label"].sum()
    changed = (seen["image"].clamp(min=0.35) > dark.clamp(min=0.35))[seen["label"] > 0]
    assert changed.float().mean() > 0.5


@pytest.mark.parametrize(("contrast", "fluid"), [("t1", 0.2), ("t2", 0.95), ("flair", 0.2)])
def test_fluid_gets_no_anomaly_if_they_are_to_lie_in_tissue(normative, contrast, fluid):
    half = np.arange(SHAPE[0])[:, None, None] < SHAPE[0] // 2
    image = np.where(half & (BRAIN > 0), fluid, np.asarray(scan()[0]))[None]
    put = Anomaliesd("image", contrast, normative, number=(20, 20), diameter=(4.0, 10.0), in_tissue=True)
    out = put({"image": meta(image[0]), "name": "a"})
    assert out["label"].any() and not out["label"][0].numpy()[np.broadcast_to(half, SHAPE)].any()
    np.testing.assert_array_equal(out["image"][0].numpy()[half & (BRAIN > 0)], np.float32(fluid))


def test_most_are_small_and_lie_where_healthy_people_are_alike(normative, monkeypatch):
    spread = np.where(np.arange(SHAPE[0])[:, None, None] < SHAPE[0] // 2, 0.05, 0.1) * np.ones(SHAPE)
    known = load_normative(normative)
    uneven = replace(known, spread=torch.as_tensor(spread, dtype=torch.float32)[None])
    monkeypatch.setattr(anomalies, "load_normative", lambda path: uneven)
    drawn = []
    monkeypatch.setattr(anomalies, "random_shape", lambda diameter, rng: drawn.append(diameter) or np.ones((1, 1, 1)))
    sizes = {"number": (900, 900), "diameter": (1.0, 16.0), "smallness": 2.0}
    seen = {"spreads": (5.0, 8.0), "amount": (0.3, 0.5), "likely_side": 1.0}
    put = Anomaliesd("image", "t1", normative, **sizes, **seen, alike=2.0)
    label = put({"image": scan(), "name": "a"})["label"][0].numpy() > 0
    # half of u**2 is below 1/4: the median is 16 ** (1/4)
    assert np.median(drawn) == pytest.approx(2.0, rel=0.1)
    tissue = BRAIN > 0
    rates = [label[tissue & (spread == value)].mean() for value in (0.05, 0.1)]
    # of 900 draws, so many hit a voxel at least once
    per_voxel = 900 / sum((tissue & (spread == value)).sum() / value**2 for value in (0.05, 0.1))
    expected = [1 - np.exp(-per_voxel / value**2) for value in (0.05, 0.1)]
    assert rates == pytest.approx(expected, rel=0.15)


def test_the_same_scan_gets_the_same_and_another_or_the_random_kind_others(normative):
    put, draw = (kind("image", "t1", normative, diameter=(4.0, 10.0)) for kind in (Anomaliesd, RandAnomaliesd))
    first, again, other = (put({"image": scan(), "name": name})["image"] for name in "aab")
    torch.testing.assert_close(first, again)
    assert not torch.equal(first, other)
    draw.set_random_state(3)
    one, two = (draw({"image": scan(), "name": "a"})["image"] for _ in range(2))
    draw.set_random_state(3)
    assert not torch.equal(one, two) and torch.equal(one, draw({"image": scan(), "name": "a"})["image"])


@pytest.mark.parametrize(("contrast", "sign"), [("t1", -1), ("t2", 1), ("flair", 1)])
def test_most_go_to_the_lesions_side(normative, contrast, sign):
    put = Anomaliesd("image", contrast, normative, number=(1, 1), diameter=(6.0, 10.0), likely_side=1.0)
    image, signs = scan(), []
    for seed in range(30):
        out = put({"image": image, "name": str(seed)})
        marked = out["label"] > 0
        if marked.any():
            signs.append(np.sign(float((out["image"] - image)[marked].mean())))
    # foreign texture may go either way
    assert len(signs) > 20 and np.mean(np.equal(signs, sign)) > 0.8


def test_nothing_is_put_where_there_is_no_brain(normative):
    out = Anomaliesd("image", "t1", normative)({"image": meta(np.zeros(SHAPE)), "name": "a"})
    assert not out["image"].any() and not out["label"].any()

import json
import os

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from bundle.errors import InputError
from bundle.transforms import NormalizeBrainIntensityd, fit_normative, load_normative
from bundle.transforms.normative import _MATCHES, TELLING
from tests.conftest import ellipsoid, meta

SHAPE = (24, 28, 20)
GRID = {"spacing": 4.0, "spatial_size": list(SHAPE), "center": [0, 0, 0]}


@pytest.fixture(scope="module")
def brain():
    return ellipsoid(SHAPE, (11, 13, 9))


@pytest.fixture(scope="module")
def anatomy():
    rng = np.random.default_rng(0)
    return np.kron(rng.uniform(0.2, 0.9, (6, 7, 5)), np.ones((4, 4, 4)))


def person(anatomy, brain, seed):
    rng = np.random.default_rng(100 + seed)
    return brain * (anatomy + rng.normal(0, 0.05, SHAPE)) * 500


@pytest.fixture(scope="module")
def normative(tmp_path_factory, anatomy, brain):
    path = tmp_path_factory.mktemp("models") / "normative_t2.json"
    scale = NormalizeBrainIntensityd("image")
    people = [scale({"image": meta(person(anatomy, brain, s)), "brain_mask": meta(brain)}) for s in range(12)]
    fit_normative(people, path, "t2", GRID)
    return path


def normalised(image, brain, path=None):
    normalise = NormalizeBrainIntensityd("image", normative=None if path is None else str(path))
    return normalise({"image": meta(image), "brain_mask": meta(brain)})["image"][0].numpy()


def test_mean_and_spread_are_those_of_the_people(normative, anatomy, brain):
    maps = load_normative(normative)
    inside = ellipsoid(SHAPE, (9, 11, 7)) > 0
    one = normalised(person(anatomy, brain, 99), brain)
    assert maps.facts["subjects"] == 12 and maps.facts["contrast"] == "t2"
    assert np.corrcoef(maps.mean[0].numpy()[inside], one[inside])[0, 1] > 0.9
    assert (maps.share[0].numpy()[inside] == 1).all() and (maps.share[0, 0, 0] == 0).all()


@pytest.mark.parametrize("brightness", [1200.0, 20.0])
def test_a_lesion_of_a_fifth_of_the_brain_does_not_move_the_rest(normative, anatomy, brain, brightness):
    image = person(anatomy, brain, 99)
    lesion = ellipsoid(SHAPE, (7, 8, 6), (14, 15, 10)) * brain > 0
    assert 0.15 < lesion.sum() / brain.sum() < 0.3
    rest = (brain > 0) & ~lesion
    planted = np.where(lesion, brightness, image)
    moved = np.abs(normalised(planted, brain, normative) - normalised(image, brain, normative))[rest]
    by_percentiles = np.abs(normalised(planted, brain) - normalised(image, brain))[rest]
    assert moved.mean() < 0.02
    assert brightness < 100 or by_percentiles.mean() > 3 * moved.mean()


def test_a_faint_lesion_of_a_sixth_of_the_brain_moves_the_rest_little(normative, anatomy, brain, monkeypatch):
    """Voxel by voxel it looks healthy: less than two spreads from its place's mean. What surrounds it does not."""
    image = person(anatomy, brain, 99)
    lesion = ellipsoid(SHAPE, (6, 7, 5), (14, 15, 10)) * brain > 0
    rest, planted = (brain > 0) & ~lesion, image + 45 * lesion  # the noise of a person is 25

    def moved():
        return np.abs(normalised(planted, brain, normative) - normalised(image, brain, normative))[rest].mean()

    with_neighbourhoods = moved()
    monkeypatch.setattr("bundle.transforms.normative._LOOKS", 0)
    assert with_neighbourhoods < 0.3 * moved() and with_neighbourhoods < 0.01


def test_healthy_voxels_tell_the_scale():
    """Known slope and offset are found again, by each contrast's way; the moments are NumPy's."""
    rng = np.random.default_rng(0)
    spread = rng.choice([0.03, 0.3], 20000, p=[0.8, 0.2])
    mean = rng.uniform(0.3, 1.0, 20000)
    values = (mean + spread * rng.normal(0, 1, 20000) - 0.2) / 1.5
    for contrast, by in _MATCHES.items():
        assert by(values, mean, spread) == pytest.approx((1.5, 0.2), abs=0.03), contrast
    weight = spread**-3.0
    slope, offset = _MATCHES["flair"](values, mean, spread)
    expected = np.cov(mean, aweights=weight, ddof=0) + np.average(spread**2, weights=weight)
    assert slope == pytest.approx(np.sqrt(expected / np.cov(values, aweights=weight, ddof=0)))
    assert slope * np.average(values, weights=weight) + offset == pytest.approx(np.average(mean, weights=weight))
    # a lesion that passes for healthy, where healthy people differ much
    values[(spread > 0.1) & (rng.random(20000) < 0.5)] += 0.4
    by_moments, by_quantiles = (abs(_MATCHES[c](values, mean, spread)[0] / 1.5 - 1) for c in ("flair", "t1"))
    assert by_moments < 0.03 and by_moments < 0.5 * by_quantiles


def test_units_do_not_matter_and_twice_is_once(normative, anatomy, brain):
    image = person(anatomy, brain, 99)
    one, other = normalised(image, brain, normative), normalised(brain * (3 * image - 40), brain, normative)
    np.testing.assert_allclose(one, other, atol=1e-4)
    again = normalised(one, brain, normative)
    np.testing.assert_allclose(again[brain > 0], one[brain > 0], atol=0.02)


def test_what_is_unlike_all_people_is_left_at_its_percentiles(normative, brain):
    image = brain * (np.indices(SHAPE).sum(0) % 2) * 1000.0 + brain
    assert np.isfinite(normalised(image, brain, normative)).all()


def test_a_finer_grid_uses_the_same_map(normative, anatomy, brain):
    double = [np.kron(v, np.ones((2, 2, 2))) for v in (person(anatomy, brain, 99), brain)]
    fine = normalised(*double, normative)
    coarse = normalised(person(anatomy, brain, 99), brain, normative)
    # between the blocks of this anatomy the finer map is interpolated
    assert np.abs(fine[::2, ::2, ::2] - coarse)[brain > 0].mean() < 0.05


def test_the_same_scans_give_the_same_file_and_others_another(tmp_path, anatomy, brain):
    scans = [{"image": MetaTensor(torch.as_tensor(person(anatomy, brain, s))[None] / 500)} for s in range(4)]
    path = tmp_path / "normative_t1.json"
    fit_normative(scans, path, "t1", GRID)
    before, known = path.stat().st_mtime_ns, load_normative(path).mean
    fit_normative(scans, path, "t1", GRID)
    assert path.stat().st_mtime_ns == before
    fit_normative(scans[1:], path, "t1", GRID, keep=True)
    assert path.stat().st_mtime_ns == before
    fit_normative(scans[1:], path, "t1", GRID)
    assert path.stat().st_mtime_ns != before and not torch.equal(load_normative(path).mean, known)


def test_what_is_no_normative_map_is_refused(tmp_path, normative, anatomy, brain):
    with pytest.raises(InputError, match="at least 3"):
        fit_normative([], tmp_path / "normative_t1.json", "t1", GRID)
    with pytest.raises(InputError, match="no normative map"):
        fit_normative([], tmp_path / "normative_t1.json", "t1", GRID, keep=True)
    with pytest.raises(InputError, match="no normative map"):
        load_normative(tmp_path / "normative_t1.json")
    content = json.loads(normative.read_text())
    for change, message in (({"chain": 1}, "older version"), ({"maps": {}}, "damaged")):
        file = tmp_path / "normative_t2.json"
        file.write_text(json.dumps({**content, **change}))
        (tmp_path / "normative_t2.nii.gz").write_bytes(normative.with_suffix(".nii.gz").read_bytes())
        os.utime(file, ns=(len(message), len(message)))
        with pytest.raises(InputError, match=message):
            load_normative(file)


def test_fluid_counts_up_to_the_level_at_which_it_tells(normative, anatomy, brain):
    """The mean against the plain median over subjects."""
    maps, low, high = load_normative(normative), *TELLING["t2"]
    people = np.stack([normalised(person(anatomy, brain, s), brain) for s in range(12)])
    image = torch.full((1, *SHAPE), 0.5) * torch.as_tensor(brain)
    for fluid in (high, 3.0):  # what is brighter than the level is as unusual as the level
        image[0, 10, 14, 10] = fluid
        told = maps.z(image, "t2", telling=True)[0, 10, 14, 10]
        usual, spread = (float(m[0, 10, 14, 10]) for m in (maps.telling_mean, maps.telling_spread))
        assert told == pytest.approx((high - usual) / spread, rel=1e-5)
    assert maps.z(image, "t2")[0, 10, 14, 10] > told
    held = np.median(people.clip(low, high), 0)
    inside = ellipsoid(SHAPE, (9, 11, 7)) > 0
    assert np.corrcoef(maps.telling_mean[0].numpy()[inside], held[inside])[0, 1] > 0.99
    assert maps.telling_mean.max() <= high < maps.mean.max()


def test_contrasts_without_such_a_level_have_one_z_score(tmp_path, anatomy, brain):
    scale = NormalizeBrainIntensityd("image")
    people = [scale({"image": meta(person(anatomy, brain, s)), "brain_mask": meta(brain)}) for s in range(4)]
    fit_normative(people, tmp_path / "normative_flair.json", "flair", GRID)
    maps = load_normative(tmp_path / "normative_flair.json")
    image = people[0]["image"].as_tensor()
    assert maps.telling_mean is None and torch.equal(maps.z(image, "flair"), maps.z(image, "flair", telling=True))


def test_a_map_without_its_file_is_made_again(tmp_path):
    people = [{"image": meta(np.random.default_rng(k).uniform(0.5, 1, (8, 8, 8)))} for k in range(3)]
    grid = {"spacing": 2.0, "spatial_size": [8, 8, 8], "center": [0, 0, 0]}
    path = tmp_path / "normative_t1.json"
    fit_normative(people, path, "t1", grid)
    before = path.with_suffix(".nii.gz").read_bytes()
    path.with_suffix(".nii.gz").unlink()
    fit_normative(people, path, "t1", grid)
    assert path.with_suffix(".nii.gz").read_bytes() == before
    (tmp_path / "calibration_t1.json").write_text("{}")
    (tmp_path / "calibration_t2.json").write_text("{}")
    fit_normative(people[::-1], path, "t1", grid)  # of other scans, as far as it knows
    aside = tmp_path / "checkpoints/earlier_maps_2"  # the first is of the map whose file was gone
    assert {f.name for f in aside.iterdir()} == {"calibration_t1.json", "normative_t1.json", "normative_t1.nii.gz"}
    assert (aside / "normative_t1.nii.gz").read_bytes() == before

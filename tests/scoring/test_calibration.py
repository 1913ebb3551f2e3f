import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from bundle.data.datalist import CHAIN
from bundle.errors import InputError
from bundle.scoring import (
    POINTS,
    SCORES,
    CheckLikenessd,
    Fusion,
    IfNeededd,
    fit_calibration,
    load_calibration,
    model_file,
    model_files,
    save_calibration,
)
from bundle.scoring.calibration_file import CalibrationFile, model_hash
from bundle.scoring.scores import OWN_MAPS, raw_maps, within_scan
from bundle.transforms import NormativeMap, fit_normative
from bundle.transforms.normative import ALL, MATCHING
from tests.conftest import ellipsoid

SHAPE = (14, 16, 10)


@pytest.fixture(scope="module")
def healthy():
    """Scores whose mean and spread depend on the place."""
    generator = torch.Generator().manual_seed(0)
    brain = torch.as_tensor(ellipsoid(SHAPE, (6, 7, 4)))[None]
    place = torch.linspace(-3, 3, SHAPE[0]).view(1, -1, 1, 1)
    channels, images = [], []
    for _ in range(12):
        noise = torch.randn(2, *SHAPE, generator=generator)
        channels.append(place + (1 + place.abs() / 3) * noise)
        images.append(brain * (0.1 + torch.rand(1, *SHAPE, generator=generator)))
    return channels, images


@pytest.fixture(scope="module")
def calibration(healthy):
    return fit_calibration(*healthy, "t1", spacing=2.0, smoothing_mm=2.0, filter_mm=0)


def test_z_means_the_same_everywhere(healthy, calibration):
    channels, images = healthy
    z = torch.stack([calibration.score("location", c, i)[i > 0] for c, i in zip(channels, images)])
    place = (torch.arange(SHAPE[0]).view(1, -1, 1, 1).expand(1, *SHAPE))[images[0] > 0]
    raw = torch.stack([c.sum(0, keepdim=True)[i > 0] for c, i in zip(channels, images)])
    for side in (place < 5, (place > 5) & (place < 8), place > 8):
        assert z[:, side].mean().abs() < 0.35 and 0.6 < z[:, side].std() < 1.6
    assert (raw[:, place > 8].mean() - raw[:, place < 5].mean()) > 3


def test_quantiles_are_those_of_left_out_scans(healthy, calibration):
    channels, images = healthy
    scores = []
    for i in range(len(images)):
        rest = [j for j in range(len(images)) if j != i]
        others = fit_calibration(
            [channels[j] for j in rest], [images[j] for j in rest], "t1", 2.0, 2.0, 0.0, normative=calibration.normative
        )
        scores.append(others.score("variance", channels[i], images[i])[images[i] > 0].numpy())
    expected = np.median([np.quantile(s, [0.95, 0.99]) for s in scores], 0)
    np.testing.assert_allclose([calibration.threshold("variance", q) for q in (0.95, 0.99)], expected, rtol=1e-5)
    inside = [calibration.score("variance", c, i)[i > 0].numpy() for c, i in zip(channels, images)]
    assert (
        np.median([np.quantile(s, 0.99) for s in inside]) < expected[1]
    )  # who helped to make the maps fits them better


@pytest.mark.parametrize("name", [name for name, score in SCORES.items() if set(score.maps) <= set(OWN_MAPS)])
def test_every_score_is_lowest_outside_the_brain(healthy, calibration, name):
    channels, images = healthy
    score = calibration.score(name, channels[0], images[0])
    inside = images[0] > 0
    assert score.shape == (1, *SHAPE) and score.isfinite().all()
    assert (score[~inside] == score[inside].min()).all()


def test_scores_are_what_they_are_called(healthy, calibration):
    channels, images = healthy
    inside = images[0] > 0
    uncalibrated = calibration.score("uncalibrated", channels[0], images[0])
    torch.testing.assert_close(uncalibrated[inside], (channels[0][:1] + channels[0][1:])[inside])
    dark = calibration.score("intensity", channels[0], images[0])
    torch.testing.assert_close(dark[inside], -images[0][inside])  # T1w lesions are dark
    bright = replace(calibration, contrast="flair").score("atlas_z", channels[0], images[0])
    z = calibration.intensity_z(images[0]).clamp(-4, 10)[0].numpy()
    weight = inside[0].numpy().astype(float)
    blur = [ndimage.gaussian_filter(v, 1.0, mode="constant", truncate=8) for v in (z * weight, weight)]  # 2 mm
    assert np.corrcoef(bright[0].numpy()[weight > 0], (blur[0] / blur[1].clip(1e-6))[weight > 0])[0, 1] > 0.999


@pytest.mark.parametrize("telling", [(0.0, 9.0), (0.5, 0.8)])
@pytest.mark.parametrize("contrast, sign", [("t1", -1), ("flair", 1)])
def test_asymmetry_is_the_difference_to_the_mirrored_place(calibration, contrast, sign, telling):
    image = torch.as_tensor(np.random.RandomState(5).uniform(0.2, 1.0, (1, 4, 3, 2)).astype(np.float32))
    image[0, 0, 1, 1] = 0  # no brain there: nothing to compare its opposite with
    maps = raw_maps(torch.zeros(2, 4, 3, 2), image, {}, contrast, calibration.normative, telling)
    for i, j, k in np.ndindex(4, 3, 2):
        here, there = float(image[0, i, j, k]), float(image[0, 3 - i, j, k])
        expected = sign * (np.clip(here, *telling) - np.clip(there, *telling)) if here and there else 0.0
        assert float(maps["asymmetry"][0, i, j, k]) == pytest.approx(expected, abs=1e-6)


def test_the_normative_map_of_other_scans_takes_the_place_of_their_own(healthy):
    images = healthy[1]
    mean, spread = torch.full((1, *SHAPE), 0.3), torch.full((1, *SHAPE), 0.05)
    fitted = fit_calibration(*healthy, "t1", 2.0, normative=NormativeMap(mean, spread, torch.ones_like(mean)))
    torch.testing.assert_close(fitted.intensity_z(images[0]), (images[0] - 0.3) / 0.05)
    usual = fit_calibration(*healthy, "t1", 2.0)
    assert fitted.threshold("variance", 0.99) == usual.threshold("variance", 0.99)
    assert fitted.threshold("atlas_z", 0.99) != usual.threshold("atlas_z", 0.99)


def test_no_contrast_is_scored_by_anothers_model(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"t1")
    assert model_file(tmp_path, "t1") == str(tmp_path / "model.pt")
    assert model_file(tmp_path, "t2") == str(tmp_path / "model_t2.pt")


def test_channels_are_filtered_but_baselines_are_not(healthy, calibration):
    channels, images = healthy
    filtered = replace(calibration, filter_sigma=dict.fromkeys(OWN_MAPS, 1.5) | {"intensity": 0.0})
    inside = (images[0] > 0).numpy()[0]
    score = filtered.score("uncalibrated", channels[0], images[0])[0].numpy()
    raw = channels[0].sum(0).numpy()
    weight = ndimage.gaussian_filter(inside.astype(float), 1.5, mode="constant", truncate=8)
    expected = ndimage.gaussian_filter(raw * inside, 1.5, mode="constant", truncate=8) / weight
    np.testing.assert_allclose(score[inside], expected[inside], atol=0.06)
    args = ("intensity", channels[0], images[0])
    torch.testing.assert_close(filtered.score(*args), calibration.score(*args))


def test_another_scanner_is_brought_to_the_scan_own_level(healthy, calibration):
    channels, images = healthy
    inside = images[0] > 0
    usual = calibration.score("location", channels[0], images[0])[inside]
    shifted = calibration.score("location", 5 + 3 * channels[0], images[0])[inside]
    assert abs(shifted.median()) < 0.02 and abs(usual.median()) < 0.02
    assert (shifted < shifted.quantile(0.9)).any() and 0.8 < shifted[shifted < 0].square().mean().sqrt() < 1.2
    narrow = torch.linspace(-0.1, 0.1, inside.numel()).view(inside.shape)
    torch.testing.assert_close(  # never stretched: a scan without anything odd stays so
        within_scan(narrow, inside)[inside], (narrow - narrow[inside].median())[inside]
    )


def test_a_large_lesion_does_not_move_the_level_of_a_scan():
    score = 3 + 2 * torch.randn(1, 30, 30, 30, generator=torch.Generator().manual_seed(1))
    inside = torch.ones_like(score, dtype=torch.bool)
    lesion = torch.zeros_like(inside)
    lesion[:, :6] = True  # a fifth of the brain
    with_lesion = within_scan(score + 12 * lesion, inside)
    torch.testing.assert_close(with_lesion[~lesion], within_scan(score, inside)[~lesion], atol=0.12, rtol=0.06)
    median = (score + 12 * lesion).median()
    assert (median - 3) / 2 > 0.3  # what the median of all would be off


def test_a_small_lesion_keeps_its_peak():
    """4 mm across, on a 2 mm grid, in the maps of voxel-wise methods."""
    shape = (20, 20, 20)
    channels, images = torch.zeros(2, *shape), torch.full((1, *shape), 0.5)
    images[0, 9:11, 9:11, 9:11] = 0.9
    normative = NormativeMap(torch.full((1, *shape), 0.5), torch.full((1, *shape), 0.05), torch.ones(1, *shape))
    noise = [torch.randn(2, *shape) for _ in range(4)]
    brains = [torch.full((1, *shape), 0.5) + 0.05 * n[:1] for n in noise]
    residuals = [n[1:] for n in noise]
    fitted = fit_calibration(
        noise, brains, "flair", 2.0, maps={"reconstruction": residuals, "theirs": residuals}, normative=normative
    )
    peak = fitted.score("atlas_z", channels, images).max()
    assert peak > 1.5  # a fifth of the 8 spreads it has
    sigmas = fitted.filter_sigma
    assert sigmas["reconstruction"] == 1.0 and sigmas["theirs"] == sigmas["squared_error"] == 1.5


def test_a_person_is_left_out_with_all_scans(healthy):
    channels, images = healthy
    persons = list("abcdeabcdefg")
    fitted = fit_calibration(channels, images, "t1", 2.0, 2.0, 0.0, persons=persons)
    assert fitted.provenance["people"] == 7 and fitted.provenance["subjects"] == 12
    scores = []
    for i, person in enumerate(persons):
        rest = [j for j in range(len(images)) if persons[j] != person]
        others = fit_calibration(
            [channels[j] for j in rest], [images[j] for j in rest], "t1", 2.0, 2.0, 0.0, normative=fitted.normative
        )
        scores.append(others.score("variance", channels[i], images[i])[images[i] > 0].numpy())
    expected = np.median([np.quantile(s, 0.99) for s in scores])
    assert fitted.threshold("variance", 0.99) == pytest.approx(expected, rel=1e-5)


def test_the_calibration_says_what_a_score_needs(healthy, capsys):
    channels, images = healthy
    maps = {"embedding": [c[:1] for c in channels], "reconstruction": [c[1:] for c in channels]}
    fusion = Fusion("sum", {"atlas_z": 1.0, "location": 1.0, "reconstruction": 0.0})
    fitted = fit_calibration(channels, images, "t1", 2.0, maps=maps, fusion=fusion)
    assert fitted.needed_maps("fusion") == {"z", "squared_error", "variance", "embedding"}
    file = SimpleNamespace(load=lambda *_: fitted)
    for name, expected in (("embedding", True), ("reconstruction", False)):
        add = IfNeededd(name, lambda d: {**d, "added": True}, "fusion", file)
        assert ("added" in add({})) == expected
    without = fit_calibration(channels, images, "t1", 2.0, maps=maps, location=("variance",))
    assert without.needed_maps("location") == {"variance"}
    torch.testing.assert_close(
        without.score("location", channels[0], images[0]), without.score("variance", channels[0], images[0])
    )
    plain = fit_calibration(channels, images, "t1", 2.0, location=("embedding",))
    assert plain.needed_maps("location") == {"squared_error", "variance"}
    assert capsys.readouterr().out == "location: there is no embedding; it is made of error and variance instead\n"
    with pytest.raises(InputError, match="map 'reconstruction' is missing for this scan"):
        fitted.score("reconstruction", channels[0], images[0])


def test_fine_grids_keep_coarse_maps(healthy):
    channels, images = (
        [torch.repeat_interleave(v, 2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3) for v in vs] for vs in healthy
    )
    fine = fit_calibration(channels, images, "t1", spacing=1.0, smoothing_mm=2.0, filter_mm=0)
    coarse = fit_calibration(*healthy, "t1", spacing=2.0, smoothing_mm=2.0, filter_mm=0)
    torch.testing.assert_close(fine.mean["location"], coarse.mean["location"], atol=1e-4, rtol=1e-4)
    assert fine.score("location", channels[0], images[0]).shape == images[0].shape


def test_saved_and_loaded_is_the_same_and_bound_to_its_model(tmp_path, healthy, calibration):
    model, other = tmp_path / "model.pt", tmp_path / "other.pt"
    model.write_bytes(b"weights")
    other.write_bytes(b"others")
    grid = {"spacing": 2.0, "spatial_size": list(SHAPE), "center": [0.0, 0.0, 0.0]}
    fit_normative([{"image": MetaTensor(image)} for image in healthy[1]], tmp_path / "normative_t1.json", "t1", grid)
    versions = {"chain": CHAIN, "matching": MATCHING}
    about = {**calibration.provenance, **versions, "model_sha256": model_hash(model, "t1"), "grid": grid}
    bound = replace(calibration, provenance=about)
    path = tmp_path / "calibration_t1.json"
    save_calibration(bound, path, np.eye(4))
    loaded = load_calibration(path, model, grid)
    for name in loaded.mean:
        torch.testing.assert_close(loaded.mean[name], calibration.mean[name], atol=1e-3, rtol=1e-3)
    assert loaded.quantiles == calibration.quantiles and loaded.provenance["subjects"] == 12
    assert loaded.telling == ALL
    save_calibration(replace(bound, telling=(0.2, 0.6)), tmp_path / "held.json", np.eye(4))
    assert load_calibration(tmp_path / "held.json", model, grid).telling == (0.2, 0.6)
    assert loaded.points == calibration.points and set(loaded.points["location"]) == set(POINTS)
    image = healthy[1][0]
    torch.testing.assert_close(loaded.intensity_z(image), calibration.intensity_z(image), atol=2e-2, rtol=2e-2)
    with pytest.raises(InputError, match="another model"):
        load_calibration(path, other)
    for version, current in versions.items():
        save_calibration(replace(bound, provenance={**about, version: current - 1}), tmp_path / "old.json", np.eye(4))
        with pytest.raises(InputError, match="older version; run the calibration again"):
            load_calibration(tmp_path / "old.json", model, grid)
    (tmp_path / "landmarks_t2.json").write_text("{}")  # of another contrast
    assert load_calibration(path, model).quantiles == calibration.quantiles
    (tmp_path / "landmarks_t1.json").write_text("{}")
    with pytest.raises(InputError, match="landmarks"):
        load_calibration(path, model)
    (tmp_path / "landmarks_t1.json").unlink()
    kept = (tmp_path / "normative_t1.json").read_text()
    (tmp_path / "normative_t1.json").write_text("{}")
    with pytest.raises(InputError, match="normative"):
        load_calibration(path, model)
    (tmp_path / "normative_t1.json").write_text(kept)
    for other_grid in ({**grid, "spacing": 1.0}, {**grid, "center": [0.0, 0.0, 9.0]}):
        with pytest.raises(InputError, match="another grid"):
            load_calibration(path, model, other_grid)
    with pytest.raises(InputError, match=r"quantile 0\.5"):
        loaded.threshold("location", 0.5)
    with pytest.raises(InputError, match="operating point often: stored are specific, screening"):
        loaded.point("location", "often")
    with pytest.raises(InputError, match=r"of t1 holds no score 'embedding', but .*run the calibration with"):
        loaded.point("embedding", "specific")
    with pytest.raises(InputError, match="run calibration"):
        load_calibration(tmp_path / "gone.json", model)
    with pytest.raises(InputError, match="no trained model"):
        load_calibration(path, tmp_path / "gone.pt")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "maps"}))
    with pytest.raises(InputError, match="damaged"):
        load_calibration(path, model)


def test_too_few_scans_and_unknown_contrasts_are_refused(healthy):
    channels, images = healthy
    with pytest.raises(InputError, match="at least 3 subjects"):
        fit_calibration(channels[:2], images[:2], "t1", 2.0)
    with pytest.raises(InputError, match="pd"):
        fit_calibration(channels, images, "pd", 2.0)


def test_what_is_unlike_healthy_people_is_flagged(healthy, calibration):
    file = SimpleNamespace(load=lambda *_: calibration)
    check = CheckLikenessd("image", file, atlas="another")  # tissues are looked for in the default atlas only
    image = healthy[1][0]
    assert "flags" not in check({"image": MetaTensor(image)})
    strange = torch.where(image > 0, image + 2 * (torch.rand(image.shape) < 0.5), 0.0)
    assert check({"image": MetaTensor(strange), "flags": "a"})["flags"].startswith("a; ")
    assert "of its brain is unlike healthy t1 scans" in check({"image": MetaTensor(strange)})["flags"]


def test_the_default_folder_of_models_is_of_one_contrast():
    file = CalibrationFile("./models/calibration_t1.json", "./models/model.pt")
    file._loaded = SimpleNamespace(contrast="t1")
    assert list(file.each()) == ["t1"] and file.load().contrast == "t1"


def test_an_unknown_contrast_is_told_as_such(tmp_path):
    with pytest.raises(InputError, match="contrast 'flare' is unknown: use auto, t1, t2, flair"):
        model_files(tmp_path, "flare")

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose

from bundle.data import find_scans, load_recipe
from bundle.data.volumes import write_volume
from bundle.errors import InputError
from bundle.synthesis import (
    REGION_BRIGHTNESS,
    REGION_NAMES,
    REGIONS,
    SCHEMES,
    TISSUE_ORDER,
    TISSUES,
    RandCoilShadingd,
    RandSkullStripErrord,
    RandThickSlicesd,
    RandTissueContrastd,
    TissueFractionsd,
    average_slices,
    coil_shading,
    draw_brightness,
    write_scans,
)
from bundle.transforms import LoadScand
from scripts.configs import config_part
from tests.conftest import ROOT, meta

LABELS = {"csf": 51, "grey": 100, "deep_grey": 59, "white": 81}  # DLMUSE


@pytest.fixture
def anatomy():
    """Shells of white matter, cortex and fluid around a deep nucleus and a ventricle, and their T1w scan."""
    i, j, k = np.indices((24, 24, 20)) - np.array([12, 12, 10]).reshape(3, 1, 1, 1)
    radius = np.sqrt(i**2 + j**2 + (1.2 * k) ** 2)
    labels = np.zeros(radius.shape)
    for limit, tissue in ((10, "csf"), (9, "grey"), (7, "white"), (3.5, "deep_grey"), (2, "csf")):
        labels[radius < limit] = LABELS[tissue]
    brightness = {51: 0.1, 100: 0.55, 59: 0.75, 81: 0.95, 0: 0.0}
    scan = np.vectorize(brightness.get)(labels) + 0.02 * np.random.RandomState(0).standard_normal(labels.shape)
    return {
        "image": meta(scan * (labels > 0)),
        "brain_mask": meta(labels > 0),
        "anatomy_label": meta(labels),
    }


def medians(image, labels):
    return {t: float(image[labels == label].median()) for t, label in LABELS.items()}


def test_shares_sum_to_one_and_follow_scan_and_labels(anatomy):
    d = TissueFractionsd()(anatomy)
    inside = anatomy["brain_mask"][0] > 0
    total = d["tissue"].sum(0)
    torch.testing.assert_close(total[inside].as_tensor(), torch.ones(int(inside.sum())))
    assert (total[~inside] == 0).all()
    for n, tissue in enumerate(TISSUES):
        labelled = anatomy["anatomy_label"][0] == LABELS[tissue]
        assert d["tissue"][n][labelled].mean() > 0.85
    # the labels call it white matter, the scan shows fluid beside a ventricle
    dark = {**anatomy, "image": anatomy["image"].clone()}
    dark["image"][0, 14, 12, 10] = 0.1
    csf = TISSUES.index("csf")
    assert TissueFractionsd()(dark)["tissue"][csf, 14, 12, 10] > d["tissue"][csf, 14, 12, 10]
    assert d["texture"].abs().max() < 0.6 and d["texture"][0][inside].std() > 0.005


def test_label_maps_do_without_a_scan(anatomy):
    d = TissueFractionsd()({k: anatomy[k] for k in ("brain_mask", "anatomy_label")})
    assert "texture" not in d
    torch.testing.assert_close(d["tissue"].sum(0).as_tensor(), anatomy["brain_mask"][0].as_tensor().float())
    image = RandTissueContrastd(contrast="t2").set_random_state(0)(d)["image"]
    assert image.shape == (1, 24, 24, 20)


def test_a_wrong_scheme_is_told(anatomy):
    with pytest.raises(InputError, match="freesurfer"):
        TissueFractionsd(scheme="freesurfer")(anatomy)
    with pytest.raises(InputError, match="label_scheme"):
        TissueFractionsd(scheme="aal")


@pytest.mark.parametrize("contrast", TISSUE_ORDER)
def test_tissues_are_ordered_as_in_the_sequence(anatomy, contrast):
    d = TissueFractionsd()(anatomy)
    paint = RandTissueContrastd(contrast=contrast)
    for seed in range(20):
        drawn = draw_brightness(contrast, np.random.RandomState(seed))
        assert tuple(sorted(drawn, key=drawn.get)) == TISSUE_ORDER[contrast] and max(drawn.values()) == 1
        image = paint.set_random_state(seed)(d)["image"][0]
        found = medians(image, anatomy["anatomy_label"][0])
        low, high = (TISSUE_ORDER[contrast][n] for n in (0, -1))
        assert found[low] == min(found.values()) and found[high] == max(found.values())
        assert ((image > 0) == (anatomy["brain_mask"][0] > 0)).all()


def test_regions_are_those_of_their_labels_but_for_fluid(anatomy):
    d = TissueFractionsd()(anatomy)
    regions, labels = d["regions"].as_tensor(), anatomy["anatomy_label"][0].as_tensor()
    assert regions.shape == (len(REGION_NAMES), 24, 24, 20) and regions.max() <= 1
    thalamus, limbic = (regions[REGION_NAMES.index(name)] for name in ("thalamus", "limbic"))
    assert thalamus[labels == LABELS["deep_grey"]].mean() > 0.6 and thalamus[labels == LABELS["grey"]].max() < 0.01
    assert limbic[labels == LABELS["grey"]].mean() > 0.6
    assert limbic[(d["tissue"][TISSUES.index("csf")] > 0.99) | (labels == 0)].max() < 0.01
    others = [n for n, name in enumerate(REGION_NAMES) if name not in ("thalamus", "limbic")]
    assert (regions[others] == 0).all()
    assert "regions" not in TissueFractionsd(regions=False)(anatomy)


@pytest.mark.parametrize("contrast", TISSUE_ORDER)
def test_regions_are_painted_between_a_third_and_a_little_more_than_what_was_measured(anatomy, contrast):
    d = TissueFractionsd()(anatomy)
    plain = {key: value for key, value in d.items() if key != "regions"}
    paint = RandTissueContrastd(contrast=contrast)
    shares = []
    for seed in range(20):
        drawn = draw_brightness(contrast, np.random.RandomState(seed))
        with_regions, without = (paint.set_random_state(seed)(v)["image"].as_tensor() for v in (d, plain))
        if contrast not in REGION_BRIGHTNESS:
            assert torch.equal(with_regions, without)
        change = (with_regions - without)[0] / (max(drawn.values()) - min(drawn.values()))
        for n, name in enumerate(REGION_NAMES):
            region, full = d["regions"][n].as_tensor(), REGION_BRIGHTNESS.get(contrast, {}).get(name, 1.0)
            shares += (change / region / full)[region > 0.5].tolist()
    expected = (0.3, 1.3) if contrast in REGION_BRIGHTNESS else (0.0, 0.0)
    assert (min(shares), max(shares)) == pytest.approx(expected, abs=0.1)
    assert min(shares) > expected[0] - 0.01 and max(shares) < expected[1] + 0.01


def test_every_scheme_has_all_regions_and_no_label_twice():
    assert all(tuple(regions) == REGION_NAMES for regions in REGIONS.values()) and set(REGIONS) == set(SCHEMES)
    for scheme, regions in REGIONS.items():
        labels = [label for group in regions.values() for label in group]
        assert len(labels) == len(set(labels)) and set(labels) <= set().union(*SCHEMES[scheme].values())
        assert not set(labels) & SCHEMES[scheme]["csf"]
    assert all(set(brightness) == set(REGION_NAMES) for brightness in REGION_BRIGHTNESS.values())


@pytest.mark.parametrize("contrast", TISSUE_ORDER)
def test_the_config_makes_regions_where_a_contrast_shows_them(contrast):
    volumes = config_part("synthesis", "volumes", contrast=contrast)
    fractions = next(t for t in volumes if isinstance(t, TissueFractionsd))
    assert fractions.regions == (contrast in REGION_BRIGHTNESS)


def test_scans_differ_by_seed_only(anatomy):
    d = TissueFractionsd()(anatomy)
    paint = RandTissueContrastd(contrast="flair")
    one, again, other = (paint.set_random_state(s)(d)["image"] for s in (1, 1, 2))
    assert torch.equal(one, again) and (one - other).abs().max() > 0.01
    with pytest.raises(InputError, match="swi"):
        RandTissueContrastd(contrast="swi")


def test_thick_slices_average_along_one_axis_and_keep_the_outside(anatomy):
    thick = RandThickSlicesd("image", spacing=2.0, thickness_mm=(8.0, 8.0), prob=1.0, axial=1.0).set_random_state(0)
    image = anatomy["image"]
    result = thick({"image": image})["image"]
    assert ((result > 0) == (image > 0)).all()
    flat = meta(np.ones((8, 8, 8)))
    torch.testing.assert_close(thick({"image": flat})["image"].as_tensor(), flat.as_tensor())
    ramp = meta(1 + np.indices((8, 8, 8))[0].astype(float))  # constant along the slices' axis
    torch.testing.assert_close(thick({"image": ramp})["image"].as_tensor(), ramp.as_tensor())
    noise = meta(1 + np.random.RandomState(0).rand(16, 16, 16))
    blurred = thick({"image": noise})["image"]
    assert blurred[0].diff(dim=2).abs().mean() < 0.4 * noise[0].diff(dim=2).abs().mean()
    none = RandThickSlicesd("image", spacing=2.0, prob=0.0)
    assert none({"image": noise})["image"] is noise


def test_slices_are_averaged_by_their_share():
    volume = torch.arange(1.0, 6.0).view(1, 1, 1, 5).expand(1, 2, 3, 5)
    # slabs of 2.5 slices: (1 + 2 + 3 / 2) / 2.5 and (3 / 2 + 4 + 5) / 2.5
    expected = torch.tensor([1.8, 4.2]).expand(1, 2, 3, 2)
    torch.testing.assert_close(average_slices(volume, 2, 2), expected)
    torch.testing.assert_close(average_slices(volume.movedim(-1, 1), 2, 0), expected.movedim(-1, 1))
    torch.testing.assert_close(average_slices(volume, 5, 2), volume)


@pytest.mark.parametrize("seed", range(4))
def test_slices_left_thick_lie_where_they_were(seed):
    """A ramp of the world's third coordinate tells it back, whatever the slabs."""
    affine = np.array([[2, 0, 0, 5], [0, 2, 0, -3], [0.2, 0, 2, 7], [0, 0, 0, 1.0]])
    index = np.stack([*np.indices((6, 7, 20)), np.ones((6, 7, 20))])
    world = np.tensordot(affine, index, 1)[2]
    thick = RandThickSlicesd("image", 2.0, (3.0, 6.0), prob=1.0, axial=1.0, interpolate=False).set_random_state(seed)
    result = thick({"image": meta(world, affine)})["image"]
    assert result.shape[:3] == (1, 6, 7) and 6 <= result.shape[3] <= 14
    assert float(result.affine[2, 2]) == pytest.approx(40 / result.shape[3])
    index = np.stack([*np.indices(result.shape[1:]), np.ones(result.shape[1:])])
    np.testing.assert_allclose(result[0], np.tensordot(result.affine.numpy(), index, 1)[2], atol=0.25)  # of 2 mm


def test_coils_shade_smoothly_between_their_limits():
    inside = np.zeros((30, 36, 28), bool)
    inside[4:-4, 4:-4, 4:-4] = True
    affine = np.diag([5.0, 5, 5, 1])
    fields = [coil_shading(inside, affine, 0.3, np.random.RandomState(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(fields[0], fields[1])
    assert np.abs(fields[0] - fields[2]).max() > 0.1
    for field in fields:
        assert field[inside].min() == pytest.approx(0.7) and field[inside].max() == pytest.approx(1.3)
        assert max(np.abs(np.diff(field, axis=a)).max() for a in range(3)) < 0.08 and field.min() > 0
    image = meta(inside * 2.0, affine)
    shaded = RandCoilShadingd("image", (0.2, 0.2)).set_random_state(0)({"image": image})["image"]
    assert ((shaded[0] > 0).numpy() == inside).all() and float(shaded.max()) == pytest.approx(2.4)
    assert RandCoilShadingd("image", prob=0.0)({"image": image})["image"] is image


def test_skull_stripping_takes_from_the_rim_only(anatomy):
    d = TissueFractionsd()(anatomy)
    strip = RandSkullStripErrord(prob=1.0)
    before = anatomy["brain_mask"][0] > 0
    deep = anatomy["anatomy_label"][0] == LABELS["deep_grey"]
    sizes = set()
    for seed in range(12):
        after = strip.set_random_state(seed)(d)["brain_mask"][0] > 0
        assert not (after & ~before).any() and after[deep].all()
        assert (after & (anatomy["anatomy_label"][0] == LABELS["white"])).sum() > 0
        sizes.add(int(after.sum()))
    assert len(sizes) > 1 and max(sizes) < before.sum()


def test_written_scans_are_a_prepared_dataset(tmp_path, anatomy):
    items = []
    for n in range(2):
        item = {"subject": f"s{n}", "contrast": "t1", "prepared": True}
        for key in ("image", "brain_mask", "anatomy_label"):
            item[key] = f"{key}{n}.nii.gz"
            write_volume(tmp_path / "in" / item[key], anatomy[key][0].numpy().astype(np.float32), np.eye(4))
        items.append(item)
    (tmp_path / "in" / "datalist.json").write_text(json.dumps({"training": items, "calibration": items[:1]}))
    chain = (
        Compose([LoadScand(["image", "brain_mask", "anatomy_label"]), TissueFractionsd()]),
        Compose([RandTissueContrastd(contrast="t2"), RandSkullStripErrord()]),
    )
    for folder, repeats in (("one", 1), ("two", 2)):
        write_scans(tmp_path / "in", tmp_path / folder, "t2", *chain, repeats=repeats)
    lists = json.loads((tmp_path / "two" / "datalist.json").read_text())
    assert {k: len(v) for k, v in lists.items()} == {"training": 4, "calibration": 2}
    assert all(i["contrast"] == "t2" for i in lists["training"])
    first, second = (item["image"] for item in lists["training"][:2])
    files = ("one", first), ("two", first), ("two", second)
    one, two, other = (nib.load(tmp_path / folder / file).get_fdata() for folder, file in files)
    np.testing.assert_array_equal(one, two)  # the number of repeats changes no scan
    assert np.abs(one - other).max() > 0.01
    with pytest.raises(InputError, match="output_dir"):
        write_scans(tmp_path / "in", tmp_path / "in", "t2", *chain)
    write_scans(tmp_path / "in", tmp_path / "one", "t2", *chain)  # once more into its own folder
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/datalist.json").write_text("[]")
    with pytest.raises(InputError, match="lists scans of others"):
        write_scans(tmp_path / "in", tmp_path / "theirs", "t2", *chain)


def test_raw_scans_lie_in_their_own_head(tmp_path, anatomy):
    """Turned and moved by the inverse of ``to_atlas``, in whole numbers, each in the folder of its section."""
    to_atlas = np.array([[0, -1.1, 0, 3], [0.9, 0, 0.1, -4], [0, 0, 1.2, 5], [0, 0, 0, 1.0]])
    grid = np.diag([2.0, 2, 2, 1])
    item = {"subject": "IXI1-a", "contrast": "t1", "prepared": True, "to_atlas": to_atlas.tolist()}
    for key in ("image", "brain_mask", "anatomy_label"):
        item[key] = f"{key}.nii.gz"
        write_volume(tmp_path / "in" / item[key], anatomy[key][0].numpy().astype(np.float32), grid)
    (tmp_path / "in/datalist.json").write_text(json.dumps({"calibration": [item], "tuning": [item]}))
    scale = Compose([RandTissueContrastd(contrast="flair"), lambda d: {**d, "image": d["image"] * 500}])
    load = Compose([LoadScand(["image", "brain_mask", "anatomy_label"]), TissueFractionsd()])
    folder = write_scans(tmp_path / "in", tmp_path / "out", "flair", load, scale, repeats=2, raw=True)
    files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*.nii.gz"))
    assert files == [f"{s}/IXI1-a_r{n}_flair.nii.gz" for s in ("calibration", "tuning") for n in (0, 1)]
    scan = nib.load(folder / files[0])
    np.testing.assert_allclose(to_atlas @ scan.affine, grid, atol=1e-5)
    values = np.asarray(scan.dataobj)
    assert values.dtype == np.int16 and ((values > 0) == (anatomy["brain_mask"][0].numpy() > 0)).all()
    assert 400 < np.percentile(values[values > 0], 99) < 700

    others = [
        {**item, "image": f"{n}.nii.gz", **({"subject": "IXI1"} if n < 2 else {"subject": None})} for n in range(3)
    ]
    for other in others:
        shutil.copy(tmp_path / "in/image.nii.gz", tmp_path / "in" / other["image"])
    (tmp_path / "in/datalist.json").write_text(json.dumps({"training": others}))
    several = write_scans(tmp_path / "in", tmp_path / "several", "flair", load, scale, raw=True)
    assert sorted(f.name for f in several.rglob("*.nii.gz")) == [f"{n}_r0_flair.nii.gz" for n in range(3)]

    recipe = load_recipe(ROOT / "configs/datasets", "synthetic")
    with pytest.raises(InputError, match="IXI1 is in 'tuning' and in 'calibration'"):
        find_scans(recipe, folder)
    for file in files[2:]:
        (folder / file).unlink()
    (one, two) = find_scans(recipe, folder)
    assert one["person"] == two["person"] == "IXI1" and one["subject"] != two["subject"]
    assert one["section"] == "calibration" and one["contrast"] == "flair"

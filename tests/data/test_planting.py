import json

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from bundle.data import find_scans, grid_affine, load_recipe
from bundle.data.anatomy import Anatomies
from bundle.data.datalist import CHAIN
from bundle.data.planted_cohort import plant_masks
from bundle.data.planting import LESION_LOOK, plant_lesion, share_of_voxels
from bundle.data.volumes import write_volume
from bundle.errors import InputError
from tests.conftest import ROOT

GRID = grid_affine(4.0, (20, 24, 16), (0.0, 0.0, 0.0))
# the scans lie turned, moved and smaller by a fifth, and have flat voxels, the first axis from right to left
TO_ATLAS = np.array([[1.2, 0.1, 0, 6], [-0.1, 1.2, 0, -9], [0, 0, 1.2, 4], [0, 0, 0, 1.0]])
RAW = np.linalg.inv(TO_ATLAS) @ np.array([[-2.0, 0, 0, 44], [0, 2, 0, -52], [0, 0, 5, -36], [0, 0, 0, 1.0]])
RAW_SHAPE = (45, 53, 15)
FINE = grid_affine(2.0, (40, 48, 32), (0.0, 0.0, 0.0))


@pytest.mark.parametrize(("contrast", "sign"), [("t1", -1), ("t2", 1), ("flair", 1)])
def test_lesions_look_as_the_sequence_shows_them(contrast, sign):
    image = 0.3 + 0.4 * torch.rand(1, 12, 12, 12)
    brain = torch.ones_like(image)
    brain[..., 10:] = 0
    soft = torch.zeros_like(image)
    soft[:, 3:7, 3:7, 6:] = 1.0
    soft[:, 7, 3:7, 6:] = 0.3
    planted, label = plant_lesion(image, brain, soft, contrast, (0.8, 0.9), np.random.RandomState(0))
    assert torch.equal(label, (soft == 1) * brain)  # nothing outside the brain
    assert sign * (planted - image)[label > 0].mean() > 0.1
    assert torch.equal(planted[soft * brain == 0], image[soft * brain == 0])
    weak, _ = plant_lesion(image, brain, soft, contrast, (0.1, 0.2), np.random.RandomState(0))
    assert (weak - image).abs().mean() < (planted - image).abs().mean()
    usual, _ = plant_lesion(image, brain, soft, contrast, None, np.random.RandomState(0))
    same, _ = plant_lesion(image, brain, soft, contrast, LESION_LOOK[contrast].strength, np.random.RandomState(0))
    assert torch.equal(usual, same)
    with pytest.raises(InputError, match="range in"):
        plant_lesion(image, brain, soft, contrast, (0.5, 2.0), np.random.RandomState(0))


def test_shares_of_voxels_are_means_over_them():
    mask = np.zeros((12, 12, 12))
    mask[3:8, 2:9, 4:7] = 1
    fine = np.diag([1.0, 1, 1, 1])
    same = share_of_voxels(mask, fine, mask.shape, fine)
    np.testing.assert_allclose(same, mask, atol=1e-6)
    coarse = fine @ np.diag([2.0, 3, 4, 1])
    coarse[:3, 3] = [0.5, 1, 1.5]  # whole voxels of the mask
    share = share_of_voxels(mask, fine, (6, 4, 3), coarse)
    np.testing.assert_allclose(share, mask.reshape(6, 2, 4, 3, 3, 4).mean((1, 3, 5)), atol=1e-6)
    turned = np.array([[0, -1.0, 0, 11], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(share_of_voxels(mask, turned, mask.shape, fine), np.rot90(mask), atol=1e-6)
    assert not share_of_voxels(mask, fine, (4, 4, 4), fine @ np.diag([1, 1, 1, 1]) + 30 * np.eye(4, 4, 3)).any()
    assert not share_of_voxels(mask * 0, fine, (4, 4, 4), fine).any()


@pytest.fixture
def bench(tmp_path):
    """Raw scans and their prepared brain masks of three healthy people, one of them twice, and masks of 1.0, 0.5, 2.3,
    1.5 and (left out) 0.06 ml.
    """
    brain = np.zeros((20, 24, 16), np.uint8)
    brain[2:-2, 2:-2, 2:-2] = 1
    items = []
    for n in range(4):
        raw = (300 + 300 * np.random.RandomState(n).rand(*RAW_SHAPE)).astype(np.float32)
        write_volume(tmp_path / "scanner" / f"s{n}.nii.gz", raw, RAW)
        for name in (f"i{n}", f"m{n}"):
            write_volume(tmp_path / "healthy" / f"{name}.nii.gz", brain, GRID)
        item = {"subject": f"s{n}", "contrast": "t1", "image": f"i{n}.nii.gz", "brain_mask": f"m{n}.nii.gz"}
        item |= {"person": f"p{min(n, 2)}", "chain": CHAIN, "to_atlas": TO_ATLAS.tolist()}
        items.append({**item, "source": {"image": f"../scanner/s{n}.nii.gz"}})
    (tmp_path / "healthy/datalist.json").write_text(json.dumps({"validation": items}))
    for n, size in enumerate(((5, 5, 5), (4, 4, 4), (6, 6, 8), (5, 6, 6), (2, 2, 2))):
        mask = np.zeros((40, 48, 32), np.uint8)
        mask[8 : 8 + size[0], 20 : 20 + size[1], 12 : 12 + size[2]] = 1
        write_volume(tmp_path / "masks" / f"lesion{n}.nii.gz", mask, FINE)
    return tmp_path


def planted(folder):
    """The cohort as its recipe reads it, with the number of the scan and the mask each was made from."""
    scans = find_scans(load_recipe(ROOT / "configs/datasets", "planted"), folder)
    return [(scan, int(scan["subject"][1]), int(scan["subject"][-1])) for scan in scans]


def test_every_mask_is_planted_once_where_it_belongs(bench):
    for folder in ("one", "again"):
        plant_masks(bench / "healthy", bench / "masks", bench / folder, "t1")
    scans = planted(bench / "one")
    assert sorted(mask for _, _, mask in scans) == [0, 1, 2, 3]
    by_size = {part: {mask for scan, _, mask in scans if scan["section"] == part} for part in ("tuning", "test")}
    assert by_size == {"tuning": {1, 3}, "test": {0, 2}}
    people = {part: {scan["subject"][:2] for scan, _, _ in scans if scan["section"] == part} for part in by_size}
    assert not people["tuning"] & people["test"]
    assert not {"s2", "s3"} & people["tuning"] or not {"s2", "s3"} & people["test"]  # one person's
    for scan, number, mask in scans:
        assert "brain_mask" not in scan
        image, label = (nib.load(scan[key]) for key in ("image", "label"))
        np.testing.assert_allclose(image.affine, RAW, atol=1e-4)
        image, label = image.get_fdata(), label.get_fdata()
        healthy = nib.load(bench / "scanner" / f"s{number}.nii.gz").get_fdata()
        atlas_ml = {0: 1.0, 1: 0.512, 2: 2.304, 3: 1.44}[mask]
        ml = label.sum() * abs(np.linalg.det(RAW[:3, :3])) / 1000
        assert ml * np.linalg.det(TO_ATLAS) == pytest.approx(atlas_ml, rel=0.35)
        # in its place in the atlas, or mirrored
        center = (TO_ATLAS @ RAW @ [*ndimage.center_of_mass(label), 1])[:3]
        size = {0: (5, 5, 5), 1: (4, 4, 4), 2: (6, 6, 8), 3: (5, 6, 6)}[mask]
        expected = (FINE @ [*(np.array([8, 20, 12]) + (np.array(size) - 1) / 2), 1])[:3]
        np.testing.assert_allclose([abs(center[0]), *center[1:]], [abs(expected[0]), *expected[1:]], atol=2)
        assert (image - healthy)[label > 0].mean() < -30
        far = ndimage.binary_dilation(label, iterations=3) == 0
        np.testing.assert_array_equal(image[far], healthy[far])
        same = nib.load(scan["image"].replace("/one/", "/again/")).get_fdata()
        np.testing.assert_array_equal(image, same)


def test_a_second_run_does_what_is_left_and_replaces_what_was_dealt_otherwise(bench):
    use = (bench / "healthy", bench / "masks", bench / "out", "t1")
    plant_masks(*use)
    files = sorted((bench / "out").rglob("*.nii.gz"))
    before = {f: f.stat().st_mtime_ns for f in files}
    files[0].unlink()
    plant_masks(*use)
    changed = {f for f, time in before.items() if f.stat().st_mtime_ns != time}
    assert files[0] in changed and changed <= {f for f in files if f.name[:10] == files[0].name[:10]}
    plant_masks(*use, given_mask=True, volume_ml=(0.9, 9))
    scans = planted(bench / "out")
    assert sorted(mask for _, _, mask in scans) == [0, 2, 3]  # the smallest is gone
    mask = nib.load(scans[0][0]["brain_mask"])
    share = mask.get_fdata().sum() * abs(np.linalg.det(TO_ATLAS @ RAW)) / (16 * 20 * 12 * 4**3)
    assert share == pytest.approx(1, abs=0.1)


def label_people(bench, **labels):
    """Anatomical labels of some people: fluid in front of a cut that goes through every mask, white matter behind it.
    The dataset has what a bench does not look at: an empty section, images that are gone.
    """
    values = np.full((20, 24, 16), 40, np.uint8)
    values[:, :12] = 4
    write_volume(bench / "healthy/labels.nii.gz", values, GRID)
    list_file = bench / "healthy/datalist.json"
    content = json.loads(list_file.read_text())
    for item in content["validation"]:
        item |= {"anatomy_label": labels[item["person"]]} if item["person"] in labels else {}
    list_file.write_text(json.dumps({**content, "tuning": [], "training": [{"image": "gone.nii.gz"}]}))


TISSUES = {"csf": {4, 11}, "white": {40}}


def test_no_lesion_lies_in_the_fluid_of_its_person(bench):
    assert not Anatomies([bench / "healthy"], TISSUES)
    label_people(bench, p0="labels.nii.gz", p1="labels.nii.gz", p2="labels.nii.gz")
    anatomies = Anatomies([bench / "healthy"], TISSUES)
    soft = np.random.default_rng(0).random(RAW_SHAPE).astype(np.float32)
    kept = anatomies.without_fluid(soft, {"image": "s0", "person": "p0"}, TO_ATLAS @ RAW)
    place = np.indices(RAW_SHAPE).reshape(3, -1)
    place = (np.linalg.inv(GRID) @ TO_ATLAS @ RAW @ [*place, np.ones(place.shape[1])])[:3].reshape(3, *RAW_SHAPE)
    labelled = np.all([(p > 2) & (p < n - 3) for p, n in zip(place, (20, 24, 16))], 0)
    fluid = place[1] < 11.5
    sure = labelled & (np.abs(place[1] - 11.5) > 2)
    np.testing.assert_allclose(kept[sure], np.where(fluid, 0, soft)[sure], atol=1e-6)

    use = (bench / "healthy", bench / "masks", bench / "out", "t1")
    plant_masks(*use)
    whole = {scan["subject"]: nib.load(scan["label"]).get_fdata() for scan, _, _ in planted(bench / "out")}
    for tissues, parts in ((TISSUES, True), ({"csf": set(), "white": {4, 40}}, False)):  # and another scheme, again all
        plant_masks(*use, anatomies=Anatomies([bench / "healthy"], tissues))
        for scan, _, _ in planted(bench / "out"):
            label = nib.load(scan["label"]).get_fdata()
            assert not label[whole[scan["subject"]] == 0].any()
            assert not parts or not label[fluid & sure].any()
            assert (0 < label.sum() < whole[scan["subject"]].sum()) == parts


def test_labels_that_do_not_tell_are_told(bench):
    label_people(bench, p0="labels.nii.gz", p1="labels.nii.gz")
    use = (bench / "healthy", bench / "masks", bench / "out", "t1")
    anatomies = Anatomies([bench / "healthy"], TISSUES)
    with pytest.raises(InputError, match=r"i[23]\.nii\.gz: no maps of anatomical labels of p2 .*--anatomy_dir"):
        plant_masks(*use, anatomies=anatomies)
    assert not list((bench / "out").rglob("*.nii.gz"))
    anatomies.files["p2"] = {"a", "b"}
    with pytest.raises(InputError, match="2 maps"):
        anatomies.file_of({"image": "x", "person": "p2"})
    assert anatomies.file_of({"image": "x", "person": "p2", "anatomy_label": "own"}) == "own"
    foreign = Anatomies([bench / "healthy"], {"csf": {4}, "white": {41}})
    with pytest.raises(InputError, match=r"labels\.nii\.gz: label 40 is none of this scheme.*--label_scheme"):
        foreign.without_fluid(np.ones(RAW_SHAPE), {"image": "s0", "person": "p0"}, TO_ATLAS @ RAW)


def test_families_and_sections_are_told_apart(bench):
    items = json.loads((bench / "healthy/datalist.json").read_text())["validation"]
    (bench / "healthy/datalist.json").write_text(json.dumps({"test": items[:1], "tuning": items[1:2]}))
    (bench / "masks").rename(bench / "small")
    (bench / "other").symlink_to(bench / "small")
    plant_masks(bench / "healthy", [bench / "small", bench / "other"], bench / "out", "t1")
    scans = planted(bench / "out")
    assert len(scans) == 8
    assert {scan["section"]: scan["subject"][:2] for scan, _, _ in scans} == {"test": "s0", "tuning": "s1"}
    assert {scan["subject"].split("__")[1].split("-")[0] for scan, _, _ in scans} == {"small", "other"}
    with pytest.raises(InputError, match="mask folders of one name"):
        plant_masks(bench / "healthy", [bench / "small", bench / "elsewhere/small"], bench / "out", "t1")
    with pytest.raises(InputError, match="one person in test"):
        plant_masks(bench / "healthy", bench / "small", bench / "out", "t1", ["test"])


def test_a_mask_goes_into_several_people_and_first_into_the_same(bench):
    items = json.loads((bench / "healthy/datalist.json").read_text())["validation"]
    (bench / "healthy/datalist.json").write_text(json.dumps({"test": items[:2], "tuning": items[2:]}))
    use = (bench / "healthy", bench / "masks", bench / "out", "t1")
    plant_masks(*use)
    before = {f: f.read_bytes() for f in (bench / "out").rglob("*.nii.gz")}
    plant_masks(*use, repeats=2)
    pairs = sorted((mask, number) for _, number, mask in planted(bench / "out"))
    assert pairs == [(0, 0), (0, 1), (1, 2), (1, 3), (2, 0), (2, 1), (3, 2), (3, 3)]
    assert all(file.read_bytes() == content for file, content in before.items())
    for repeats in (0, 3):
        with pytest.raises(InputError, match=f"1 to 2 scans here, not {repeats}"):
            plant_masks(*use, repeats=repeats)


def test_what_is_missing_is_told(bench):
    use = (bench / "healthy", bench / "masks", bench / "out", "t1")
    (bench / "empty").mkdir()
    with pytest.raises(InputError, match="no lesion masks"):
        plant_masks(use[0], bench / "empty", *use[2:])
    with pytest.raises(InputError, match="no mask of 50 to 60 ml"):
        plant_masks(*use, volume_ml=(50, 60))
    content = json.loads((bench / "healthy/datalist.json").read_text())
    for item in content["validation"]:
        item["source"]["image"] = "gone.nii.gz"
    (bench / "healthy/datalist.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"gone\.nii\.gz: not there"):
        plant_masks(*use)
    for item in content["validation"]:
        del item["source"]
    (bench / "healthy/datalist.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="names no raw scan"):
        plant_masks(*use)

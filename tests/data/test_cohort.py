import json

import nibabel as nib
import numpy as np
import pytest

from bundle.data import Recipe, find_scans, load_recipe, prepare_cohort, split_subjects
from bundle.errors import InputError
from tests.conftest import ROOT, ellipsoid, run_bundle, write_nifti


@pytest.mark.parametrize("name", [f.stem for f in (ROOT / "configs/datasets").glob("*.yaml")])
def test_shipped_recipes_load(name):
    assert load_recipe(ROOT / "configs/datasets", name).images


def test_unknown_recipes_and_entries_are_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("images: {t1: a}\nimage: b\n")
    with pytest.raises(InputError, match="there are: mine"):
        load_recipe(tmp_path, "yours")
    with pytest.raises(InputError, match=r"unknown entries \['image'\]"):
        load_recipe(tmp_path, "mine")


def test_scans_are_found_with_their_companions(tmp_path):
    for name in ("t1/s1_T1.nii.gz", "t1/s2_T1.nii.gz", "t2/s1_T2.nii.gz", "mask/s1.nii.gz", "t1/other.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    recipe = Recipe(
        {"t1": "t1/{subject}_T1.nii.gz", "t2": "t2/{subject}_T2.nii.gz"}, brain_mask="mask/{subject}.nii.gz"
    )
    found = [(s["subject"], s["contrast"], "brain_mask" in s) for s in find_scans(recipe, tmp_path)]
    assert found == [("s1", "t1", True), ("s1", "t2", True), ("s2", "t1", False)]
    with pytest.raises(InputError, match="nothing matches"):
        find_scans(Recipe({"t1": "{subject}.mgz"}), tmp_path)
    (tmp_path / "mask/s1_v2.nii.gz").write_text("")
    (scan,) = find_scans(Recipe({"t1": "t1/{subject}_T1.nii.gz"}, label="mask/{subject}_*.nii.gz"), tmp_path)[:1]
    assert scan["label"].endswith("s1_v2.nii.gz")
    with pytest.raises(InputError, match="one of 2 files for 'brain_mask' of s1"):
        find_scans(Recipe({"t1": "t1/{subject}_T1.nii.gz"}, brain_mask="mask/{subject}*.nii.gz"), tmp_path)
    (tmp_path / "t1/s1_T1w.nii.gz").write_text("")
    with pytest.raises(InputError, match="a second t1 scan of s1"):
        find_scans(Recipe({"t1": "t1/{subject}_T1*.nii.gz"}), tmp_path)


def test_splits_are_by_person_seeded_and_complete():
    subjects = [f"p{i:02d}-{visit}" for i in range(20) for visit in (1, 2)]
    recipe = Recipe({}, person=r"p\d+", splits={"training": "rest", "validation": 3, "calibration": 4})
    section = split_subjects(recipe, subjects, seed=1)
    assert section == split_subjects(recipe, subjects, seed=1) != split_subjects(recipe, subjects, seed=2)
    assert all(section[f"p{i:02d}-1"] == section[f"p{i:02d}-2"] for i in range(20))
    counts = {name: list(section.values()).count(name) for name in set(section.values())}
    assert counts == {"training": 26, "validation": 6, "calibration": 8}
    with pytest.raises(InputError, match="splits"):
        split_subjects(Recipe({}, splits={"test": 5}), ["a", "b"])


def test_preparation_through_the_runner(tmp_path, grid_file):
    """Two brains and a broken file: two are prepared, the third is named; a second run does only what is left."""
    source, affine = tmp_path / "raw", np.diag([-4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = [90, -110, -60]
    shape = (46, 50, 40)
    for name in ("a", "b"):
        brain = ellipsoid(shape, (17, 21, 16)) * (1 + np.random.rand(*shape))
        write_nifti(source / f"{name}/t1.nii.gz", brain, affine)
        write_nifti(source / f"{name}/lesion.nii.gz", ellipsoid(shape, (3, 3, 3)) * 4, affine)
    (source / "c").mkdir()
    (source / "c/t1.nii.gz").write_bytes(b"not an image")
    out = tmp_path / "prepared"
    command = ("preparation", "prepare", grid_file, "--source_dir", source, "--dataset_dir", out)
    result = run_bundle(*command, "--dataset", "mslub_mni")
    assert result.returncode == 3, result.stderr
    assert "1 of 3 scans failed" in result.stderr and "c/t1.nii.gz" in result.stderr
    assert "Traceback" not in result.stderr
    items = json.loads((out / "datalist.json").read_text())["test"]
    assert [i["subject"] for i in items] == ["a", "b"] and all(i["atlas_overlap"] > 0.5 for i in items)
    image, mask, label = (nib.load(out / items[0][k]) for k in ("image", "brain_mask", "label"))
    assert image.shape == mask.shape == label.shape == (32, 32, 16)
    assert set(np.unique(label.dataobj)) == {0, 4}
    assert ((image.get_fdata() > 0) == (np.asarray(mask.dataobj) > 0)).all()
    assert not list(out.rglob(".partial*"))

    before = {f: f.stat().st_mtime_ns for f in (out / "images").iterdir()}
    write_nifti(source / "c/t1.nii.gz", brain, affine)
    result = run_bundle(*command, "--dataset", "mslub_mni")
    assert result.returncode == 0, result.stderr
    assert len(json.loads((out / "datalist.json").read_text())["test"]) == 3
    assert all(f.stat().st_mtime_ns == t for f, t in before.items())


def test_nothing_to_prepare_is_said(tmp_path):
    with pytest.raises(InputError, match="nothing matches"):
        prepare_cohort(Recipe({"t1": "{subject}.nii"}), tmp_path, tmp_path / "out", lambda x: x)

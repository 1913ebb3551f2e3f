import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bundle.data import Recipe, find_scans, load_recipe, prepare_cohort, split_people
from bundle.data.cohort import _require_own_list
from bundle.data.files import write_json
from bundle.data.phantom import load_anatomy
from bundle.data.preparation import Preparation
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
    wrong = {
        "": "needs at least 'images'",
        "images: {t1: a.nii}": "no {subject}",
        "images: {t1: '{subject}.nii'}\nperson: '('": "no regular expression",
        "images: {t1: '{subject}.nii'}\nsplits: {test: '5'}": "a number of subjects",
        "images: {t1: '{subject}.nii'}\nsplits: {test: rest, training: rest}": "one of them 'rest'",
        "images: [": "not YAML",
        "images: {t1: '{subject}.nii'}\n5: 1": r"unknown entries \['5'\]",
        "images: {T1: '{subject}.nii'}": "in lower case",
        "images: {t1: 3}": "'images' must be",
        "images: {t1: '{subject}.nii'}\nbrain_mask: 5": "'brain_mask' must be a pattern",
        "images: {t1: '{subject}.nii'}\nperson: 5": "'person' must be a regular expression",
        "images: {t1: '{subject}.nii'}\nsplits: rest": "'splits' must be numbers of subjects",
        "images: {t1: '{subject}.nii'}\nclose_mm: wide": "'close_mm' must be a number",
        "images: {t1: '{subject}.nii'}\nignored_labels: 2": "'ignored_labels' must be a list",
        "images: {t1: '{subject}.nii'}\nalignment: afine": "'alignment' must be",
        "images: {t1: '{subject}.nii'} # \xe9": "not YAML",
    }
    for content, message in wrong.items():
        (tmp_path / "mine.yaml").write_text(content, encoding="latin1")
        with pytest.raises(InputError, match=message):
            load_recipe(tmp_path, "mine")


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


def test_scans_are_found_with_their_companions(tmp_path):
    touch(tmp_path, *(f"{n}.nii.gz" for n in ("t1/s1_T1", "t1/s2_T1", "t2/s1_T2", "mask/s1", "t1/other")))
    recipe = Recipe(
        {"t1": "t1/{subject}_T1.nii.gz", "t2": "t2/{subject}_T2.nii.gz"}, brain_mask="mask/{subject}.nii.gz"
    )
    found = [(s["subject"], s["contrast"], "brain_mask" in s) for s in find_scans(recipe, tmp_path)]
    assert found == [("s1", "t1", True), ("s1", "t2", True), ("s2", "t1", False)]
    with pytest.raises(InputError, match="nothing matches"):
        find_scans(Recipe({"t1": "{subject}.mgz"}), tmp_path)
    touch(tmp_path, "mask/s1_v2.nii.gz")
    (scan,) = find_scans(Recipe({"t1": "t1/{subject}_T1.nii.gz"}, label="mask/{subject}_*.nii.gz"), tmp_path)[:1]
    assert scan["label"].endswith("s1_v2.nii.gz")
    ambiguous = find_scans(Recipe({"t1": "t1/{subject}_T1.nii.gz"}, brain_mask="mask/{subject}*.nii.gz"), tmp_path)
    assert "2 files match its 'brain_mask'" in ambiguous[0]["problem"] and "problem" not in ambiguous[1]
    touch(tmp_path, "t1/s1_T1w.nii.gz")
    twice = find_scans(Recipe({"t1": "t1/{subject}_T1*.nii.gz"}), tmp_path)
    assert "a second t1 scan of s1" in twice[0]["problem"] and "problem" not in twice[1]


MNI = "space-MNI152NLin2009aSym"
LAYOUTS = {
    "ixi": (
        ["IXI-T1/IXI002-Guys-0828-T1.nii.gz", "IXI-T2/IXI002-Guys-0828-T2.nii.gz", "IXI-T1/IXI012-HH-1211-T1.nii.gz"],
        {("IXI002-Guys-0828", "t1"): False, ("IXI002-Guys-0828", "t2"): False, ("IXI012-HH-1211", "t1"): False},
    ),
    "brats21": (
        [f"BraTS2021_00000/BraTS2021_00000_{k}.nii.gz" for k in ("t1", "t1ce", "t2", "flair", "seg")],
        {("BraTS2021_00000", c): True for c in ("t1", "t2", "flair")},
    ),
    "mslub": (
        [f"patient01/patient01_{k}.nii.gz" for k in ("T1W", "T1WKS", "T2W", "FLAIR", "consensus_gt", "brainmask")]
        + [f"patient01/raw/patient01_{k}.nii.gz" for k in ("T1W", "T2W", "FLAIR")]
        + [f"cross_sectional/coregistered/patient02/{k}.nii.gz" for k in ("T1W", "consensus_gt", "brainmask")]
        + ["cross_sectional/raw/patient02/T1W.nii.gz"],
        {**{("patient01", c): True for c in ("t1", "t2", "flair")}, ("patient02", "t1"): True},
    ),
    "atlas_v2": (
        [
            f"Training/R001/sub-r001s001/ses-1/anat/sub-r001s001_ses-1_{MNI}_{k}.nii.gz"
            for k in ("T1w", "label-L_desc-T1lesion_mask")
        ],
        {("sub-r001s001_ses-1", "t1"): True},
    ),
    "wmh": (
        [f"{n}/{k}.nii.gz" for n in ("Utrecht/0", "Amsterdam/GE3T/100") for k in ("pre/T1", "pre/FLAIR", "wmh")]
        + ["Utrecht/0/orig/T1.nii.gz", "Utrecht/0/orig/FLAIR.nii.gz"],
        {(n, c): True for n in ("0", "100") for c in ("t1", "flair")},
    ),
    "bids": (
        [
            *("sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz", "sub-01/ses-2/anat/sub-01_ses-2_acq-x_T1w.nii"),
            *("sub-02/anat/sub-02_T2w.nii.gz", "sub-02/anat/sub-02_FLAIR.nii.gz", "sub-02/func/sub-02_bold.nii.gz"),
            "derivatives/fmriprep/sub-02/anat/sub-02_T1w.nii.gz",
        ],
        dict.fromkeys([("sub-01_ses-1", "t1"), ("sub-01_ses-2", "t1"), ("sub-02", "t2"), ("sub-02", "flair")], False),
    ),
    "folder": (
        ["a_T1.nii.gz", "a_flair.nii.gz", "a_lesion.nii.gz", "deep/b_t2.nii", "c/t1/IM1", "c/t1/IM2"],
        {("a", "t1"): True, ("a", "flair"): True, ("b", "t2"): False, ("c", "t1"): False},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_recipes_read_the_layouts_that_are_downloaded(tmp_path, name):
    files, expected = LAYOUTS[name]
    touch(tmp_path, *files, "README.txt", ".hidden/x_t1.nii.gz")
    scans = find_scans(load_recipe(ROOT / "configs/datasets", name), tmp_path)
    assert {(s["subject"], s["contrast"]): "label" in s for s in scans} == expected
    assert {s["person"] for s in scans if s["subject"].startswith("sub-01")} <= {"sub-01"}
    assert all("/orig/" not in s["image"] for s in scans)


def test_folders_may_say_the_section(tmp_path):
    recipe = Recipe({"t1": "raw/{section}/{subject}_t1.nii"}, label="raw/{section}/{subject}_lesion.nii")
    touch(tmp_path, "raw/Test/a_t1.nii", "raw/Test/a_lesion.nii", "raw/tuning/b_t1.nii", "raw/test/b_lesion.nii")
    a, b = find_scans(recipe, tmp_path)
    assert (a["section"], b["section"]) == ("test", "tuning")
    assert "label" in a and "label" not in b  # one of another section is another's
    touch(tmp_path, "raw/training/a2_t1.nii")
    with pytest.raises(InputError, match="a is in 'training' and in 'test'"):
        find_scans(Recipe(recipe.images, person="[a-z]"), tmp_path)
    touch(tmp_path, "raw/tests/c_t1.nii")
    with pytest.raises(InputError, match="'tests' is no section"):
        find_scans(recipe, tmp_path)
    for splits in ("splits: {test: 3}", "label: a\nimages: {t1: '{section}/{subject}.nii', t2: '{subject}.nii'}"):
        (tmp_path / "mine.yaml").write_text(f"images: {{t1: '{{section}}/{{subject}}.nii'}}\n{splits}\n")
        with pytest.raises(InputError, match="there are no splits"):
            load_recipe(tmp_path, "mine")


def test_splits_are_by_person_seeded_and_complete():
    people = [f"p{i:02d}" for i in range(20) for _ in (1, 2)]
    recipe = Recipe({}, splits={"training": "rest", "validation": 3, "calibration": 4})
    section = split_people(recipe, people, seed=1)
    assert section == split_people(recipe, people, seed=1) != split_people(recipe, people, seed=2)
    counts = {name: list(section.values()).count(name) for name in set(section.values())}
    assert counts == {"training": 13, "validation": 3, "calibration": 4}
    with pytest.raises(InputError, match="--splits"):
        split_people(Recipe({}, splits={"test": 5}), ["a", "b"])


@pytest.mark.parametrize(
    "content", ["[]", "[3]", '{"test": [{"image": "a"}]}', '{"test": [{"source": {"image": "../b"}}]}']
)
def test_the_list_of_another_cohort_is_not_replaced(tmp_path, content):
    touch(tmp_path, "raw/a_t1.nii.gz", "out/datalist.json")
    (tmp_path / "out/datalist.json").write_text(content)
    with pytest.raises(InputError, match="lists scans that are not of"):
        prepare_cohort(Recipe({"t1": "{subject}_t1.nii.gz"}), tmp_path / "raw", tmp_path / "out", dict)
    assert (tmp_path / "out/datalist.json").read_text() == content


def test_a_list_of_scans_that_are_links_is_their_own(tmp_path):
    touch(tmp_path, "elsewhere/a_t1.nii.gz", "raw/readme.txt", "out/datalist.json")
    (tmp_path / "raw/a_t1.nii.gz").symlink_to(tmp_path / "elsewhere/a_t1.nii.gz")
    (tmp_path / "link").symlink_to(tmp_path / "raw")
    (tmp_path / "out/datalist.json").write_text('{"test": [{"source": {"image": "../raw/a_t1.nii.gz"}}]}')
    _require_own_list(tmp_path / "out", tmp_path / "raw")
    touch(tmp_path, "raw/b_t1.nii.gz")
    (tmp_path / "out/datalist.json").write_text('{"test": [{"source": {"image": "../raw/b_t1.nii.gz"}}]}')
    _require_own_list(tmp_path / "out", tmp_path / "link")


def test_preparation_through_the_runner(tmp_path, grid_file):
    """Two brains and a broken file: two are prepared, the third is named; a second run does only what is left."""
    source, affine = tmp_path / "raw", np.diag([-4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = [90, -110, -70]
    shape = (46, 50, 40)
    t1, _, _, inside = load_anatomy(affine, shape).numpy()[:, 8:-8, 8:-8, 8:-8]
    affine[:3, 3] += [9, -7, 5]  # so that it has to be registered
    for name in ("a", "b"):
        brain = (0.1 + t1) * (inside > 0.5) * (1 + 0.1 * np.random.rand(*shape))
        write_nifti(source / f"{name}_t1.nii.gz", brain, affine)
        write_nifti(source / f"{name}_lesion.nii.gz", ellipsoid(shape, (3, 3, 3)) * 4, affine)
    (source / "c_t1.nii.gz").write_bytes(b"not an image")
    out = tmp_path / "prepared"
    command = ("preparation", "prepare", grid_file, "--source_dir", source, "--dataset_dir", out)
    result = run_bundle(*command, "--dataset", "folder", "--num_workers", 1)
    assert result.returncode == 3, result.stderr
    assert "1 of 3 scans failed" in result.stderr and "c_t1.nii.gz" in result.stderr
    assert "Traceback" not in result.stderr
    items = json.loads((out / "datalist.json").read_text())["test"]
    assert [i["subject"] for i in items] == ["a", "b"] and all(i["atlas_overlap"] > 0.9 for i in items)
    image, mask, label = (nib.load(out / items[0][k]) for k in ("image", "brain_mask", "label"))
    assert image.shape == mask.shape == label.shape == (32, 32, 16)
    assert set(np.unique(label.dataobj)) == {0, 4}
    assert ((image.get_fdata() > 0) == (np.asarray(mask.dataobj) > 0)).all()
    sheets = {f.name for f in (out / "qc").iterdir()}
    assert sheets == {"a_t1.png", "b_t1.png", "contact_sheet.png"}
    assert not list(out.rglob(".partial*")) and list(out.rglob("c_t1*")) == [out / "records/c_t1.json"]

    before = {f: f.stat().st_mtime_ns for f in (out / "images").iterdir()}
    write_nifti(source / "c_t1.nii.gz", brain * 2, affine)  # the same scan again would be dropped as a duplicate
    command += ("--dataset", "folder", "--num_workers", 0)  # what a worker imports takes longer than the scans
    result = run_bundle(*command)
    assert result.returncode == 0, result.stderr
    assert len(json.loads((out / "datalist.json").read_text())["test"]) == 3
    moved = source.rename(tmp_path / "others")
    result = run_bundle(*command[:4], moved, *command[5:])
    assert result.returncode == 2 and "lists scans that are not of" in result.stderr.splitlines()[-1], result.stderr
    moved.rename(source)
    assert all(f.stat().st_mtime_ns == t for f, t in before.items())

    result = run_bundle(*command, "--curvature_flow", 2)
    assert result.returncode == 0, result.stderr
    assert all(f.stat().st_mtime_ns != t for f, t in before.items())  # other settings: done again


def test_nothing_to_prepare_is_said(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match="nothing matches"):
        prepare_cohort(Recipe({"t1": "{subject}.nii"}), tmp_path / "in", tmp_path / "out", lambda x: x)
    with pytest.raises(InputError, match="lies in the source folder"):
        prepare_cohort(Recipe({"t1": "{subject}.nii"}), tmp_path, tmp_path / "out", lambda x: x)


def test_a_record_follows_its_scan(tmp_path):
    scan = {
        "subject": "a",
        "person": "a",
        "contrast": "t1",
        "image": str(write_nifti(tmp_path / "raw/a.nii", np.ones((5, 5, 5)))),
    }
    prepare = Preparation(tmp_path / "out", dict)
    write_nifti(tmp_path / "out/images/a_t1.nii.gz", np.ones((5, 5, 5)))
    item = {"image": "images/a_t1.nii.gz", "subject": "a", "person": "a", "source": {"image": "../raw/a.nii"}}
    write_json(tmp_path / "out/records/a_t1.json", {"item": item, "made_from": prepare._made_from(scan)})
    assert prepare.record({**scan, "person": "anna"})["item"] == {**item, "person": "anna"}
    (tmp_path / "denoised").mkdir()
    other = Path(shutil.copy2(scan["image"], tmp_path / "denoised/a.nii"))  # of the same size and time
    assert prepare.record({**scan, "image": str(other)}) == {}
    Path(scan["image"]).unlink()  # now it has moved
    assert prepare.record({**scan, "image": str(other)})["item"]["source"] == {"image": "../denoised/a.nii"}


def test_linked_folders_are_looked_into_and_counts_are_told(tmp_path, capsys):
    touch(tmp_path, "there/s2/t1.nii", "in/s1/t1.nii", "in/s1/mask.nii")
    (tmp_path / "in/s2").symlink_to(tmp_path / "there/s2")
    recipe = Recipe({"t1": "{subject}/t1.nii"}, brain_mask="{subject}/mask.nii", splits={"test": "rest"})
    assert [scan["subject"] for scan in find_scans(recipe, tmp_path / "in")] == ["s1", "s2"]
    with pytest.raises(InputError, match="2 of 2 scans failed"):
        prepare_cohort(recipe, tmp_path / "in", tmp_path / "out", dict, num_workers=0)
    assert "in: 2 scans, 1 with a brain_mask" in capsys.readouterr().out


def test_the_recipes_contrast_chooses_among_series(tmp_path):
    seen = {}

    def chain(data):
        seen.update(data)
        raise InputError("seen")

    scan = {"subject": "a", "person": "a", "contrast": "t2", "image": str(tmp_path)}
    with pytest.raises(InputError, match="seen"):
        Preparation(tmp_path, chain)(scan)
    assert seen == {"image": str(tmp_path), "contrast": "t2"}


def test_links_within_a_cohort_and_to_a_dataset_change_nothing(tmp_path):
    touch(tmp_path, *(f"raw/sub-0{k}/T1.nii" for k in (1, 2)))
    (tmp_path / "raw/latest").symlink_to(tmp_path / "raw/sub-02")
    recipe = Recipe({"t1": "{subject}/T1.nii"})
    found = find_scans(recipe, tmp_path / "raw")
    assert [scan["subject"] for scan in found] == ["sub-01", "sub-02"]
    (tmp_path / "far/away/out").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "far/away/out")
    for folder in ("far/away/out", "out"):
        prepare = Preparation(tmp_path / folder, dict)
        item = {
            "image": "images/a.nii.gz",
            "source": {"image": os.path.relpath(found[0]["image"], tmp_path / "far/away/out")},
        }
        write_nifti(tmp_path / folder / item["image"], np.ones((3, 3, 3)))
        write_json(
            tmp_path / folder / "records/sub-01_t1.json", {"item": item, "made_from": prepare._made_from(found[0])}
        )
        assert prepare.record(found[0])["item"]["image"] == item["image"]

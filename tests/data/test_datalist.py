import json
import os
import warnings

import pytest

from bundle.data import evaluation_items, list_scans, load_datalist
from bundle.data.datalist import CHAIN, write_item
from bundle.errors import InputError


def dataset(folder, content, files=(), prepared=True):
    """A dataset whose items say that they are prepared."""
    if prepared and isinstance(content, dict):
        for item in (i for items in content.values() for i in items if isinstance(i, dict)):
            item.setdefault("prepared", True)
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("")
    (folder / "datalist.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_items_get_absolute_paths_and_keep_what_is_unknown(tmp_path):
    items = [{"image": "i/a.nii.gz", "brain_mask": "m/a.nii.gz", "label": None, "age": 40, "contrast": "t1"}]
    dataset(tmp_path, {"test": items}, ["i/a.nii.gz", "m/a.nii.gz"])
    (item,) = load_datalist(tmp_path, "test", "t1")
    assert item == {
        "image": str(tmp_path / "i/a.nii.gz"),
        "brain_mask": str(tmp_path / "m/a.nii.gz"),
        "age": 40,
        "contrast": "t1",
        "prepared": True,
        "name": "a",
    }


def test_contrasts_are_told_apart(tmp_path):
    items = [{"image": "a.nii", "contrast": "t1"}, {"image": "b.nii", "contrast": "t2"}, {"image": "c.nii"}]
    dataset(tmp_path, {"test": items}, ["a.nii", "b.nii", "c.nii"])
    assert [i["name"] for i in load_datalist(tmp_path, "test", "t2")] == ["b", "c"]
    assert len(load_datalist(tmp_path, "test")) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2", "cannot be read"),
        ([1, 2], "object"),
        ({"test": {}}, "list of items"),
        ({"test": ["a.nii"]}, "item 0 of 'test' has no path"),
        ({"test": [{"image": 3}]}, "item 0 of 'test' has no path"),
        ({"test": [{"image": "gone.nii"}]}, r"gone\.nii: not found"),
        ({"test": [{"image": "a.nii", "label": ["a.nii"]}]}, "'label' must be one path"),
        ({"training": [{"image": "a.nii"}]}, "no item of.*'test'; it holds {'training': 1}"),
        ({"test": [{"image": "a.nii", "contrast": "t2"}]}, "contrast 't1'"),
        ({"test": [{"image": "a.nii", "fusion_maps": ["a.nii"]}]}, "'fusion_maps' must give a path for each name"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, content, message):
    dataset(tmp_path, content, ["a.nii"])
    with pytest.raises(InputError, match=message):
        load_datalist(tmp_path, "test", "t1")


def test_required_keys_are_named(tmp_path):
    dataset(tmp_path, {"test": [{"image": "a.nii", "label": "a.nii", "age": None}, {"image": "a.nii"}]}, ["a.nii"])
    with pytest.raises(InputError, match="item 1 of 'test' has no 'label'"):
        load_datalist(tmp_path, "test", require=["label"])


def test_only_what_says_so_is_prepared(tmp_path):
    """A list that others wrote holds scans like any other; what an older chain prepared is refused."""
    dataset(tmp_path, {"test": [{"image": "a.nii"}]}, ["a.nii"], prepared=False)
    assert list_scans(tmp_path)[0]["prepared"] is False
    with pytest.raises(InputError, match="not prepared; run the preparation"):
        load_datalist(tmp_path, "test")
    for ours in ({"chain": CHAIN}, {"chain": CHAIN, "atlas_overlap": 0.95}, {"prepared": True}):
        dataset(tmp_path, {"test": [{"image": "a.nii", **ours}]}, prepared=False)
        assert load_datalist(tmp_path, "test")[0]["prepared"] is True
    for old in ({"chain": CHAIN - 1}, {"atlas_overlap": 0.95}, {"chain": CHAIN - 1, "prepared": True}):
        dataset(tmp_path, {"test": [{"image": "a.nii", **old}]}, prepared=False)
        for read in (lambda: list_scans(tmp_path), lambda: load_datalist(tmp_path, "test")):
            with pytest.raises(InputError, match="older version; run the preparation again"):
                read()


def test_missing_dataset_is_named(tmp_path):
    with pytest.raises(InputError, match="prepared dataset"):
        load_datalist(tmp_path / "nowhere", "test")
    with pytest.raises(InputError, match=r"datalist\.json"):
        load_datalist(tmp_path, "test")


def test_a_folder_of_scans_with_their_companions(tmp_path):
    names = ["a.nii.gz", "a_brain_mask.nii.gz", "a_lesion.nii.gz", "sub/a.nii", "sub/b_mask.nii", "notes.txt"]
    names += ["out/a/a_heatmap.nii.gz", "out/a/a_lesion.nii.gz", "out/a/a_coverage.nii.gz"]
    names += ["._a.nii.gz", ".partial-x/c.nii.gz"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    scans = {s["name"]: s for s in list_scans(tmp_path)}
    # two scans called a are told apart by their folders; a mask without a scan of its name is taken for a scan
    assert set(scans) == {f"{tmp_path.name}_a", "sub_a", "sub_b_mask"}
    first = scans[f"{tmp_path.name}_a"]
    assert first["brain_mask"].endswith("a_brain_mask.nii.gz") and first["label"].endswith("a_lesion.nii.gz")


def test_links_and_other_formats_are_told(tmp_path):
    folder, away = tmp_path / "scans", tmp_path / "away"
    for name in ("scans/a.nii.gz", "scans/old.mgz", "scans/older.img", "scans/oldest.hdr", "away/b.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (folder / "linked").symlink_to(away)
    (away / "loop").symlink_to(folder)
    (folder / "annexed.nii.gz").symlink_to("nowhere")
    with pytest.warns(UserWarning, match=r"older\.img: not read, like 2 such files"):
        scans = list_scans(folder)
    assert [s["name"] for s in scans] == ["a", "annexed", "b", "old"]


def test_names_that_cannot_be_written_are_made_so(tmp_path):
    names = [os.fsdecode(b"caf\xe9"), os.fsdecode(b"caf\xe8"), "ü" * 120, "ü" * 119 + "u", "line\nbreak"]
    for name in names:
        (tmp_path / f"{name}.nii").write_text("")
    scans = {s["image"]: s["name"] for s in list_scans(tmp_path)}
    assert len(set(scans.values())) == 5 and set(scans) == {str(tmp_path / f"{n}.nii") for n in names}
    assert all(len(name.encode()) < 170 for name in scans.values()) and "line\nbreak" in scans.values()


def test_subjects_are_no_paths(tmp_path):
    with pytest.raises(InputError, match=r"\.\./x"):
        write_item(tmp_path / "a", "../x", "t1", {}, None)


def test_single_file_mask_and_prepared_dataset(tmp_path):
    dataset(tmp_path, {"test": [{"image": "x.nii"}]}, ["x.nii", "m.nii"])
    assert list_scans(tmp_path)[0]["prepared"] is True
    (scan,) = list_scans(tmp_path / "x.nii", brain_mask=tmp_path / "m.nii")
    assert scan["brain_mask"].endswith("m.nii") and "prepared" not in scan


@pytest.mark.parametrize(
    ("path", "mask", "message"),
    [
        ("gone", None, "not found"),
        ("notes.txt", None, "not a scan; it must be NIfTI"),
        ("empty", None, "no scan in it"),
        ("a.nii", "gone.nii", r"gone\.nii: brain mask not found"),
        ("two", "a.nii", "cannot serve 2 scans"),
        ("twice", None, "keep one of the two"),
    ],
)
def test_what_cannot_be_run_is_named(tmp_path, path, mask, message):
    for name in ("a.nii", "notes.txt", "two/b.nii", "two/c.nii", "twice/b.nii", "twice/b.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        list_scans(tmp_path / path, mask and tmp_path / mask)


def test_other_methods_maps_are_found_or_named(tmp_path):
    """In a folder by the scan's name, or in the item itself, which goes first."""
    own = {"image": "b.nii.gz", "fusion_maps": {"diffusion": "own.nii.gz"}}
    files = ["a.nii.gz", "b.nii.gz", "own.nii.gz", "maps/a.nii", "maps/b.nii.gz"]
    dataset(tmp_path, {"test": [{"image": "a.nii.gz"}, own]}, files)
    maps = {"diffusion": str(tmp_path / "maps")}
    found = [item["diffusion"] for item in load_datalist(tmp_path, "test", maps=maps)]
    assert found == [str(tmp_path / "maps/a.nii"), str(tmp_path / "own.nii.gz")]
    assert all("fusion_maps" not in item for item in load_datalist(tmp_path, "test"))
    with pytest.raises(InputError, match=r"a.nii.gz: its map 'diffusion' is not there \('fusion_maps' of its item"):
        load_datalist(tmp_path, "test", maps={"diffusion": ""})
    (scan,) = list_scans(tmp_path / "a.nii.gz", maps=maps)
    assert scan["diffusion"].endswith("maps/a.nii")
    with pytest.raises(InputError, match="its map 'other' is not there"):
        list_scans(tmp_path / "a.nii.gz", maps={"other": str(tmp_path / "nowhere")})


def test_an_evaluation_has_test_tuning_and_healthy_scans(tmp_path):
    label = {"label": "a.nii", "contrast": "t1"}
    lists = {"test": [{"image": "a.nii", **label}], "tuning": [{"image": "b.nii", **label}]}
    dataset(tmp_path, lists, ["a.nii", "b.nii"])
    (tmp_path / "healthy").mkdir()
    dataset(tmp_path / "healthy", {"validation": [{"image": "c.nii"}]}, ["c.nii"])
    items = evaluation_items(tmp_path, "test", "t1", healthy_dir=tmp_path / "healthy")
    assert [(i["name"], i["purpose"]) for i in items] == [("a", "test"), ("b", "tuning"), ("c", "healthy")]
    assert [i["purpose"] for i in evaluation_items(tmp_path, "tuning", "t1")] == ["test"]
    dataset(tmp_path, {**lists, "tuning": [{"image": "b.nii", "contrast": "t2"}]})
    assert [i["purpose"] for i in evaluation_items(tmp_path, "test", "t1")] == ["test"]
    dataset(tmp_path, {**lists, "tuning": [{"image": "b.nii"}]})
    with pytest.raises(InputError, match="item 0 of 'tuning' has no 'label'"):
        evaluation_items(tmp_path, "test", "t1")
    assert evaluation_items("", "test", "t1") == []


def test_an_image_in_two_sections_is_told(tmp_path):
    for name in ("a.nii", "b.nii"):
        (tmp_path / name).touch()
    items = {
        name: [{"image": f"{file}.nii", "prepared": True}] for name, file in (("training", "a"), ("calibration", "a"))
    }
    (tmp_path / "datalist.json").write_text(json.dumps({**items, "test": [{"image": "b.nii", "prepared": True}]}))
    with pytest.warns(UserWarning, match="1 of the images of 'calibration' are in 'training', too"):
        load_datalist(tmp_path, "calibration")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_datalist(tmp_path, "test")

import pytest

from bundle.data import Recipe, load_recipe, split_people
from bundle.data.splits import listed_sections, person_of, read_splits
from bundle.errors import InputError
from tests.conftest import ROOT


def write(folder, **lists):
    for name, rows in lists.items():
        table = "".join(f"{k},{name},{label},x\n" for k, (name, label) in enumerate(rows.items()))
        (folder / f"{name}.csv").write_text(",img_name,label,age\n" + table)
    return folder


@pytest.mark.parametrize(
    ("dataset", "listed", "person"),
    [
        ("ixi", "IXI002-Guys-0828_t2.nii.gz", "IXI002"),
        ("ixi", "IXI012-HH-1211-T1.nii.gz", "IXI012"),
        ("ixi", "IXI012-HH-1211", "IXI012"),
        ("wmh", "Singapore_64_t1.nii.gz", "64"),
        ("wmh", "GE3T_137_t1", "137"),
        ("mslub", "patient26", "patient26"),
        ("mslub", "folder/patient26_FLAIR.nii", "patient26"),
        ("brats21", "BraTS2021_00538", "BraTS2021_00538"),
        ("atlas_v2", "sub-r009s085", "sub-r009s085"),
    ],
)
def test_names_in_lists_are_those_of_people(dataset, listed, person):
    recipe = load_recipe(ROOT / "configs/datasets", dataset)
    assert person_of(listed, recipe.person) == person


def test_a_folder_of_all_cohorts_gives_those_of_one(tmp_path):
    write(
        tmp_path,
        IXI_train_fold0={"a": 0, "b": 0},
        IXI_train_fold1={"a": 0, "c": 0},
        IXI_val_fold0={"c": 0},
        IXI_val_fold1={"b": ""},
        IXI_test={"d_t1.nii.gz": 0},
        MSLUB_val={"e": 1},
        MSLUB_test={"f": 1.0},
        avail_t2={"g": 0},
    )
    assert read_splits(tmp_path, "ixi") == {"a": "training", "b": "training", "c": "validation", "d": "test"}
    assert read_splits(tmp_path, "ixi_dlmuse", fold=1)["b"] == "validation"
    assert read_splits(tmp_path, "mslub") == {"e": "tuning", "f": "test"}
    assert read_splits(tmp_path / "IXI_train_fold1.csv", "mine") == {"a": "training", "c": "training"}
    with pytest.raises(InputError, match=r"no list of 'ixi' \(fold 7\)"):
        read_splits(tmp_path, "ixi", fold=7)
    with pytest.raises(InputError, match=r"no list of 'wmh' \(fold 0\); lists are named like wmh_test.csv"):
        read_splits(tmp_path, "wmh")
    for name in ("avail_t2.csv", "nobody.csv"):
        with pytest.raises(InputError, match=r"tells no section|not found"):
            read_splits(tmp_path / name, "ixi")
    write(tmp_path, test={"a": 0})  # of any cohort
    with pytest.raises(InputError, match="a is in 'training' too"):
        read_splits(tmp_path, "ixi")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "needs the columns"),
        (b"img_name,age\na,3\n", "needs the columns"),
        (b"img_name,label\na,healthy\n", "line 2: label 'healthy' is no number"),
        (b"img_name,label\na,1\n ,1\n", "line 3 has no img_name"),
        (b"img_name,label\n\xe9,1\n", "cannot be read"),
    ],
)
def test_what_is_no_list_gets_one_line(tmp_path, content, message):
    (tmp_path / "x_test.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_splits(tmp_path / "x_test.csv", "x")


def test_missing_people_are_named_and_others_counted(tmp_path, capsys):
    recipe = load_recipe(ROOT / "configs/datasets", "mslub")
    write(tmp_path, MSLUB_test={f"patient{k:02}": 1 for k in range(1, 6)})
    with pytest.raises(
        InputError, match=r"4 of 5 listed subjects were not found \(patient02, patient03, patient04, ...\)"
    ):
        listed_sections(tmp_path, "mslub", recipe, ["patient01", "patient26"])
    everyone = [f"patient{k:02}" for k in range(1, 8)]
    assert set(listed_sections(tmp_path, "mslub", recipe, everyone)) == set(everyone[:5])
    assert "2 subjects are in none of its lists" in capsys.readouterr().out


def test_who_has_a_section_keeps_it(capsys):
    recipe = Recipe({"t1": "{subject}.nii"}, splits={"validation": 2, "calibration": 3, "training": "rest"})
    people = [f"p{k}" for k in range(12)]
    before = split_people(recipe, people)
    after = split_people(recipe, [*people, "q1", "q2"], known=before)
    assert {person: after[person] for person in people} == before and after["q1"] == after["q2"] == "training"
    gone = next(person for person in people if before[person] == "validation")
    after = split_people(recipe, [*(p for p in people if p != gone), "q1"], known=before)
    assert after == {**{p: s for p, s in before.items() if p != gone}, "q1": "validation"}
    assert not capsys.readouterr().out
    other = Recipe({"t1": "{subject}.nii"}, splits={"validation": 1, "training": "rest"})
    assert split_people(other, people, known=before) == split_people(other, people)
    assert "people are in another section than before" in capsys.readouterr().out

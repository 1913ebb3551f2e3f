import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from bundle.data import list_scans, list_visits
from tests.conftest import write_dicom


def visits(folder, *files):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"")
    found = list_visits(list_scans(folder, contrast="auto"))
    return {v["name"]: sorted(Path(s["image"]).name.partition(".")[0] for s in v["scans"]) for v in found}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("anna/t1.nii.gz", "anna/t2.nii", "anna/flair.mha", "anna/lesion.nii"), {"anna": ["flair", "t1", "t2"]}),
        (("anna_T1w.nii", "bob_T1w.nii", "bob_FLAIR.nii"), {"bob": ["bob_FLAIR", "bob_T1w"]}),
        (("a/T1.nii", "a/FLAIR.nii", "b/T1.nii", "b/T2.nii"), {"a": ["FLAIR", "T1"], "b": ["T1", "T2"]}),
        (("x/a/T1.nii", "x/a/T2.nii", "y/a/T1.nii", "y/a/T2.nii"), {"x_a": ["T1", "T2"], "y_a": ["T1", "T2"]}),
        (("bob_t2_tse_tra.nii", "bob_t1_mprage.nii"), {"bob": ["bob_t1_mprage", "bob_t2_tse_tra"]}),
        (("T1/bob.nii", "FLAIR/bob.nii"), {}),  # nothing says that they are of one day
        (("anna_T1w.nii", "bob_FLAIR.nii"), {}),
        (("bob_T1w.nii", "bob_t1_gd.nii"), {}),
        (("one.nii", "two.nii"), {}),
        (("bob_T1w.nii", "bob_T1_mprage.nii"), {}),
    ],
)
def test_a_folders_visits_carry_one_name_and_several_contrasts(tmp_path, files, expected):
    folder = tmp_path / "scans"
    assert visits(folder, *files) == {f"{name}_combined": scans for name, scans in expected.items()}
    assert list_visits(list_scans(folder, contrast="auto"), combine=False) == []


def test_points_of_time_and_numbers_are_no_contrasts(tmp_path):
    names = [f"anna_T{time}_{contrast}.nii" for time in (1, 2) for contrast in ("FLAIR", "T1w")]
    found = visits(tmp_path / "times", *names)
    assert found == {f"anna_T{t}_combined": [f"anna_T{t}_FLAIR", f"anna_T{t}_T1w"] for t in (1, 2)}
    assert visits(tmp_path / "people", "T1001.nii", "T2003.nii") == {}
    assert len(visits(tmp_path / "planes", "ax_t2_flair.nii", "sag_t2_flair.nii", "t1.nii")) == 1
    assert visits(tmp_path / "order", "anna_FLAIR_T2.nii", "anna_T2.nii") == {
        "anna_combined": ["anna_FLAIR_T2", "anna_T2"]
    }
    found = visits(tmp_path / "usual", "bob_t1.nii", "bob_t2.nii", "bob_t2_flair.nii")
    assert found == {"bob_combined": ["bob_t1", "bob_t2", "bob_t2_flair"]}


def test_a_file_called_lesion_is_the_label_of_its_folder(tmp_path):
    visits(tmp_path, "a/t1.nii", "a/flair.nii", "a/lesion.nii", "b/lesion.nii", "c/t1.nii")
    labels = {Path(s["image"]).relative_to(tmp_path).as_posix(): s.get("label") for s in list_scans(tmp_path)}
    told = str(tmp_path / "a/lesion.nii")
    assert labels == {"a/t1.nii": told, "a/flair.nii": told, "b/lesion.nii": None, "c/t1.nii": None}


def test_bids_sessions_are_visits(tmp_path):
    (tmp_path / "dataset_description.json").write_text("{}")
    scans = [f"sub-1/ses-{s}/anat/sub-1_ses-{s}_{c}.nii.gz" for s, c in (("a", "T1w"), ("a", "FLAIR"), ("b", "T1w"))]
    found = visits(tmp_path, *scans, "sub-2/anat/sub-2_acq-x_T1w.nii.gz", "sub-2/anat/sub-2_run-2_T2w.nii.gz")
    assert found == {
        "sub-1_ses-a_combined": ["sub-1_ses-a_FLAIR", "sub-1_ses-a_T1w"],
        "sub-2_combined": ["sub-2_acq-x_T1w", "sub-2_run-2_T2w"],
    }


def test_dicom_series_of_one_study_are_a_visit(tmp_path):
    import pydicom

    for series in ("anna/S1", "anna/S2", "anna/S3"):
        write_dicom(tmp_path / series, np.zeros((4, 4, 4), int), np.eye(4))
    first = pydicom.dcmread(next((tmp_path / "anna/S1").iterdir()))
    for file in (tmp_path / "anna/S2").iterdir():
        other = pydicom.dcmread(file)
        other.StudyInstanceUID = first.StudyInstanceUID
        other.save_as(file)
    assert visits(tmp_path) == {"anna_combined": ["S1", "S2"]}
    shutil.copytree(tmp_path / "anna/S3", tmp_path / "anna/S4")  # and of another study of hers
    found = visits(tmp_path)
    assert sorted(found.values()) == [["S1", "S2"], ["S3", "S4"]]
    assert all(re.fullmatch("anna_[0-9a-f]{8}_combined", name) for name in found)
    shutil.rmtree(tmp_path / "anna/S4")
    shutil.rmtree(tmp_path / "anna/S2")
    assert visits(tmp_path) == {}


def test_prepared_items_and_taken_names_are_left_alone(tmp_path):
    scans = [{"name": n, "image": str(tmp_path / f"{n}.nii")} for n in ("a_t1", "a_t2", "a_combined")]
    assert list_visits(scans) == [] and len(list_visits(scans[:2])) == 1
    assert list_visits([{**scan, "prepared": True} for scan in scans[:2]]) == []

import json
from pathlib import Path

import pytest

from bundle.data import list_scans
from bundle.data.bids import begin_derivative, find_bids_scans, is_bids, result_path
from bundle.errors import InputError


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_scans_are_found_by_suffix_and_nothing_else_is(tmp_path):
    folder = tmp_path / "a [1]"  # characters that patterns of files mean otherwise
    wanted = [
        *("sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz", "sub-01/ses-1/anat/sub-01_ses-1_run-2_FLAIR.nii"),
        *("sub-01/ses-2/anat/sub-01_ses-2_T2w.nii.gz", "sub-02/anat/sub-02_desc-preproc_T1w.nii.gz"),
    ]
    others = [
        *("derivatives/x/sub-01/anat/sub-01_T1w.nii.gz", "sub-01/ses-1/func/sub-01_ses-1_task-a_bold.nii.gz"),
        *("sub-01/ses-1/anat/sub-01_ses-1_T1w.json", "sub-01/ses-1/anat/sub-01_ses-1_ce-gd_T1w.nii.gz"),
        *("sub-02/anat/sub-02_T2star.nii.gz", "sub-02/anat/sub-02_desc-heatmap_T1w.nii.gz", "sub-02/anat/T1w.nii.gz"),
        *("sub-02/anat/sub-02_desc-lesionT1w_mask.nii.gz", "sourcedata/sub-03/anat/sub-03_T1w.nii.gz"),
    ]
    touch(folder, *wanted, *others, "dataset_description.json")
    with pytest.warns(UserWarning, match="1 scans with a contrast agent"):
        scans = find_bids_scans(folder)
    assert [s["bids"] for s in scans] == sorted(wanted) and is_bids(folder)
    assert all(Path(s["image"]) == folder / s["bids"] for s in scans)
    about = [(s["subject"], s.get("session"), s["contrast"], s["name"]) for s in scans]
    assert about == [
        ("sub-01", "ses-1", "t1", "sub-01_ses-1_T1w") if "T1w" in s else ("sub-01", "ses-1", "flair", Path(s).stem)
        for s in sorted(wanted)[:2]
    ] + [("sub-01", "ses-2", "t2", "sub-01_ses-2_T2w"), ("sub-02", None, "t1", "sub-02_desc-preproc_T1w")]
    assert [s["contrast"] for s in list_scans(folder, contrast="t1")] == ["t1", "t1"]
    assert len(list_scans(folder, contrast="auto")) == 4
    touch(tmp_path, "empty/dataset_description.json", "empty/a_t1.nii.gz")
    with pytest.raises(InputError, match="a BIDS dataset without a T1w, T2w or FLAIR scan"):
        list_scans(tmp_path / "empty", contrast="auto")
    with pytest.raises(InputError, match="without a scan of contrast 'flair'"):
        list_scans(tmp_path / "empty", contrast="flair")


def test_of_scans_whose_results_would_share_a_place_one_is_taken(tmp_path):
    names = ("sub-1_T1w.nii", "sub-1_T1w.nii.gz", "sub-1_desc-brain_T1w.nii.gz", "sub-1_run-2_T1w.nii.gz")
    touch(tmp_path, *(f"sub-1/anat/{name}" for name in names), "sub-2/anat/sub-2_desc-preproc_T1w.nii.gz")
    with pytest.warns(
        UserWarning, match=r"left out.*: sub-1/anat/sub-1_T1w\.nii, sub-1/anat/sub-1_desc-brain_T1w\.nii\.gz"
    ):
        scans = find_bids_scans(tmp_path)
    assert [Path(s["bids"]).name for s in scans] == [names[1], names[3], "sub-2_desc-preproc_T1w.nii.gz"]


def test_places_of_results(tmp_path):
    assert result_path(tmp_path, "sub-1_T1w", "lesion.nrrd") == tmp_path / "sub-1_T1w/sub-1_T1w_lesion.nrrd"
    touch(tmp_path, "dataset_description.json")
    places = {
        ("sub-1_T1w", "lesion.nii.gz"): "sub-1/anat/sub-1_desc-lesionT1w_mask.nii.gz",
        ("sub-1_ses-b_acq-x_run-2_FLAIR", "heatmap.nii.gz"): (
            "sub-1/ses-b/anat/sub-1_ses-b_acq-x_run-2_desc-heatmap_FLAIR.nii.gz"
        ),
        ("sub-1_desc-preproc_T2w", "coverage.json"): "sub-1/anat/sub-1_desc-coverageT2w_dseg.json",
        ("sub-1_T2w", "report.html"): "sub-1/anat/sub-1_desc-lesionT2w_report.html",
        ("other", "report.html"): "other/other_report.html",
    }
    for (name, what), place in places.items():
        assert result_path(tmp_path, name, what) == tmp_path / place


@pytest.mark.parametrize("content", ["{}", "[]", '{"GeneratedBy": [{"Name": "fmriprep"}, 3]}', '{"GeneratedBy": null}'])
def test_datasets_of_others_stay(tmp_path, content):
    (tmp_path / "dataset_description.json").write_text(content)
    with pytest.raises(InputError, match="is a dataset that others made"):
        begin_derivative(tmp_path, "../raw")
    assert [f.name for f in tmp_path.iterdir()] == ["dataset_description.json"]


def test_a_derivative_is_begun_once(tmp_path):
    begin_derivative(tmp_path, "../raw")
    before = (tmp_path / "dataset_description.json").read_text()
    begin_derivative(tmp_path, "../other")
    assert (tmp_path / "dataset_description.json").read_text() == before
    assert json.loads(before)["DatasetLinks"] == {"raw": "../raw"}

import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from bundle.errors import InputError
from bundle.reports import CombineVisits
from bundle.scoring import combine_contrasts
from tests.conftest import ellipsoid, write_nifti

THRESHOLDS = {"t1": 3.0, "t2": 6.0, "flair": 4.0}
SHAPE, AFFINE = (30, 36, 26), np.diag([5.0, 5.0, 5.0, 1.0])
BRAIN = ellipsoid(SHAPE, (12, 15, 10)) > 0
PLACES = {"here": np.s_[8:11, 15:18, 12:15], "there": np.s_[18:22, 16:19, 10:13]}


def scan(folder, contrast, lesions, affine=AFFINE, turned=False):
    """A scan and its answer: ``lesions`` is place -> score in thresholds; the rest of the brain has score 0.1."""
    rng = np.random.default_rng(0)
    texture = ndimage.gaussian_filter(rng.normal(size=SHAPE), 1.5) + ndimage.gaussian_filter(BRAIN * 1.0, 2)
    score, found = np.where(BRAIN, 0.1, 0.05), np.zeros(SHAPE)
    for place, value in lesions.items():
        score[PLACES[place]], found[PLACES[place]] = value, value > 1
    volumes = {"heatmap": score * THRESHOLDS[contrast], "lesion": found, "coverage": BRAIN}
    files = {f"out/{contrast}/{contrast}_{kind}.nii.gz": v for kind, v in volumes.items()}
    files[f"{contrast}.nii.gz"] = np.where(BRAIN, texture - texture.min() + 1, 0)
    for name, volume in files.items():
        if turned:
            volume = np.transpose(np.asarray(volume, float)[::-1], (2, 0, 1))
        write_nifti(folder / name, volume, affine)
    item = {"name": contrast, "image": str(folder / f"{contrast}.nii.gz")}
    return item, {"name": contrast, "contrast": contrast, "status": "ok", "not_examined_percent": "0.4"}


def combiner(*visits):
    find = SimpleNamespace(threshold=lambda contrast: THRESHOLDS[contrast], score="fusion", min_lesion_mm3=50.0)
    return CombineVisits(visits, find, lambda data: data)


def test_an_answer_is_the_rule_on_the_leading_scans_voxels(tmp_path):
    """The other scan has its axes in another order, and the same places in the world."""
    turn = np.array([[0, -1, 0, SHAPE[0] - 1], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    parts = {
        "t2": scan(tmp_path, "t2", {"here": 1.2, "there": 1.5}, AFFINE @ turn, turned=True),
        "flair": scan(tmp_path, "flair", {"here": 2.0}),
    }
    parts["t2"][1]["status"] = "flagged: lies badly"
    file = parts["flair"][0]["image"]
    image = nib.load(file).get_fdata()
    image[12, 15, 10] = np.nan  # which the scan's own answer fills
    write_nifti(tmp_path / "flair.nii.gz", image, AFFINE)
    answer = combiner().answer(tmp_path / "out", "anna_combined", parts)
    assert answer["contrasts"] == ["flair", "t2"] and answer["flags"] == "t2: lies badly"
    scores, found = {}, {}
    for contrast, lesions in (("flair", {"here": 2.0}), ("t2", {"here": 1.2, "there": 1.5})):
        scores[contrast], found[contrast] = np.where(BRAIN, 0.1, 0.05), np.zeros(SHAPE, bool)
        for place, value in lesions.items():
            scores[contrast][PLACES[place]], found[contrast][PLACES[place]] = value, True
    combined, mask = combine_contrasts(scores, found, dict.fromkeys(scores, BRAIN), "flair")
    np.testing.assert_allclose(answer["heatmap"][0].numpy()[BRAIN], 4 * combined[BRAIN], rtol=1e-3)
    assert (answer["heatmap"][0].numpy()[~BRAIN] == answer["heatmap"].min().item()).all()
    np.testing.assert_array_equal(answer["lesion"][0].numpy() > 0, mask)
    result = answer["result"]
    assert [f["seen_in"] for f in result["lesions"]] == [["flair", "t2"], ["t2"]]
    assert result["threshold"] == 4.0 and result["not_examined_percent"] == 0.4
    assert result["lesion_volume_ml"] == pytest.approx(mask.sum() * 0.125)


def test_a_head_that_moved_between_the_scans_is_brought_back(tmp_path):
    moved = AFFINE.copy()
    moved[:3, 3] += (15, -20, 10)
    parts = {"flair": scan(tmp_path, "flair", {"here": 2.0}), "t1": scan(tmp_path, "t1", {"there": 1.2}, moved)}
    lesion = combiner().answer(tmp_path / "out", "x", parts)["lesion"][0].numpy() > 0
    assert lesion[PLACES["here"]].all() and lesion[PLACES["there"]].mean() > 0.6
    assert lesion.sum() == pytest.approx(27 + 36, abs=3)


def test_scans_of_two_heads_and_thresholds_below_zero_are_refused(tmp_path):
    parts = {"flair": scan(tmp_path, "flair", {"here": 2.0}), "t1": scan(tmp_path, "t1", {})}
    write_nifti(tmp_path / "out/t1/t1_coverage.nii.gz", ellipsoid(SHAPE, (4, 15, 4)), AFFINE)
    with pytest.raises(InputError, match=r"t1.nii.gz and .*flair.nii.gz: brains overlap by .* of one person"):
        combiner().answer(tmp_path / "out", "x", parts)
    combine = combiner()
    combine.find_lesions.threshold = lambda contrast: 0.0
    with pytest.raises(InputError, match="must be above 0; change --threshold"):
        combine.answer(tmp_path / "out", "x", parts)


def test_what_is_combined_and_when(tmp_path, monkeypatch):
    """Rows in, rows out: only visits of several answered contrasts, once, and again when an answer is new."""
    out, made = tmp_path / "out", []
    (t1, row1), (t2, row2) = scan(tmp_path, "t1", {}), scan(tmp_path, "t2", {})
    broken = {"name": "flair", "image": "flair.nii.gz"}, {"name": "flair", "status": "failed: not there"}
    combine = combiner({"name": "anna_combined", "scans": [t1, t2, broken[0]]})
    answer = {"flags": "", "contrasts": ["t2", "t1"]}
    monkeypatch.setattr(combine, "answer", lambda _, name, parts: made.append(sorted(parts)) or answer)

    def run(*rows, fails=False, setting=1, combine=combine):
        def write(name, _):
            if fails:
                raise ValueError("no\nroom")
            write_nifti(out / name / f"{name}_heatmap.nii.gz", np.ones((2, 2, 2)))
            return {"contrast": "t2+t1", "lesions": 0, "lesion_volume_ml": "0.00"}

        return combine(SimpleNamespace(output_dir=out, write_scan=write, facts={"threshold": setting}), rows)

    assert run(row1, row2) == [] and not made  # the third scan is still to come
    rows = run(row1, row2, broken[1])
    assert [(r["name"], r["contrast"], r["status"]) for r in rows] == [("anna_combined", "t2+t1", "ok")]
    assert run(row1, row2, broken[1]) == rows and made == [["t1", "t2"]]
    assert json.loads((out / "run.json").read_text())["combination"]["visits"]["anna_combined"]["row"] == rows[0]
    assert run(combine=combiner()) == rows and run(combine=combiner(), setting=2) == []
    write_nifti(out / "t1/t1_heatmap.nii.gz", np.zeros((3, 3, 3)))
    (row,) = run(row1, row2, broken[1], fails=True)
    assert row["status"] == "failed: ValueError: no room" and not (out / "anna_combined").exists()
    assert run(row1, row2, broken[1])[0]["status"] == "ok" and len(made) == 3
    assert run(row1, row2, broken[1], setting=2)[0]["status"] == "ok" and len(made) == 4
    assert run(row1, {**row2, "status": "failed: gone"}, broken[1]) == [] and not (out / "anna_combined").exists()
    assert run(row1, {**row2, "contrast": "t1"}, broken[1]) == [] and len(made) == 4


def test_a_result_that_is_gone_is_told(tmp_path):
    parts = {"flair": scan(tmp_path, "flair", {}), "t1": scan(tmp_path, "t1", {})}
    (tmp_path / "out/t1/t1_lesion.nii.gz").unlink()
    with pytest.raises(InputError, match=r"t1: its lesion is gone from .*--overwrite True"):
        combiner().answer(tmp_path / "out", "x", parts)

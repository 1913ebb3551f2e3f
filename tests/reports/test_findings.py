from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from bundle.errors import InputError
from bundle.reports import SaveFindings
from tests.conftest import meta, write_nifti


def save(folder, monkeypatch, error):
    """One scan, called a, whose results cannot be written."""
    handler = SaveFindings(str(folder), None, 1)

    def fail(*_):
        raise error

    monkeypatch.setattr(handler, "write_scan", fail)
    handler.save(SimpleNamespace(state=SimpleNamespace(batch=[{"name": "a"}], output=[{"x": 1}])))
    return handler.rows


def test_a_scan_that_cannot_be_drawn_is_a_row_and_leaves_nothing_old(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/a_lesion.nii.gz").write_text("of an earlier run")
    (row,) = save(tmp_path, monkeypatch, TypeError("no such\nletter"))
    assert row["name"] == "a" and row["status"] == "failed: TypeError: no such letter"
    assert "failed: TypeError" in (tmp_path / "summary.csv").read_text()
    assert not (tmp_path / "a").exists()


def test_what_is_not_ours_stays_when_a_scan_fails(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds files that are none"):
        save(tmp_path, monkeypatch, TypeError("no such letter"))
    assert (tmp_path / "a/notes.txt").read_text() == "mine"


def written(folder, not_examined):
    """Results of a scan of 4 x 5 x 6 voxels, and what was told to the picture."""
    affine = np.diag([2.0, 2, 3, 1])
    scan = write_nifti(folder / "scan.nii.gz", np.ones((4, 5, 6)), affine)
    coverage = np.ones((4, 5, 6))
    coverage[..., 4:] = 2
    volumes = {k: meta(np.ones((4, 5, 6)), affine) for k in ("image", "heatmap")}
    volumes["image"].meta["filename_or_obj"] = str(scan)
    result = {"lesion_volume_ml": 0.0, "lesions": [], "max_score": 1.0, "mean_score": 1.0, "threshold": 1.0}
    result["not_examined_percent"] = not_examined
    output = {**volumes, "lesion": volumes["image"] * 0, "coverage": meta(coverage, affine), "result": result}
    calibration = SimpleNamespace(load=lambda *_: SimpleNamespace(fusion=None))
    find = SimpleNamespace(calibration=calibration, score="location", threshold=lambda **_: 1.0)
    handler = SaveFindings(str(folder / "out"), find, 1)
    state = SimpleNamespace(batch=[{"name": "a"}], output=[output])
    handler.save(SimpleNamespace(state=state))
    return handler.rows[0], coverage


@pytest.mark.parametrize(
    ("percent", "text", "title"), [(3.44, "3.4", ", 3.4 % of the brain not examined"), (0.04, "0.0", "")]
)
def test_what_was_not_looked_at_is_told_and_marked(tmp_path, monkeypatch, percent, text, title):
    titles = []
    monkeypatch.setattr("bundle.reports.answer.draw_report", lambda path, title, *_: titles.append(title))
    row, coverage = written(tmp_path, percent)
    assert row["status"] == "ok" and row["not_examined_percent"] == text
    assert titles == [f"a: 0 lesions, 0.00 ml, threshold 1.00{title}"]
    header, line = (tmp_path / "out/summary.csv").read_text().splitlines()
    assert header == "name,contrast,lesion_volume_ml,lesions,max_score,mean_score,not_examined_percent,seconds,status"
    assert f",{text}," in line
    file = nib.load(tmp_path / "out/a/a_coverage.nii.gz")
    assert file.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(file.dataobj), coverage)
    written(tmp_path, percent)  # ours: may be replaced


def test_a_folder_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="No space left"):
        save(tmp_path, monkeypatch, OSError(28, "No space left on device"))

from types import SimpleNamespace

import pytest

from bundle.errors import InputError
from bundle.reports import SaveFindings


def save(folder, monkeypatch, error):
    """One scan, called a, whose results cannot be written."""
    handler = SaveFindings(str(folder), None, 1)

    def fail(*_):
        raise error

    monkeypatch.setattr(handler, "_write_scan", fail)
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


def test_a_folder_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="No space left"):
        save(tmp_path, monkeypatch, OSError(28, "No space left on device"))

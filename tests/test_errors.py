import logging
from contextlib import nullcontext

import pytest
from monai.utils import optional_import

from bundle.errors import OLDEST_MONAI, InputError, _one_line_hook, report_in_one_line
from bundle.transforms import ResampleToGrid
from tests.conftest import ROOT


def test_mistakes_and_ctrl_c_take_one_line(capsys):
    for error, line, code in (
        (InputError("a: is b", 3), "error: a: is b", 3),
        (KeyboardInterrupt(), "error: stopped; what is done is kept", 130),
    ):
        with pytest.raises(SystemExit) as ended:
            _one_line_hook(type(error), error, None)
        assert ended.value.code == code and capsys.readouterr().err == line + "\n"
    _one_line_hook(ValueError, ValueError("ours"), None)
    assert "ValueError: ours" in capsys.readouterr().err


def test_a_package_that_is_not_there_takes_one_line(capsys):
    handler, found = optional_import("nowhere.to_be_found", name="Handler")
    assert not found
    with pytest.raises(ImportError) as of_mlflow:
        handler()
    of_tensorboard = RuntimeError("X requires y to be installed. Please install it with: pip install y")
    for cause, name in ((of_mlflow.value, "nowhere"), (of_tensorboard, "pip install y")):
        error = RuntimeError("Failed to instantiate component")  # as MONAI's resolver does
        error.__cause__ = cause
        with pytest.raises(SystemExit) as ended:
            _one_line_hook(type(error), error, None)
        told = capsys.readouterr().err
        assert ended.value.code == 2 and told.startswith("error: ") and name in told and told.count("\n") == 1


def test_logs_of_mistakes_have_no_traceback(caplog, monkeypatch):
    monkeypatch.setattr("sys.excepthook", None)
    factory = logging.getLogRecordFactory()
    report_in_one_line()
    try:
        for error in (InputError("a: is b"), ValueError("ours")):
            try:
                raise error
            except Exception:
                logging.getLogger("x").exception("Exception: %s", error)
    finally:
        logging.setLogRecordFactory(factory)
    assert [record.exc_info is None for record in caplog.records] == [True, False]


@pytest.mark.parametrize(("version", "good"), [("1.5.2", False), ("1.6.0", True), ("1.10.1", True), ("2.0.0", True)])
def test_a_monai_that_resamples_wrongly_is_refused(version, good, monkeypatch):
    monkeypatch.setattr("monai.__version__", version)
    with nullcontext() if good else pytest.raises(InputError, match=r"MONAI 1\.5\.2 .*pip install 'monai>=1\.6'"):
        ResampleToGrid(2.0, (4, 4, 4), (0, 0, 0))
    assert f'"monai>={OLDEST_MONAI},<2"' in (ROOT / "pyproject.toml").read_text()

import logging

import pytest

from bundle.errors import InputError, _one_line_hook, report_in_one_line


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

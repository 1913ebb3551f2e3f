"""Mistakes a user can make, told in one line."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Hashable, Mapping
from types import TracebackType
from typing import Any

import monai
import torch
from monai.utils import OptionalImportError, version_geq

OLDEST_MONAI = "1.6"


class InputError(Exception):
    """Something the user gave is wrong. The message names the file (or setting) and the remedy, in one line.

    Args:
        message: one line for the user.
        exit_code: exit status of the process when the error reaches the top.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code

    def __reduce__(self):
        return type(self), (self.message, self.exit_code)


def find_input_error(error: BaseException | None) -> InputError | None:
    """Return the `InputError` at the root of ``error``; MONAI's ``Compose`` wraps what its transforms raise. A package
    that an option needs and that is not installed is one too.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, InputError):
            return error
        # the second is what MONAI's TensorBoard handlers say
        if isinstance(error, OptionalImportError) or "to be installed. Please install" in str(error):
            return InputError(str(error).splitlines()[0])
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def explain(error: BaseException) -> str:
    """One line for ``error``: the user's message where there is one, else the root cause's type and text."""
    known = find_input_error(error)
    if known is not None:
        return printable(known.message)
    while error.__cause__ is not None:
        error = error.__cause__
    return printable(" ".join(f"{type(error).__name__}: {error}".split()))


def printable(text: str) -> str:
    """``text`` with what cannot be encoded replaced, as bytes of a file's name that are no UTF-8."""
    return text.encode("utf-8", "replace").decode()


def flag(data: Mapping[Hashable, Any], doubt: str) -> dict[Hashable, Any]:
    """``data`` with a doubt about the scan added to ``flags``: it goes on, and its row in the table tells."""
    return {**data, "flags": "; ".join(filter(None, [data.get("flags", ""), printable(doubt)]))}


def require_device(device: Any) -> None:
    """One of the first steps of every run.

    Raises:
        InputError: a device that PyTorch does not know, or that this machine lacks.
    """
    try:
        known = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device '{device}' is unknown: use cpu, cuda or cuda:1") from error
    if known.type == "cuda" and (known.index or 0) >= torch.cuda.device_count():
        there = f"it sees {torch.cuda.device_count()}" if torch.cuda.device_count() else "it sees none"
        raise InputError(f"device '{device}': PyTorch {torch.__version__} has no such GPU ({there}); use --device cpu")


def require_monai() -> None:
    """Where volumes are resampled: before 1.6 MONAI's transforms did not agree whether corners or centres of voxels
    are meant (``align_corners``, its pull request 8690), so all would run, with wrong maps.

    Raises:
        InputError: an older MONAI, or one that does not tell its version.
    """
    if not version_geq(monai.__version__, OLDEST_MONAI):
        raise InputError(f"MONAI {monai.__version__} resamples wrongly: pip install 'monai>={OLDEST_MONAI}'")


def _one_line_hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    known = find_input_error(error)
    if isinstance(error, KeyboardInterrupt):
        known = InputError("stopped; what is done is kept", exit_code=130)
    if known is None:
        traceback.print_exception(kind, error, trace)
    else:
        print(f"error: {printable(known.message)}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # the interpreter would otherwise exit with 1 after an excepthook
        raise SystemExit(known.exit_code)


def _without_trace(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = logging.LogRecord(*args, **kwargs)
    if record.exc_info and find_input_error(record.exc_info[1]):
        record.exc_info = None  # MONAI's handlers log what they pass on
    return record


def report_in_one_line() -> None:
    """Make an uncaught `InputError`, or Ctrl-C, end the process with one line on stderr and its own exit code.

    The configs call this in ``initialize``: ``python -m monai.bundle run`` has no other place for it.
    """
    sys.excepthook = _one_line_hook
    logging.setLogRecordFactory(_without_trace)

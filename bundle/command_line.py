"""What MONAI's runner was told, checked, and kept beside the results."""

from __future__ import annotations

import difflib
import getpass
import inspect
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pydoc import locate
from typing import Any

import monai
import numpy as np
import torch
from fire.parser import DefaultParseValue
from monai.bundle import ConfigComponent, ConfigParser
from monai.bundle import run as runner

import bundle
from bundle.data.files import file_hash, read_json, write_json
from bundle.errors import InputError
from bundle.parallel import is_main

# of the runner itself, and of its experiment tracking
_RUNNER = {*inspect.signature(runner).parameters, "workflow_name", "workflow_type"}
_RUNNER |= {"tracking_uri", "experiment_name", "run_name", "save_execute_config", "is_not_rank0"}
_TEXTS = {"brain_mask", "atlas", "contrast", "section", "dataset", "bundle_root"}  # and every path


def raw_arguments(words: Sequence[str]) -> dict[str, str | None]:
    """``--name value`` and ``--name=value`` of a command line, as they were typed; None for a name without a value."""
    given: dict[str, str | None] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            continue
        name, equals, value = word[2:].partition("=")
        typed = value if equals else words.pop(0) if words and not words[0].startswith("--") else None
        given[name.replace("-", "_")] = typed
    return given


def runner_arguments(words: Sequence[str]) -> dict[str, Any]:
    """The same, read as MONAI's runner (python-fire) reads them: as Python where that is possible."""
    return {name: DefaultParseValue("True" if typed is None else typed) for name, typed in raw_arguments(words).items()}


def _typed_words() -> list[str]:
    """Words of this process' command line, if it is MONAI's runner."""
    return sys.argv[1:] if "monai" in Path(sys.argv[0]).parts and sys.argv[1:2] == ["run"] else []


def configured(words: Sequence[str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Content of the config files of a command line, and what it overrides; two empty ones if the runner was not
    started from one.

    Args:
        words: of the command line; None takes those of this process.
    """
    words = _typed_words() if words is None else words
    given = runner_arguments(words)
    if isinstance(given.get("args_file"), str):
        given = {**ConfigParser.load_config_file(given["args_file"]), **given}
    files = given.get("config_file")
    config = ConfigParser.load_config_files(files) if files else {}
    return config, {name: value for name, value in given.items() if name not in _RUNNER and files}


def check_overrides(words: Sequence[str] | None = None) -> None:
    """One of the first steps of every run: refuse overrides of what no config has, which MONAI would ignore, so that
    a mistyped ``--ckpt_dir`` trains over other models.

    Args:
        words: see `configured`.

    Raises:
        InputError: a name that neither a config nor a component's arguments have, a value of another type than the one
            it takes the place of, a name without a value where there must be one, or a path that the runner would read
            as something else.
    """
    words = _typed_words() if words is None else words
    config, overrides = configured(words)
    raw = raw_arguments(words)
    for name, value in overrides.items():
        if name in raw:
            _check_reading(name, value, raw[name])
        *path, last = name.split("#")
        place: Any = config
        for part in path:
            place = place.get(part) if isinstance(place, Mapping) else _item(place, part)
        names = list(config) if not path else list(place or ())
        open_to_any = isinstance(place, Mapping) and (not place or last in place)
        if isinstance(place, Mapping) and "_target_" in place and not open_to_any:
            names = _arguments_of(overrides.get("#".join([*path, "_target_"]), place["_target_"]))
            open_to_any = not names or last in names or last.startswith("_")
        if isinstance(place, (str, list)) or open_to_any:
            known = place.get(last) if isinstance(place, Mapping) else _item(place, last)
            _check_type(name, value, known)
            continue
        close = difflib.get_close_matches(last, names, 1)
        hint = f"; did you mean --{'#'.join([*path, close[0]])}?" if close else ""
        raise InputError(f"--{name}: nothing of that name in the config{hint}")


def _arguments_of(target: Any) -> list[str]:
    """Names of the arguments of a ``_target_``; none if it takes any, or cannot be told."""
    with suppress(Exception):
        component: Any = locate(ConfigComponent({"_target_": target}).resolve_module_name())
        parameters = inspect.signature(component).parameters
        if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            return list(parameters)
    return []


def _item(place: Any, index: str) -> Any:
    return place[int(index)] if isinstance(place, list) and index.isdigit() and int(index) < len(place) else None


def _check_reading(name: str, value: Any, typed: str | None) -> None:
    """Paths and names are text, whatever they look like: ``run#2`` is no ``run`` with a remark, ``a,b`` no two."""
    is_text = name in _TEXTS or name.endswith(("_dir", "_path", "_file"))
    if typed is None and is_text:
        raise InputError(f"--{name}: needs a value")
    if typed is None or not (is_text or isinstance(value, str)) or value is None:
        return
    if value != typed and f"'{value}'" != typed and f'"{value}"' != typed:
        raise InputError(f"--{name} {typed}: would be read as {value!r}; write ./{typed} or \"'{typed}'\"")


def _check_type(name: str, value: Any, default: Any) -> None:
    if isinstance(value, str) and value.startswith(("$", "@")):
        return
    wanted = None
    if isinstance(default, bool):
        wanted = None if isinstance(value, bool) else "True or False"
    elif isinstance(default, int):
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        wanted = None if whole and not isinstance(value, bool) else f"a whole number, such as {default}"
    elif isinstance(default, float):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        wanted = None if fits else f"a number, such as {default}"
    elif isinstance(default, list):
        fits = isinstance(value, (list, tuple)) or (isinstance(value, str) and all(isinstance(d, str) for d in default))
        wanted = None if fits else f"a list, such as {json.dumps(default)[:60]}"
    elif isinstance(default, str) and not default.startswith(("$", "@")) and type(value) in (int, float):
        wanted = f"text; for a file or folder of that name write ./{value}"
    elif isinstance(default, Mapping) and "_target_" not in default and not isinstance(value, Mapping):
        wanted = "a dictionary, such as \"{'name': 1}\""
    if wanted:
        raise InputError(f"--{name} {value}: must be {wanted}")


def record_run(folder: str | Path, name: str, files: Sequence[str | Path] = (), **facts: Any) -> None:
    """Keep in ``folder/run.json``, under ``name``, what is needed to do a run again: the merged config, the same
    for all shards, versions, the kind of machine, the code's revision, and hashes of the files it reads. No user's
    name, no home folder, no time of day. Records of other names in the file are kept.

    Args:
        folder: of the results.
        name: of the run, such as "inference".
        files: models and the like; those that are there are hashed.
        facts: what else made the results.
    """
    if not is_main():
        return
    try:
        known = run_records(folder)
    except InputError:
        known = {}  # a damaged record is replaced
    config, overrides = ({k: v for k, v in told.items() if k != "shard"} for told in configured())
    parser = ConfigParser(config)
    if overrides:
        parser.update(overrides)
    there = [f for f in map(Path, files) if f.is_file()]
    record = {
        "config": parser.get() if config else None,
        "overrides": overrides,
        "sha256": {f.name: file_hash(f) for f in there},
        "versions": {
            "bundle": bundle.__version__,
            "git": git_revision(),
            "monai": monai.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "gpus": [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())],
        },
        **facts,
    }
    write_json(Path(folder) / "run.json", json.loads(impersonal(json.dumps({**known, name: record}, default=str))))


def run_records(folder: str | Path) -> dict[str, Any]:
    """What `record_run` has kept in a folder, by the names of the runs; empty where there is nothing.

    Raises:
        InputError: it cannot be read.
    """
    path = Path(folder) / "run.json"
    records = read_json(path, "record of runs; remove it") if path.is_file() else {}
    return records if isinstance(records, dict) else {}


def impersonal(text: str) -> str:
    """``text`` with the home folder as ``~`` and, in paths, the user's name as ``USER``."""
    with suppress(RuntimeError):  # there is no home, or no name, in some containers
        text = text.replace(str(Path.home()), "~") if len(str(Path.home())) > 1 else text
    with suppress(KeyError, OSError):
        text = re.sub(rf"(?<=[/\\]){re.escape(getpass.getuser())}(?=[/\\\"]|$)", "USER", text)
    return text


def git_revision() -> str | None:
    """Commit of the code, with "+" if it was changed since; None outside a checkout."""
    root = Path(bundle.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    commands = (["git", "rev-parse", "--short=12", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        head, changed = (
            subprocess.run(c, cwd=root, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for c in commands
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")

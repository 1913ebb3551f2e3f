"""Reading and writing so that nothing is ever half there."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bundle.errors import InputError
from bundle.parallel import is_main

CONTRASTS = ("t1", "t2", "flair")
AUTO = "auto"  # whichever the scan is of; files that are chosen then have it in the place of the contrast


def require_contrast(contrast: str) -> None:
    """Raises:
    InputError: ``contrast`` is neither one of `CONTRASTS` nor `AUTO`.
    """
    if contrast not in (AUTO, *CONTRASTS):
        raise InputError(f"contrast '{contrast}' is unknown: use {AUTO}, {', '.join(CONTRASTS)}")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` (same ending); on success it is synced and becomes ``path``, on failure
    it goes.

    Raises:
        InputError: the folder cannot be written to, or is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".partial-", suffix="-" + path.name[-40:], dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise unwritable(path.parent, error) from error
    temporary = Path(name)
    try:
        yield temporary
        apply_umask(temporary)
        sync(temporary)
        temporary.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def unwritable(path: Path, error: OSError) -> InputError:
    """What a user is told of ``error``, met when ``path`` was written."""
    return InputError(
        f"{path}: cannot be written ({error.strerror or error}); make room or choose another output folder"
    )


def sync(path: Path) -> None:
    """Wait until a file's content is on the disk, so that a power cut cannot leave its name without it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def apply_umask(path: Path) -> None:
    """Give everyone whom the umask allows access to a file or folder that `tempfile` made private."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


_claims: list[FileLock] = []
_PATIENCE = 60  # seconds that a shard waits while others come or go


def claim_folder(folder: str | Path, shard: Any = "") -> None:
    """Make this run the only one that writes to ``folder`` until it ends, and remove what killed ones left half done;
    but not in a folder below in which another run may be. Of several processes of one run, the first does it for all;
    shards of one run (``3/40``) share the folder, each number once. What this process has claimed stays so.

    Raises:
        InputError: another run is writing there, or the folder cannot be written to.
    """
    if not is_main():
        return
    root, (number, _, total) = Path(folder).resolve(), str(shard).partition("/")
    if any(Path(claim.lock_file).parent == root for claim in _claims):
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not total:
            _claims.append(_enter(root, 0))
            return
        gate = _enter(root, _PATIENCE, total)
        own = FileLock(root / f".shard-{number}-of-{total}.lock", timeout=0)
        try:
            own.acquire()
        finally:
            _leave(gate)
        _claims.append(own)
    except Timeout as error:
        raise InputError(
            f"{folder}: another run is writing there; wait for it or choose another output folder"
        ) from error
    except OSError as error:
        raise unwritable(Path(folder), error) from error


def _enter(root: Path, patience: float, total: str = "") -> FileLock:
    """The lock of a folder, which a single run holds to its end and a shard while it comes and goes; others of
    ``total`` shards may be there. If none is, what killed runs have left half done is removed.
    """
    gate = FileLock(root / ".lock", timeout=patience)
    gate.acquire()
    others = []
    for file in root.glob(".shard-*.lock"):
        lock = FileLock(file, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            others.append(file)
        else:
            _leave(lock)  # of one that was killed
    if any(not total or not other.match(f"*-of-{total}.lock") for other in others):
        _leave(gate)
        raise Timeout(gate.lock_file)
    if not others:
        for left in [*root.rglob(".partial-*"), *root.rglob(".replaced-*")]:
            if any(next(parent.glob(".*lock"), None) for parent in left.parents if root in parent.parents):
                continue
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
    return gate


def _leave(lock: FileLock) -> None:
    Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: who waits for it looks whether it is still there
    lock.release()


@contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """Wait until no other shard is in such a block, and keep others waiting: for what one does for all of them."""
    lock = FileLock(Path(folder).resolve() / ".merge.lock")
    lock.acquire()
    try:
        yield
    finally:
        _leave(lock)


@atexit.register
def release_claims() -> None:
    """Let others write to the folders that `claim_folder` has claimed; done by itself when the process ends. The last
    shard to go removes what killed ones have left half done.
    """
    while _claims:
        lock = _claims.pop()
        root, name = Path(lock.lock_file).parent, Path(lock.lock_file).stem
        _leave(lock)
        if "-of-" in name:
            with suppress(OSError, Timeout):  # others are at work
                _leave(_enter(root, _PATIENCE, name.split("-of-")[1]))


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically; in names of files, bytes that are no UTF-8 are replaced."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically, indented, numbers as they are."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: str | Path, what: str) -> Any:
    """Read JSON. ``what`` names the file's role for the error.

    Raises:
        InputError: missing or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: {what} not found") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: {what} cannot be read ({error})") from error


def model_file(ckpt_dir: str | Path, contrast: str) -> str:
    """The model of a contrast in a folder: ``model.pt`` of T1w, the name that MONAI looks for, ``model_CONTRAST.pt`` of
    any other: no contrast is ever scored by another's.
    """
    return str(Path(ckpt_dir) / ("model.pt" if contrast == "t1" else f"model_{contrast}.pt"))


def of_contrast(path: str | Path, contrast: str | None) -> str:
    """A path whose name stands for every contrast (``calibration_auto.json``), for one; any other path as it is."""
    path = Path(path)
    if contrast is None or not path.stem.endswith(f"_{AUTO}"):
        return str(path)
    if path.name == f"model_{AUTO}.pt":
        return model_file(path.parent, contrast)
    return str(path.with_name(f"{path.stem.removesuffix(AUTO)}{contrast}{path.suffix}"))


def calibrated_contrasts(ckpt_dir: str | Path) -> list[str]:
    """Contrasts that a folder has calibrations of; T1w, where it has none: what is missing is told by that name."""
    there = [c for c in CONTRASTS if Path(of_contrast(Path(ckpt_dir) / f"calibration_{AUTO}.json", c)).is_file()]
    return there or [CONTRASTS[0]]


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_there(path: str | Path) -> bool:
    """Whether there is such a file; no name is too long or too strange to be asked for."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def numbered_folder(parent: Path, name: str) -> Path:
    """A new folder in ``parent``: the first of NAME_1, NAME_2 ... that is not there yet."""
    folders = (parent / f"{name}_{number}" for number in range(1, 10**6))
    folder = next(folder for folder in folders if not folder.exists())
    folder.mkdir(parents=True)
    return folder


def visible_files(folder: Path) -> list[Path]:
    """Files in a folder and below, sorted, but hidden ones; links to folders elsewhere are followed once (what lies in
    the folder itself has its own name), and links that lead nowhere count as files.
    """
    found: list[Path] = []
    visited: set[str] = set()
    root = os.path.realpath(folder)
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(place))
        links = {name: Path(place) / name for name in folders if (Path(place) / name).is_symlink()}
        inner = {name for name, link in links.items() if Path(os.path.realpath(link)).is_relative_to(root)}
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in inner)
        found += [Path(place) / name for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.is_file() or file.is_symlink())

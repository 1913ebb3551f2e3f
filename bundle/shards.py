"""What shards of a run (``--shard 3/40``, see `bundle.parallel.Shard`) leave for each other, who never speak.

Each leaves a record of every scan that it has done in the folder of results. Whichever finds the records of all scans
there makes of them what a single run would have made: it does not matter which that is, in what order they come, nor
how often one is killed and run again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bundle
from bundle.command_line import configured
from bundle.data.files import atomic_path, file_hash
from bundle.data.formats import files_of
from bundle.parallel import Shard, gather

_ARRAY = "array of this file"
RECORDS = ".records"  # folder in that of the results


def scan_facts(scan: Mapping[str, Any]) -> dict[str, Any]:
    """Place (its hash: paths may tell names), size and time of each file of a scan, of folders and pairs of all their
    files: another file of the same name is another scan.
    """
    files = {key: Path(value).resolve() for key, value in scan.items() if isinstance(value, str) and key != "name"}
    there = {
        key: [f.stat() for f in (files_of(file) if file.is_file() or key == "image" else [])]
        for key, file in sorted(files.items())
    }
    return {
        key: [_place(files[key]), sum(f.st_size for f in stats), max(f.st_mtime_ns for f in stats)]
        for key, stats in there.items()
        if stats
    }


def _place(file: str | Path) -> str:
    """Hash of where a file lies: paths may tell names."""
    return hashlib.sha256(os.fsencode(Path(file).resolve())).hexdigest()[:16]


def to_bytes(content: Any) -> bytes:
    """Dictionaries, lists, dataclasses, texts, numbers, arrays and tensors as an ``.npz`` without pickles; the same
    bytes for the same content.
    """
    arrays: dict[str, np.ndarray] = {}

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            value = {field.name: getattr(value, field.name) for field in fields(value)}
        if isinstance(value, Mapping):
            return {key: plain(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(part) for part in value]
        if isinstance(value, (np.ndarray, torch.Tensor)):
            name = f"a{len(arrays)}"
            arrays[name] = np.asarray(value)
            return {_ARRAY: name, "tensor": isinstance(value, torch.Tensor)}
        return value.item() if isinstance(value, np.generic) else value

    text = json.dumps(plain(content))
    file = io.BytesIO()
    np.savez_compressed(file, content=np.array(text), **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def from_bytes(data: bytes) -> Any:
    """What `to_bytes` was given; of dataclasses a dictionary of their fields.

    Raises:
        ValueError, KeyError, OSError, zipfile.BadZipFile: damaged.
    """
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:

        def original(value: dict[str, Any]) -> Any:
            if _ARRAY not in value:
                return value
            array = arrays[value[_ARRAY]]
            return torch.as_tensor(array) if value["tensor"] else array

        return json.loads(str(arrays["content"]), object_hook=original)


class Records:
    """What is known of each scan of a run: in memory where one run does all; else in a file per scan, written when the
    scan is done, which counts as long as the scan is the same file and the run was told the same.

    Args:
        folder: of the results; the files lie in ``.records`` there.
        items: all scans, with a ``name`` each, and ``purpose`` where two may have the same name.
        shard: see `Shard`.
        part: a folder of their own for the records of one workflow; "" for none.
        files: models and the like, that the records depend on.
        made_from: all that the records depend on, where it is not the command line and ``files``.
        keep: write files even if there is only one shard.
    """

    def __init__(
        self,
        folder: str | Path,
        items: Sequence[Mapping[str, Any]],
        shard: str | Shard = "",
        part: str = "",
        files: Sequence[str | Path] = (),
        made_from: Any = None,
        keep: bool = False,
    ) -> None:
        self.folder, self.items, self.shard = Path(folder) / RECORDS / part, items, Shard.of(shard)
        self.files, self.on_disk, self.run = files, keep or bool(self.shard), made_from and _digest(made_from)
        self.memory: dict[str, Any] = {}
        self._by_key = {_key(item): item for item in items}
        self._scans: dict[str, str] = {}

    def to_do(self) -> list[Mapping[str, Any]]:
        """The scans of this shard that have no record yet, or one that says they failed."""
        known = ((item, self.read(item)) for item in self.shard.share(self.items))
        return [item for item, content in known if content is None or "failure" in content]

    def write(self, scan: Mapping[str, Any], content: Mapping[str, Any]) -> None:
        """Keep what there is to be known (see `to_bytes`) of a scan: an item, or results that have its name."""
        if not self.on_disk:
            self.memory[_key(scan)] = content
            return
        item = self._by_key[_key(scan)]
        with atomic_path(self._path(item)) as temporary:
            known = {"run": self._run(), "scan": self._scan(item), "content": content}
            known["place"] = _place(item.get("image", ""))
            temporary.write_bytes(to_bytes(known))

    def remove(self, item: Mapping[str, Any]) -> None:
        """Forget a scan, before its results are replaced."""
        self._path(item).unlink(missing_ok=True)

    def is_of_another(self, item: Mapping[str, Any]) -> bool:
        """Whether the record that has the name of a scan is of a file in another place."""
        place = _place(item.get("image", ""))
        return self.on_disk and _read(self._path(item)).get("place", place) != place

    def read(self, item: Mapping[str, Any]) -> Any:
        """What is known of a scan; None if nothing is, or of another file or run."""
        if not self.on_disk:
            return self.memory.get(_key(item))
        known = _read(self._path(item))
        fits = known.get("run") == self._run() and known.get("scan") == self._scan(item)
        return known.get("content") if fits else None

    def all(self) -> list[Any] | None:
        """What is known of all scans, in their order; None, and a word about it, while other shards have some to do.
        Of several processes of one run (``torchrun``) all must ask.
        """
        found = gather([self.memory])
        self.memory = {key: content for part in found for key, content in part.items()}
        contents = [self.read(item) for item in self.items]
        left = sum(content is None for content in contents)
        if self.shard and left:
            print(f"shard {self.shard} is done; {left} of {len(contents)} scans are left to others", flush=True)
            return None
        return [content for content in contents if content is not None]

    def others(self) -> list[Any]:
        """Contents of the records of other scans that the same kind of run has left, in the order of their names."""
        ours = {self._path(item).name for item in self.items}
        files = sorted(f for f in self.folder.glob("[!.]*.npz") if f.name not in ours)
        return [known["content"] for known in map(_read, files) if known.get("run") == self._run()]

    def _path(self, item: Mapping[str, Any]) -> Path:
        return self.folder / f"{_key(item)}.npz"

    def _scan(self, item: Mapping[str, Any]) -> str:
        if _key(item) not in self._scans:
            self._scans[_key(item)] = _digest([scan_facts(item), dict(item)])
        return self._scans[_key(item)]

    def _run(self) -> str:
        if not self.run:
            config, overrides = configured()
            told = [{k: v for k, v in given.items() if k != "shard"} for given in (config, overrides)]
            hashes = [file_hash(f) for f in map(Path, self.files) if f.is_file()]
            self.run = _digest([told, hashes, bundle.__version__])
        return self.run


def _key(item: Mapping[str, Any]) -> str:
    return "_".join(str(item[key]) for key in ("purpose", "name") if key in item)


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=lambda value: np.asarray(value).tolist())
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """A record; an empty one where there is none that can be read: its scan is done again then."""
    try:
        return from_bytes(path.read_bytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}

"""The name of each scan, by which its results are found."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from bundle.errors import InputError

from .formats import stem

_LONGEST_NAME = 150  # bytes; names of results are longer, and file systems take 255


def named_uniquely(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give each item a unique ``name``: its file's, with folders in front as far as needed to tell scans apart."""
    for depth in range(1, 20):
        names = [_printable("_".join([*Path(i["image"]).parts[-depth:-1], stem(i["image"])])) for i in items]
        if len(set(names)) == len(names):
            return [{**item, "name": name} for item, name in zip(items, names)]
    raise InputError(f"{items[0]['image']}: named twice in one dataset")


def _printable(name: str) -> str:
    """A name that can be written to a table and be a part of a file's: bytes that are no UTF-8, as of old archives, are
    replaced, and what is too long is cut and told apart by a hash.
    """
    raw = os.fsencode(name)
    digest = hashlib.sha256(raw).hexdigest()[:8]
    text = raw.decode("utf-8", "replace")
    if len(text.encode()) > _LONGEST_NAME:
        text = text.encode()[:_LONGEST_NAME].decode("utf-8", "ignore")
    return text if text.encode() == raw else f"{text}_{digest}"

"""``summary.csv``: a row for each scan, and for each visit."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bundle.data.files import write_text

COLUMNS = (
    *("name", "contrast", "lesion_volume_ml", "lesions", "max_score", "mean_score"),
    *("not_examined_percent", "seconds", "status"),
)


def write_table(path: str | Path, rows: list[dict[str, Any]], columns: tuple[str, ...] | list[str]) -> None:
    """Write rows as CSV, atomically; missing entries stay empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def is_done(row: Mapping[str, Any]) -> bool:
    """Whether a row of ``summary.csv`` is of a scan with results, doubtful ones included."""
    return str(row.get("status", "")).startswith(("ok", "flagged"))

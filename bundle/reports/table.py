"""Tables: ``summary.csv``, a row for each scan and for each visit, and those that scripts print."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
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


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table as the documentation has it, in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]
    print(f"\n### {title}\n", *lines, sep="\n", flush=True)


def is_done(row: Mapping[str, Any]) -> bool:
    """Whether a row of ``summary.csv`` is of a scan with results, doubtful ones included."""
    return str(row.get("status", "")).startswith(("ok", "flagged"))

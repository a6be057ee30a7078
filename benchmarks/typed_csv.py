"""Tables whose rows are dataclasses of numbers and text, as CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

Row = TypeVar("Row")
_CONVERT = {"int": int, "float": float}


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of `write_rows`; none where there is no file."""
    if not path.exists():
        return []
    types: dict[str, Any] = {field.name: str(field.type) for field in fields(kind)}  # type: ignore
    with path.open(newline="", encoding="utf-8") as file:
        return [
            kind(**{name: _CONVERT.get(types[name], str)(text) for name, text in line.items()})
            for line in csv.DictReader(file)
        ]


def write_rows(path: Path, kind: type[Row], rows: Iterable[Row]) -> None:
    """Replaces the file at once, so that an interrupted program leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        columns = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)  # type: ignore[call-overload]
    os.replace(partial, path)

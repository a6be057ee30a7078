"""What a benchmark leaves behind: the environment, a table on the console, a CSV file."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import poolformer_kernels

RESULTS = Path(__file__).parent / "results"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short=12", "HEAD") + dirty
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(device: str = "cpu") -> dict[str, Any]:
    """Machine, versions and date: the columns that every row of a CSV file carries."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    result: dict[str, Any] = {
        "cpu": _cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "threads": torch.get_num_threads(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        result["gpu"] = properties.name
        result["cuda"] = torch.version.cuda
    return result | {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "package": poolformer_kernels.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def write_csv(path: Path, rows: Sequence[dict[str, Any]], environment: dict[str, Any]) -> Path:
    """One line a row, the environment in its last columns; a float keeps six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in (*row, *environment)))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for row in rows:
            merged = {**row, **environment}
            writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in merged.items()}
            )
    return path


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of `write_csv`, numbers as numbers, empty cells as None."""

    def value(text: str) -> Any:
        try:
            return float(text) if text else None
        except ValueError:
            return text

    with path.open(newline="", encoding="utf-8") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def table(rows: Sequence[dict[str, Any]], columns: dict[str, str], header: bool = True) -> str:
    """`rows` as aligned text. columns: key -> "title" or "title|format"; the format sets the width.

    A format is that of format(): "8.2f" is right-aligned, "<12" is text.
    """
    lines = [[], *([] for _ in rows)]  # type: list[list[str]]
    for key, spec in columns.items():
        title, _, form = spec.partition("|")
        cells = []
        for row in rows:
            value = row.get(key)
            cells.append("-" if value is None else format(value, form).strip())
        left = not form or form.startswith("<")
        digits = "".join(c for c in form.lstrip("<>").split(".")[0] if c.isdigit())
        width = max([len(title), int(digits or 0), *map(len, cells)])
        for line, cell in zip(lines, [title, *cells], strict=True):
            line.append(cell.ljust(width) if left else cell.rjust(width))
    return "\n".join("  ".join(line).rstrip() for line in (lines if header else lines[1:]))


def print_environment(environment: dict[str, Any]) -> None:
    print(", ".join(f"{key} {value}" for key, value in environment.items()))

"""README.md's tables are those of the CSV files."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import readme
from benchmarks.report import write_csv

MACHINE = {"cpu": "x", "capability": "AVX2", "cores": 2, "threads": 2, "torch": "2.14",
           "eager": "library 5", "commit": "abc+changes", "date": "2026-01-02T00:00"}  # fmt: skip


def row(contender: str, batch: int, milliseconds: float, speedup: float) -> dict[str, object]:
    return {"variant": "s12", "dtype": "float32", "batch": batch, "contender": contender,
            "median_ms": milliseconds, "speedup": speedup}  # fmt: skip


def test_a_table_shows_the_faster_layout_and_marks_the_best(tmp_path: Path) -> None:
    rows = [row("eager, nchw", 1, 100.0, 1.0), row("eager, nhwc", 1, 80.0, 1.25),
            row("ours, nchw", 1, 50.0, 2.0), row("ours, nhwc", 1, 40.0, 2.5),
            row("eager, nchw", 8, 900.0, 1.0), row("ours, nchw", 8, 950.0, 0.95)]  # fmt: skip
    write_csv(tmp_path / "model.csv", rows, MACHINE)
    before = "a\n<!-- model.csv -->\nold\n<!-- end -->\nb\n"
    lines = readme.renewed(before, tmp_path).splitlines()
    assert lines[0] == "a" and lines[-1] == "b" and "old" not in lines
    assert "|  | float32, batch 1 | float32, batch 8 |" in lines
    assert "| eager NCHW | 100, 1.00× | **900, 1.00×** |" in lines
    assert "| eager channels_last | 80.0, 1.25× |  |" in lines
    assert "| ours | **40.0, 2.50×** | 950, 0.95× |" in lines
    caption = " ".join(lines[-5:-2])
    assert "2 threads of 2 cores; PyTorch 2.14" in caption and "abc+changes." in caption
    assert all(len(line) <= 118 for line in lines)


def test_the_readme_is_made_from_the_results() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert readme.BLOCK.search(text), "README.md has no table of times"
    if readme.renewed(text) != text:
        pytest.fail("README.md and benchmarks/results differ: run python -m benchmarks.readme")

"""Writes README.md's tables of times from the CSV files of benchmarks/results.

    python -m benchmarks.readme            # --check: exit code 1 if that would change anything

A table stands between `<!-- NAME.csv -->` and `<!-- end -->`. Each contender is shown in its faster
layout, eager in both; the first row is the baseline of all speed-ups.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import RESULTS, read_csv

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- ([\w-]+\.csv) -->\n).*?(<!-- end -->)", re.DOTALL)
LAYOUTS = {"nchw": "NCHW", "nhwc": "channels_last"}


def _title(row: dict[str, Any]) -> str:
    variant = f"{row['variant']}, {row['dtype']}" if row["variant"] != "s12" else row["dtype"]
    return f"{variant}, batch {row['batch']:g}"


def _number(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.1f}"


def _caption(row: dict[str, Any]) -> str:
    eager = "" if row.get("eager") is None else f", eager: {row['eager']}"
    baseline, layout = row["contender"].rsplit(", ", 1)
    caption = (
        f"Milliseconds, medians; × the speed of {baseline} in {LAYOUTS[layout]}. {row['cpu']}, "
        f"{row['capability']}, {row['threads']:g} threads of {row['cores']:g} cores; "
        f"PyTorch {row['torch']}{eager}; {row['date'][:10]}, {row['commit']}."
    )
    return textwrap.fill(caption, 118)


def times(rows: Sequence[dict[str, Any]]) -> str:
    """A table of contenders (rows) by dtype and batch (columns), best times in bold."""
    titles = list(dict.fromkeys(map(_title, rows)))
    best: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        name, layout = row["contender"].rsplit(", ", 1)
        if name == "eager":
            name = f"eager {LAYOUTS[layout]}"
        cells = best.setdefault(name, {})
        held = cells.get(_title(row))
        if held is None or row["median_ms"] < held["median_ms"]:
            cells[_title(row)] = row
    least = {t: min(c[t]["median_ms"] for c in best.values() if t in c) for t in titles}
    lines = [["", *titles], ["---"] * (1 + len(titles))]
    for name, cells in best.items():
        line = [name]
        for title in titles:
            row = cells.get(title)
            if row is None:
                line.append("")
                continue
            text = f"{_number(row['median_ms'])}, {row['speedup']:.2f}×"
            line.append(f"**{text}**" if row["median_ms"] == least[title] else text)
        lines.append(line)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{_caption(rows[0])}\n"


def renewed(text: str, results: Path = RESULTS) -> str:
    """`text` with every table of times made anew."""

    def table(found: re.Match[str]) -> str:
        return found[1] + "\n" + times(read_csv(results / found[2])) + "\n" + found[3]

    return BLOCK.sub(table, text)


def main(arguments: list[str]) -> int:
    text = README.read_text(encoding="utf-8")
    new = renewed(text)
    if arguments == ["--check"]:
        return int(new != text)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

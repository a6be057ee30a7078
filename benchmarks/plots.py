"""Charts from the CSV files: `python -m benchmarks.plots results/ops.csv results/model.csv`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from .report import read_csv

# Okabe and Ito's colours, which colour-blind readers tell apart; grey is for baselines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BASELINE = "#8C8C8C"


def _caption(row: dict[str, Any]) -> str:
    versions = f"torch {row['torch']}, poolformer_kernels {row['package']} ({row['commit']})"
    threads = f"{row['threads']:.0f} of {row['cores']:.0f} cores"
    where = f"{row.get('gpu') or row['cpu']}, {threads}, {row['capability']}"
    return f"{where}\n{versions}, {str(row['date'])[:10]}"


def _unique(rows: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _finish(figure: Any, title: str, caption: str, path: Path) -> Path:
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=7, color="#555555")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def plot_ops(csv_path: Path) -> Path:
    """Speed-up over plain PyTorch by op (rows), dtype and layout (columns) and stage shape."""
    rows = read_csv(csv_path)
    ops = _unique(rows, "op")
    kinds = list(dict.fromkeys((row["dtype"], row["layout"]) for row in rows))
    baseline, *names = _unique(rows, "contender")
    size = (1.2 + 3.1 * len(kinds), 1.6 + 2.2 * len(ops))
    figure, grid = plt.subplots(
        len(ops), len(kinds), figsize=size, layout="constrained", squeeze=False, sharey="row"
    )
    for op, line in zip(ops, grid, strict=True):
        for kind, axes in zip(kinds, line, strict=True):
            part = [r for r in rows if r["op"] == op and (r["dtype"], r["layout"]) == kind]
            _speedups(axes, part, baseline, names)
            if op == ops[0]:
                axes.set_title(" ".join(kind), fontsize=9)
        speedups = [row["speedup"] for row in rows if row["op"] == op]
        line[0].set_ylim(min(0.7, *speedups) / 1.4, max(1.5, *speedups) * 1.4)
        line[0].set_ylabel(f"{op}\nspeed-up", fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), fontsize=8)
    direction = _unique(rows, "direction")[0]
    title = (
        f"Ops, {direction}: speed-up over plain PyTorch (log scale; its ms are under the shapes)"
    )
    return _finish(figure, title, _caption(rows[0]), csv_path.with_suffix(".png"))


def _speedups(axes: Axes, rows: list[dict[str, Any]], baseline: str, names: list[str]) -> None:
    """Bars that rise from 1 where a backend is faster and hang from it where it is slower."""
    cells = {(row["contender"], row["shape"]): row for row in rows}
    shapes = _unique(rows, "shape")
    axes.set_yscale("log")
    width = 0.8 / max(len(names), 1)
    for index, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        present = [i for i, shape in enumerate(shapes) if (name, shape) in cells]
        chosen = [cells[name, shapes[i]] for i in present]
        places = [i + (index - (len(names) - 1) / 2) * width for i in present]
        rises = [row["speedup"] - 1 for row in chosen]
        bars = axes.bar(places, rises, width, bottom=1, color=colour, label=name)
        axes.bar_label(bars, [f"{r['median_ms']:.3g}" for r in chosen], fontsize=6, padding=1)
    axes.axhline(1, color="black", linewidth=0.8)
    ticks = [f"{s.replace('x', '·')}\n{cells[baseline, s]['median_ms']:.3g}" for s in shapes]
    axes.set_xticks(range(len(shapes)), ticks, fontsize=6)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", labelsize=7)
    _plain(axes)


def plot_models(csv_path: Path, title: str = "Models: time per batch") -> Path:
    """Median times with p20 to p80, one panel for each case, labelled with the speed-up."""
    rows = read_csv(csv_path)
    keys = [key for key in ("variant", "dtype", "direction", "batch") if key in rows[0]]
    panels = list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))
    parts = [[r for r in rows if tuple(r[key] for key in keys) == panel] for panel in panels]
    heights = [len(part) + 1.6 for part in parts]
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    colour = dict(zip(kinds, itertools.chain([BASELINE], itertools.cycle(COLOURS)), strict=False))
    figure, grid = plt.subplots(
        len(panels),
        1,
        figsize=(8, 0.9 + 0.34 * sum(heights)),
        layout="constrained",
        squeeze=False,
        height_ratios=heights,
    )
    for panel, part, (axes,) in zip(panels, parts, grid, strict=True):
        _times(axes, part, colour)
        axes.set_title(
            ", ".join(
                f"{key} {value:g}" if isinstance(value, float) else str(value)
                for key, value in zip(keys, panel, strict=True)
            ),
            loc="left",
            fontsize=9,
        )
    grid[-1][0].set_xlabel("milliseconds per batch (bar: median; line: p20 to p80)", fontsize=8)
    return _finish(figure, title, _caption(rows[0]), csv_path.with_suffix(".png"))


def _kind(row: dict[str, Any]) -> str:
    """A contender's name without the layout: one colour for both layouts."""
    return str(row["contender"]).rsplit(", ", 1)[0]


def _times(axes: Axes, rows: list[dict[str, Any]], colour: dict[str, str]) -> None:
    names = [row["contender"] for row in rows]
    medians = [row["median_ms"] for row in rows]
    whiskers = [
        [row["median_ms"] - row["p20_ms"] for row in rows],
        [row["p80_ms"] - row["median_ms"] for row in rows],
    ]
    axes.barh(
        range(len(rows)),
        medians,
        color=[colour[_kind(row)] for row in rows],
        alpha=0.85,
        xerr=whiskers,
        error_kw={"elinewidth": 1, "capsize": 2},
    )
    for place, row in enumerate(rows):
        text = f"  {row['median_ms']:.4g} ms   {row['speedup']:.2f}×"
        axes.text(row["p80_ms"], place, text, va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(row["p80_ms"] for row in rows) * 1.28)
    axes.tick_params(axis="x", labelsize=7)
    _plain(axes)


def plot_traffic(csv_path: Path) -> Path:
    """Passes over x and launches of a block inside a stage, by direction (rows) and stage shape."""
    rows = [row for row in read_csv(csv_path) if row["op"] == "stage"]
    dtype, layout = rows[0]["dtype"], rows[0]["layout"]
    rows = [row for row in rows if (row["dtype"], row["layout"]) == (dtype, layout)]
    directions = _unique(rows, "direction")
    quantities = {"passes": "passes of S", "launches": "launches"}
    size = (11, 1.4 + 2.3 * len(directions))
    figure, grid = plt.subplots(
        len(directions), 2, figsize=size, layout="constrained", squeeze=False
    )
    for direction, line in zip(directions, grid, strict=True):
        part = [row for row in rows if row["direction"] == direction]
        for (key, title), axes in zip(quantities.items(), line, strict=True):
            _counts(axes, part, key)
            axes.set_title(f"{direction}: {title}", loc="left", fontsize=9)
        places = range(len(_unique(part, "shape")))
        least = part[0]["least_passes"]
        line[0].hlines(least, -0.45, len(places) - 0.55, color="black", linewidth=1, label="least")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), fontsize=8)
    title = f"A block in a stage, {dtype}: what it moves and launches (plain PyTorch: at least)"
    versions = f"counted on: {rows[0]['gpu']}, torch {rows[0]['torch']}, triton {rows[0]['triton']}"
    package = f"poolformer_kernels {rows[0]['package']} ({rows[0]['commit']})"
    caption = (
        f"{versions}, {package}, {str(rows[0]['date'])[:10]}\n"
        "S: the bytes of x. Parameters, their gradients and partial sums are not included"
    )
    return _finish(figure, title, caption, csv_path.with_suffix(".png"))


def _counts(axes: Axes, rows: list[dict[str, Any]], key: str) -> None:
    names, shapes = _unique(rows, "contender"), _unique(rows, "shape")
    width = 0.84 / len(names)
    for index, (name, colour) in enumerate(zip(names, (BASELINE, *COLOURS), strict=False)):
        heights = {row["shape"]: row[key] for row in rows if row["contender"] == name}
        places = [i + (index - (len(names) - 1) / 2) * width for i in range(len(shapes))]
        values = [heights[shape] for shape in shapes]
        bars = axes.bar(places, values, width, color=colour, label=name)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], fontsize=6, padding=1)
    variants = {row["shape"]: row["variant"] for row in rows}
    ticks = [f"{variants[s]}\n{'·'.join(s.split('x')[1:])}" for s in shapes]
    axes.set_xticks(range(len(shapes)), ticks, fontsize=6)
    axes.tick_params(axis="y", labelsize=7)
    _plain(axes)


def main(paths: list[str]) -> int:
    for path in map(Path, paths):
        columns = (read_csv(path) or [{}])[0]
        counts = "passes" in columns
        plot = plot_traffic if counts else plot_ops if "op" in columns else plot_models
        print(f"wrote {plot(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

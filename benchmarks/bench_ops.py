"""Times the ops at the stage shapes of the released models, each backend beside plain PyTorch.

    python -m benchmarks.bench_ops                      # S12, batch 8, every op, dtype and layout
    python -m benchmarks.bench_ops --backward           # forward and backward through autograd
    python -m benchmarks.bench_ops --call-overhead      # Python and dispatch alone

Writes benchmarks/results/ops.csv (ops_backward.csv, call_overhead.csv) and a chart beside it. A
result that is wrong is not timed, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from itertools import product
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from poolformer_kernels import backends
from poolformer_kernels.models.poolformer.variants import VARIANTS

from . import plots
from .harness import Contender, Disagreement, gate, measure, run_cases, summarize
from .op_cases import (
    DTYPES,
    LAYOUTS,
    Setting,
    make_arguments,
    make_call,
    make_case,
    stage_shapes,
)
from .options import make_parser, prepare
from .report import RESULTS, table, write_csv

ACCELERATED = tuple(name for name in backends.PREFERENCE if name != "torch")
COLUMNS = {
    "op": "op|<10",
    "shape": "shape|<12",
    "dtype": "dtype|<8",
    "layout": "layout|<",
    "contender": "backend|<",
    "median_ms": "median ms|9.3f",
    "p20_ms": "p20|8.3f",
    "p80_ms": "p80|8.3f",
    "speedup": "speed-up|8.2f",
    "error": "rel. error|10.1e",
}
OVERHEAD_COLUMNS = {
    "op": "op|<10",
    "autograd": "autograd|<",
    "contender": "backend|<12",
    "median_us": "median us|9.1f",
    "p20_us": "p20|8.1f",
    "p80_us": "p80|8.1f",
    "over_us": "over F.group_norm|8.1f",
}


def settings(options: argparse.Namespace) -> list[Setting]:
    """The grid without repetitions: s12, s24 and s36 share their shapes, m36 and m48 too."""
    grid = product(options.variants, range(4), options.ops, options.dtypes, options.layouts)
    return list(
        dict.fromkeys(
            Setting(
                op,
                stage_shapes(variant, options.batch, options.image_size)[stage],
                dtype,
                layout,
                options.device,
                options.backward,
            )
            for variant, stage, op, dtype, layout in grid
        )
    )


def print_absent(grid: list[Setting], names: list[str]) -> None:
    """Why a backend is in no row: the first reason of each."""
    for name in names:
        reasons = [setting.why_not(name) for setting in grid]
        if all(reasons):
            print(f"without {name}: {reasons[0]}")


def bench(options: argparse.Namespace, machine: dict[str, Any]) -> int:
    grid = settings(options)
    print_absent(grid, options.backends)
    contenders = sum(1 + sum(s.why_not(n) is None for n in options.backends) for s in grid)
    shown = False

    def show(rows: list[dict[str, Any]]) -> None:
        nonlocal shown
        tqdm.write(table(rows, COLUMNS, header=not shown))
        shown = True

    with tqdm(total=contenders * options.rounds, unit=" samples", disable=None) as bar:
        rows, red = run_cases(
            (make_case(setting, options.backends) for setting in grid),
            options.rounds,
            show,
            min_sample_s=options.min_sample_ms / 1e3,
            device=options.device,
            tick=bar.update,
        )
    for line in red:
        print(f"WRONG: {line}", file=sys.stderr)
    if rows:
        path = options.out / ("ops_backward.csv" if options.backward else "ops.csv")
        write_csv(path, rows, machine)
        print(f"wrote {path} and {plots.plot_ops(path)}")
        slower = [row for row in rows if row["speedup"] < 1]
        print(f"{len(slower)} of {len(rows)} rows are slower than plain PyTorch")
    return 1 if red else 0


def call_overhead(options: argparse.Namespace, machine: dict[str, Any]) -> int:
    """Each op on 8 values beside a plain group_norm of them: what a call costs, work aside."""
    rows = []
    for op, record in product(options.ops, (False, True)):
        setting = Setting(op, (1, 8, 1, 1), record=record)
        case = make_case(setting, options.backends)
        try:
            gate(case)
        except Disagreement as disagreement:
            print(f"WRONG: {disagreement}", file=sys.stderr)
            return 1
        norm = make_arguments("group_norm", setting.shape)
        norm = {name: value.float() for name, value in norm.items()}
        yardstick = Contender("F.group_norm", make_call(plain_group_norm, norm, record))
        contenders = [yardstick, *case.contenders]
        samples = measure(contenders, options.rounds, warmup=20, min_sample_s=0.005)
        least = statistics.median(samples[yardstick.name])
        for name, values in samples.items():
            summary = {f"{key}_us": value * 1e6 for key, value in summarize(values).items()}
            labels = {"op": op, "autograd": "records" if record else "off", "contender": name}
            over = summary["median_us"] - least * 1e6
            rows.append({**labels, **summary, "over_us": over, "rounds": options.rounds})
    print(table(rows, OVERHEAD_COLUMNS))
    print(f"wrote {write_csv(options.out / 'call_overhead.csv', rows, machine)}")
    return 0


def plain_group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.group_norm(x, 1, weight, bias)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, 15, RESULTS)
    parser.add_argument("--ops", nargs="+", default=backends.OPS, choices=backends.OPS)
    parser.add_argument("--variants", nargs="+", default=["s12"], choices=VARIANTS)
    parser.add_argument("--backends", nargs="+", default=ACCELERATED, choices=ACCELERATED)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--min-sample-ms", type=float, default=10, help="of calls in one sample")
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--call-overhead", action="store_true", help="what an empty call costs")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return (call_overhead if options.call_overhead else bench)(options, prepare(options))


if __name__ == "__main__":
    sys.exit(main())

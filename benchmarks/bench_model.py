"""Times whole models: eager beside accelerated, in both layouts, and what else is entered.

    python -m benchmarks.bench_model                                   # S12, batch 1 and 8
    python -m benchmarks.bench_model --variants s12 m36 --dtypes float32 bfloat16
    python -m benchmarks.bench_model --contenders eager accelerated torch.compile
    python -m benchmarks.bench_model --peers           # beside OpenVINO, ONNX Runtime, ...

Speed-ups are over the first contender in the first layout: eager NCHW, what users run today.
Writes benchmarks/results/model.csv and a chart beside it. A result that is wrong is not timed, and
the exit code is then 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from poolformer_kernels.models.poolformer.variants import VARIANTS

from . import plots
from .harness import Case, Contender, run_cases
from .memory import keep_freed_memory, peak_memory
from .models import (
    CONTENDERS,
    DEFAULT,
    EAGER_SOURCE,
    Forward,
    Setting,
    Unavailable,
    build_run,
    exact_logits,
)
from .op_cases import DTYPES, LAYOUTS
from .options import make_parser, prepare
from .peers import PEERS
from .report import RESULTS, table, write_csv

COLUMNS = {
    "variant": "model|<",
    "dtype": "dtype|<8",
    "batch": "batch|5d",
    "contender": "contender|<24",
    "median_ms": "median ms|9.1f",
    "p20_ms": "p20|8.1f",
    "p80_ms": "p80|8.1f",
    "images_s": "images/s|8.1f",
    "speedup": "speed-up|8.2f",
    "peak_mib": "peak MiB|8.0f",
    "error": "rel. error|10.1e",
}


def make_forwards(
    setting: Setting, names: Sequence[str], layouts: Sequence[str]
) -> tuple[dict[str, Forward], dict[str, str]]:
    """Placed pixels to logits, by "name, layout"; and why some contenders are missing."""
    forwards: dict[str, Forward] = {}
    absent: dict[str, str] = {}
    for name in names:
        reasons = []
        for layout in layouts:
            try:
                built = CONTENDERS[name](replace(setting, layout=layout))
            except Unavailable as reason:
                reasons.append(str(reason))
            else:
                forwards[f"{name}, {layout}"] = built
        if len(reasons) == len(layouts):
            absent[name] = reasons[0]
    return forwards, absent


def make_case(setting: Setting, forwards: dict[str, Forward], pixels: Tensor) -> Case:
    """All of `forwards` on `pixels` (B, 3, H, W)."""
    placed = {
        layout: replace(setting, layout=layout).pixels(pixels)
        for layout in {name.rsplit(", ", 1)[1] for name in forwards}
    }
    labels = {
        "variant": setting.variant,
        "dtype": setting.dtype,
        "batch": len(pixels),
        "image_size": pixels.shape[-1],
        "device": setting.device,
    }
    contenders = [
        Contender(
            name,
            partial(forward, placed[name.rsplit(", ", 1)[1]]),
            slack=4 if name.rsplit(", ", 1)[0] in ("eager", *PEERS) else 2,
        )
        for name, forward in forwards.items()
    ]
    truth = partial(exact_logits, setting, pixels)
    return Case(labels, contenders, truth, DTYPES[setting.dtype])


def add_memory(
    cases: Sequence[Case], setting: Setting, tick: Callable[[], object] = lambda: None
) -> None:
    """Peak memory of each contender, one process for all batch sizes of `cases`, ascending."""
    sizes = sorted(case.labels["batch"] for case in cases)
    for full_name in dict.fromkeys(c.name for case in cases for c in case.contenders):
        name, layout = full_name.rsplit(", ", 1)
        options = {
            "name": name,
            "threads": torch.get_num_threads(),
            "image_size": cases[0].labels["image_size"],
            **asdict(replace(setting, layout=layout)),
        }
        target = f"{__package__}.bench_model:{build_run.__name__}"  # which knows all contenders
        peaks = peak_memory(target, options, sizes)
        for case in cases:
            case.extra.setdefault(full_name, {})["peak_mib"] = peaks.get(case.labels["batch"])
        tick()


def add_rates(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["images_s"] = row["batch"] / row["median_ms"] * 1e3


def conclude(
    rows: list[dict[str, Any]], red: list[str], path: Path, machine: dict[str, Any], title: str
) -> int:
    """Says what the gate stopped, writes the CSV and its chart; the exit code."""
    for line in red:
        print(f"WRONG: {line}", file=sys.stderr)
    if rows:
        write_csv(path, rows, machine)
        print(f"wrote {path} and {plots.plot_models(path, title)}")
        slower = [row for row in rows if row["speedup"] < 1]
        print(f"{len(slower)} of {len(rows)} rows are slower than their baseline")
    return 1 if red else 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, 15, RESULTS)
    parser.add_argument("--variants", nargs="+", default=["s12"], choices=VARIANTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--contenders", nargs="+", default=list(DEFAULT), choices=CONTENDERS)
    parser.add_argument("--peers", action="store_true", help="enter other engines too")
    parser.add_argument("--checkpoint", help="folder, file or hub name; default: seeded weights")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory")
    parser.add_argument("--name", default="model", help="of the CSV and the chart")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    machine = prepare(options) | {"eager": EAGER_SOURCE}
    keep_freed_memory()
    names = [*options.contenders, *(PEERS if options.peers else ())]
    draw = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    red: list[str] = []
    for variant, dtype in product(options.variants, options.dtypes):
        setting = Setting(variant, dtype, "nchw", options.device, options.checkpoint)
        forwards, absent = make_forwards(setting, names, options.layouts)
        for name, reason in absent.items():
            print(f"without {name}: {reason}")
        shape = (3, options.image_size, options.image_size)
        batches = [torch.randn(batch, *shape, generator=draw) for batch in options.batches]
        cases = [make_case(setting, forwards, pixels) for pixels in batches]
        if not options.no_memory:
            add_memory(cases, setting)
        total = sum(len(case.contenders) for case in cases) * options.rounds
        with tqdm(total=total, unit=" samples", disable=None) as bar:
            fresh, wrong = run_cases(
                cases,
                options.rounds,
                lambda _: None,
                warmup=1,  # after the gate's call
                device=options.device,
                tick=bar.update,
            )
        add_rates(fresh)
        print(table(fresh, COLUMNS))
        rows += fresh
        red += wrong
    return conclude(
        rows, red, options.out / f"{options.name}.csv", machine, "Models: time per batch"
    )


if __name__ == "__main__":
    sys.exit(main())

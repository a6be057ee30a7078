"""Times training steps: forward, loss, backward and AdamW, eager beside accelerated and compiled.

    python -m benchmarks.bench_training                         # S12, batch 8, float32, autocast
    python -m benchmarks.bench_training --batches 8 32 --modes float32

Speed-ups are over the first contender in the first layout: eager NCHW, what users run today.
Writes benchmarks/results/training.csv and a chart beside it. Contenders' first loss and gradients
are held against float64; one that is wrong is not timed, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from tqdm import tqdm

from poolformer_kernels.models.poolformer.variants import VARIANTS

from . import bench_model, training
from .bench_model import add_rates, conclude
from .harness import Case, Contender, Disagreement, gate, measure, summarize
from .memory import keep_freed_memory, peak_memory
from .models import EAGER_SOURCE, Setting
from .op_cases import LAYOUTS
from .options import make_parser, prepare
from .report import RESULTS, table
from .training import MODES, Trainer

COLUMNS = bench_model.COLUMNS | {"dtype": "mode|<8"}


def bench(
    labels: dict[str, Any], setting: Setting, mode: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row a contender and layout. Raises Disagreement if the gate is red."""
    generator = torch.Generator().manual_seed(labels["batch"])
    batch = training.random_batch(labels["batch"], options.image_size, 1000, generator)
    steps, errors = [], {}
    exact = training.exact(setting, batch)
    dtype = torch.float32 if mode == "float32" else torch.bfloat16
    for layout in options.layouts:  # each held against the baseline in its own layout
        checks = []
        for name in options.contenders:
            placed = Setting(setting.variant, "float32", layout, setting.device)
            trainer, data = Trainer(name, placed, mode), batch.placed(placed)
            slack = 4 if name == "torch.compile" else 2  # it turns convolutions to channels_last
            checks.append(Contender(f"{name}, {layout}", partial(trainer.check, data), slack))
            steps.append(Contender(f"{name}, {layout}", partial(trainer.step, data)))
        errors |= gate(Case(labels, checks, lambda: exact, dtype))
    steps.sort(key=lambda step: options.contenders.index(step.name.rsplit(", ", 1)[0]))
    with tqdm(total=len(steps) * options.rounds, unit=" steps", disable=None) as bar:
        samples = measure(steps, options.rounds, warmup=2, device=setting.device, tick=bar.update)
    baseline = statistics.median(samples[steps[0].name])
    rows = []
    for name, seconds in samples.items():
        summary = {f"{key}_ms": value * 1e3 for key, value in summarize(seconds).items()}
        speedup = baseline / statistics.median(seconds)
        rows.append(
            {
                **labels,
                "contender": name,
                **summary,
                "speedup": speedup,
                "error": errors[name],
                "rounds": len(seconds),
            }
        )
    return rows


def add_memory(rows: Sequence[dict[str, Any]], mode: str, options: argparse.Namespace) -> None:
    """Peak memory of each contender, in a process of its own."""
    for row in rows:
        name, layout = row["contender"].rsplit(", ", 1)
        settings = {
            "name": name,
            "mode": mode,
            "threads": torch.get_num_threads(),
            "image_size": options.image_size,
            "variant": row["variant"],
            "layout": layout,
            "device": options.device,
        }
        peaks = peak_memory("benchmarks.training:build_step", settings, [row["batch"]])
        row["peak_mib"] = peaks.get(row["batch"])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, 7, RESULTS)
    parser.add_argument("--variants", nargs="+", default=["s12"], choices=VARIANTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[8])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    names = training.CONTENDERS
    parser.add_argument("--contenders", nargs="+", default=list(training.DEFAULT), choices=names)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory")
    parser.add_argument("--name", default="training", help="of the CSV and the chart")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    machine = prepare(options) | {"eager": EAGER_SOURCE}
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    red: list[str] = []
    for variant, mode, size in product(options.variants, options.modes, options.batches):
        labels = {
            "variant": variant,
            "dtype": mode,
            "direction": "training step",
            "batch": size,
            "image_size": options.image_size,
            "device": options.device,
        }
        try:
            fresh = bench(labels, Setting(variant, device=options.device), mode, options)
        except Disagreement as disagreement:
            red.append(str(disagreement))
            continue
        if not options.no_memory:
            add_memory(fresh, mode, options)
        add_rates(fresh)
        print(table(fresh, COLUMNS))
        rows += fresh
    path = options.out / f"{options.name}.csv"
    return conclude(rows, red, path, machine, "Training: time per step")


if __name__ == "__main__":
    sys.exit(main())

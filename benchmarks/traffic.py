"""Counts what every op, a block and a stage launch and move, beside plain PyTorch.

    python -m benchmarks.traffic                      # S12 and M36, bfloat16, batch 1
    python -m benchmarks.traffic --dtypes float32 --layouts nchw --variants s12
    python -m benchmarks.traffic --show               # what is in the CSV, CUDA C++ beside Triton

Runs on a simulated GPU only, and says so elsewhere. Writes benchmarks/results/traffic.csv and a
chart beside it. A pass of S is as many bytes as x has; `passes` counts activations, the parameters,
their gradients and partial sums are in `parameter_bytes`. PyTorch's operators are counted as one
launch that reads each operand and writes each result once, which is the least that they do.

The times are modelled, not measured: bytes over the bandwidth of the GPU's memory, no launch, no
arithmetic.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poolformer_kernels import PoolFormerConfig, modules
from poolformer_kernels.models.poolformer.modeling import PoolFormerEncoder
from poolformer_kernels.modules import PoolFormerBlock
from poolformer_kernels.ops import _common

from . import counting, plots
from .counting import Counts
from .op_cases import DTYPES, LAYOUTS, make_arguments, stage_shapes
from .plans import PLANS, Plan
from .report import RESULTS, environment, read_csv, table, write_csv

FORWARD, GIVEN, BACKWARD = "forward", "forward, statistics given", "backward"
OPS = dict.fromkeys(("pool_mixer", "mlp", "group_norm", "block"), (FORWARD, GIVEN, BACKWARD))
OPS["stage"] = (FORWARD, BACKWARD)
KEEPS_HIDDEN = ("mlp", "block", "stage")
# x read and y written; dy and x read and dx written.
LEAST_PASSES = {FORWARD: 2, GIVEN: 2, BACKWARD: 3}
BYTES_PER_US = {"h100": 3.35e6, "a100": 2.0e6, "rtx4090": 1.0e6}
COLUMNS = {
    "variant": "variant|<",
    "op": "op|<10",
    "direction": "direction|<25",
    "shape": "shape|<11",
    "dtype": "dtype|<8",
    "contender": "backend|<7",
    "launches": "launches|d",
    "launches_once": "once a stage|d",
    "passes": "passes of S|7.2f",
    "least_passes": "least|d",
    "activation_bytes": "bytes|10d",
    "parameter_bytes": "of parameters|10d",
    "modelled_us_h100": "H100 modelled us|7.2f",
}


@dataclass(frozen=True)
class Setting:
    """One cell of the grid. shape: (B, C, H, W) of x; blocks: of a stage."""

    op: str
    direction: str
    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    layout: str = "nhwc"
    contender: str = "triton"
    blocks: int = 1

    @property
    def plan(self) -> Plan:
        return PLANS[self.contender]

    @property
    def activations(self) -> tuple[int, int]:
        """Bytes of x and of the MLP's hidden."""
        x = torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize
        return x, 4 * x

    def of_batch(self, batch: int) -> Setting:
        return replace(self, shape=(batch, *self.shape[1:]))

    def check(self) -> None:
        """Refuse shapes whose activations cannot be told from weights by their size."""
        _, channels, height, width = self.shape
        if height * width in (channels, 4 * channels):
            raise ValueError(
                f"x of shape {self.shape} or its hidden is as large as the MLP's weights, from "
                "which traces tell them by size; take another --image-size."
            )


def place(value: Any, setting: Setting) -> Any:
    """A tensor or module on the device, in the setting's dtype."""
    return value.to("cuda", DTYPES[setting.dtype])


def subject(setting: Setting) -> tuple[Callable[..., Any], list[Tensor]]:
    """What is counted, as a function of (x, stats), and its parameters."""
    channels = setting.shape[1]
    if setting.op == "block":
        block = place(PoolFormerBlock(channels), setting)
        return partial(call_block, block), list(block.parameters())
    if setting.op == "stage":
        config = PoolFormerConfig(
            depths=[setting.blocks, 1, 1, 1], hidden_sizes=[channels, 8, 8, 8]
        )
        encoder = PoolFormerEncoder(config)
        blocks = place(encoder.block[0], setting)
        return partial(call_stage, encoder, blocks), list(blocks.parameters())
    arguments = make_arguments(setting.op, (1, channels, 1, 1))
    del arguments["x"]
    arguments = {name: place(value, setting).requires_grad_() for name, value in arguments.items()}
    return partial(call_op, setting.op, arguments), list(arguments.values())


def call_op(op: str, arguments: dict[str, Tensor], x: Tensor, stats: Tensor | None) -> Any:
    returned = {} if op == "group_norm" else {"return_stats": stats is not None}
    return getattr(modules, op)(x, **arguments, stats=stats, **returned)


def call_block(block: nn.Module, x: Tensor, stats: Tensor | None) -> Any:
    return block(x, stats, return_stats=stats is not None)


def call_stage(encoder: PoolFormerEncoder, blocks: nn.ModuleList, x: Tensor, stats: None) -> Tensor:
    return encoder._run_blocks(blocks, x)


def statistics_like(setting: Setting, x: Tensor) -> Tensor | None:
    """Statistics as the op before this one would hand them on: as many partial ones."""
    if setting.direction != GIVEN or setting.plan.backend == "torch":
        return None
    producer = "mlp" if setting.op in ("pool_mixer", "block") else "pool_mixer"
    return torch.ones_like(_common.fake_stats(producer, x, 1, True, setting.plan.backend))


def measure(setting: Setting) -> Counts:
    """What one call of the setting launches and moves."""
    x = place(torch.randn(setting.shape), setting).contiguous(memory_format=LAYOUTS[setting.layout])
    run, parameters = subject(setting)
    stats = statistics_like(setting, x)
    with setting.plan.chosen():
        if setting.direction != BACKWARD:
            with torch.set_grad_enabled(setting.plan.save_hidden):
                return counting.count(lambda: run(x, stats), setting.activations)
        y = run(x.requires_grad_(), stats)
        upstream = torch.randn_like(y)
        return counting.count(
            lambda: torch.autograd.grad(y, [x, *parameters], upstream), setting.activations
        )


def counts(setting: Setting) -> Counts:
    """As `measure`, with what the activations move of PyTorch's operators.

    Traces do not say what of an operator's bytes is the parameters': those that do not grow with
    the batch.
    """
    counted = measure(setting)
    if setting.plan.backend != "torch":
        return counted
    batch = setting.shape[0]
    return replace(counted, activation=measure(setting.of_batch(2 * batch)).moved - counted.moved)


def block_of_stage(setting: Setting) -> tuple[Counts, int]:
    """What one block more adds to a stage, and the launches that a stage has besides."""
    two, three = (counts(replace(setting, blocks=blocks)) for blocks in (2, 3))
    block = three - two
    return block, two.launches - 2 * block.launches


def row_of(setting: Setting) -> dict[str, Any]:
    setting.check()
    once = None
    if setting.op == "stage":
        counted, once = block_of_stage(setting)
    else:
        counted = counts(setting)
    times = {f"modelled_us_{gpu}": counted.moved / rate for gpu, rate in BYTES_PER_US.items()}
    return {
        "op": setting.op,
        "direction": setting.direction,
        "shape": "x".join(map(str, setting.shape)),
        "dtype": setting.dtype,
        "layout": setting.layout,
        "contender": setting.contender,
        "launches": counted.launches,
        "launches_once": once,
        "load_bytes": counted.loaded,
        "store_bytes": counted.stored,
        "requested_bytes": counted.requested,
        "activation_bytes": counted.activation,
        "parameter_bytes": counted.moved - counted.activation,
        "passes": counted.activation / setting.activations[0],
        "least_passes": LEAST_PASSES[setting.direction],
        **times,
    }


def side_by_side(rows: Iterable[dict[str, Any]]) -> str:
    """Launches and passes of CUDA C++ and Triton, a line for each op, shape and direction.

    In all: with parameters, their gradients and partial sums, in units of S as passes are.
    """
    keys = ("op", "variant", "stage", "direction", "shape", "dtype", "layout")
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(tuple(row[key] for key in keys), {key: row[key] for key in keys})
        in_all = row["passes"] * (1 + row["parameter_bytes"] / row["activation_bytes"])
        counted = {"launches": row["launches"], "passes": row["passes"], "in all": in_all}
        line |= {f"{row['contender']} {name}": value for name, value in counted.items()}
    columns = {key: f"{key}|<" for key in ("op", "direction", "shape", "dtype", "layout")}
    for contender in ("cuda", "triton", "torch"):
        columns[f"{contender} launches"] = f"{contender} launches|.0f"
        columns |= {
            f"{contender} {name}": f"{contender} {name}|.2f" for name in ("passes", "in all")
        }
    return table(sorted(lines.values(), key=lambda line: [*OPS].index(line["op"])), columns)


def grid(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Setting]]:
    """(labels, setting) of every cell: s24 and s36 have the shapes of s12."""
    for variant, dtype, layout in product(options.variants, options.dtypes, options.layouts):
        shapes = stage_shapes(variant, options.batch, options.image_size)
        for stage in options.stages:
            labels = {"variant": variant, "stage": stage}
            for op, contender in product(options.ops, options.contenders):
                plan = PLANS[contender]
                if plan.save_hidden and op not in KEEPS_HIDDEN:
                    continue
                for direction in OPS[op]:
                    shape = shapes[stage - 1]
                    yield labels, Setting(op, direction, shape, dtype, layout, contender)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV and the chart")
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=OPS)
    parser.add_argument("--variants", nargs="+", default=["s12", "m36"], choices=["s12", "m36"])
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2, 3, 4], choices=range(1, 5))
    parser.add_argument("--contenders", nargs="+", default=list(PLANS), choices=PLANS)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=list(DTYPES)[:3])
    parser.add_argument("--layouts", nargs="+", default=["nhwc"], choices=LAYOUTS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--image-size", type=int, default=224, help="smaller is quicker to simulate"
    )
    parser.add_argument("--show", action="store_true", help="count nothing, print what was counted")
    return parser.parse_args(arguments)


def versions() -> dict[str, Any]:
    """The columns that every row carries: no machine, since the counts are the same on each."""
    known = environment()
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": known["torch"],
        "triton": importlib.import_module("triton").__version__,
        **{key: known[key] for key in ("package", "commit", "date")},
    }


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.show:
        print(side_by_side(read_csv(options.out / "traffic.csv")))
        return 0
    if (reason := counting.why_not()) is not None:
        print(reason, file=sys.stderr)
        return 2
    if counting.TRACE not in os.environ:
        return counting.run_traced("benchmarks.traffic", arguments)
    rows = []
    for labels, setting in grid(options):
        rows.append({**labels, **row_of(setting)})
        print(table(rows[-1:], COLUMNS, header=len(rows) == 1), flush=True)
    path = write_csv(options.out / "traffic.csv", rows, versions())
    print(side_by_side(rows))
    print(f"wrote {path} and {plots.plot_traffic(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

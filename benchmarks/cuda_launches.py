"""Records threads and shared memory of the CUDA C++ launches: results/cuda_launches.csv.

    python -m benchmarks.cuda_launches              # every op, dtype and layout, S12 and M36
    python -m benchmarks.cuda_launches --ops mlp

Runs on a simulated GPU only, and says so elsewhere. A row is a kernel with so many threads and so
much shared memory, and what it is used for. Other targets' rows stay: run it with the simulator's
architecture set to 80 and to 120, which differ in shared memory. benchmarks/cuda_resources.py needs
the table for occupancy.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from poolformer_kernels import ops

from . import counting
from .op_cases import DTYPES, LAYOUTS, make_arguments, stage_shapes
from .report import RESULTS
from .typed_csv import read_rows, write_rows

TABLE = RESULTS / "cuda_launches.csv"
OPS = ("pool_mixer", "mlp", "group_norm")
# x's dtype, and after + that of the products under autocast.
KINDS = ("float32", "bfloat16", "float16", "float32+bfloat16", "float32+float16")
ODD = (1, 13, 6, 5)  # no vectors of channels


@dataclass(frozen=True)
class CudaLaunch:
    """kernel: as benchmarks/cuda_resources.py writes it; shared: bytes in all. op to shape: uses,
    joined by blanks."""

    kernel: str
    target: str
    threads: int
    shared: int
    op: str
    dtype: str
    layout: str
    shape: str

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.kernel, self.target, self.threads, self.shared


@dataclass(frozen=True)
class Use:
    """A call of an op, forward and backward. shape: (B, C, H, W)."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    pool_size: int = 3


def short_name(demangled: str) -> str:
    """Without namespaces and result."""
    name = re.sub(r"\b[a-z]\w*::|\(anonymous namespace\)::", "", demangled.removeprefix("void "))
    return name.replace(" >", ">")


def uses(chosen: Iterable[str] = OPS) -> Iterator[Use]:
    """PoolFormer's widths, and for the mixer other windows and what has no vectors."""
    shapes = [shape for variant in ("s12", "m36") for shape in stage_shapes(variant, 1)]
    for op, dtype, layout in product(chosen, KINDS, LAYOUTS):
        if "+" in dtype and op != "mlp":
            continue
        yield from (Use(op, shape, dtype, layout) for shape in (*shapes, ODD))
        if op == "pool_mixer":
            yield from (Use(op, shape, dtype, layout, 5) for shape in (shapes[3], ODD))


def run(use: Use) -> None:
    kind, _, products = use.dtype.partition("+")
    x = torch.randn(use.shape).to("cuda", DTYPES[kind])
    x = x.contiguous(memory_format=LAYOUTS[use.layout])
    arguments: dict[str, Any] = make_arguments(use.op, use.shape)
    del arguments["x"]
    arguments = {name: value.to("cuda", DTYPES[kind]) for name, value in arguments.items()}
    options: dict[str, Any] = {"pool_size": use.pool_size} if use.op == "pool_mixer" else {}
    values = [x, *arguments.values()]
    for value in values:
        value.requires_grad_()
    with torch.autocast("cuda", DTYPES.get(products), enabled=bool(products)):
        y = getattr(ops, use.op)(x, **arguments, **options, backend="cuda")
    torch.autograd.grad(y, values, torch.randn_like(y))


def recorded(use: Use) -> list[CudaLaunch]:
    """The launches of a use. Needs SIMGPU_TRACE; see counting.run_traced."""
    major, minor = torch.cuda.get_device_capability()
    shape = "x".join(map(str, use.shape[1:]))
    return [
        CudaLaunch(
            short_name(row["kernel"]), f"sm_{major}{minor}", row["block"][0], row["shared_bytes"],
            use.op, use.dtype, use.layout, shape,
        )
        for row in counting.traced(lambda: run(use))
        if row["kind"] == "cuda"
    ]  # fmt: skip


def merged(launches: Iterable[CudaLaunch]) -> list[CudaLaunch]:
    """One row a kernel, target, number of threads and of bytes."""
    found: dict[tuple[str, str, int, int], CudaLaunch] = {}
    for launch in launches:
        known = found.setdefault(launch.key, launch)
        joined = {
            name: " ".join(sorted({*getattr(known, name).split(), *getattr(launch, name).split()}))
            for name in ("op", "dtype", "layout", "shape")
        }
        found[launch.key] = replace(known, **joined)
    return [found[key] for key in sorted(found)]


def read_launches(path: Path = TABLE) -> list[CudaLaunch]:
    return read_rows(path, CudaLaunch)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=OPS)
    parser.add_argument("--quick", action="store_true", help="7² and smaller, to check the table")
    parser.add_argument("--out", type=Path, default=TABLE)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if (reason := counting.why_not()) is not None:
        print(reason, file=sys.stderr)
        return 2
    if counting.TRACE not in os.environ:
        return counting.run_traced("benchmarks.cuda_launches", arguments)
    chosen = [use for use in uses(options.ops) if not options.quick or use.shape[2] <= 7]
    new = [launch for use in chosen for launch in recorded(use)]
    targets = {launch.target for launch in new}
    kept = [
        launch
        for launch in read_launches(options.out)
        if launch.target not in targets or {*launch.op.split()}.isdisjoint(options.ops)
    ]
    rows = merged([*kept, *new])
    write_rows(options.out, CudaLaunch, rows)
    print(f"{options.out}: {len(rows)} rows, on {', '.join(sorted(targets))}: {len(new)} launches")
    return 0


if __name__ == "__main__":
    sys.exit(main())

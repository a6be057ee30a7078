"""Compiles every Triton kernel for every GPU at every published width: results/resources.csv.

    python -m benchmarks.resources                  # what is new or changed; --all: everything
    python -m benchmarks.resources --ops mlp --targets sm_90 --jobs 4

Needs no GPU. A row is one specialisation of one kernel on one target: what it is used for, its
registers, spilled bytes of a thread, shared memory, occupancy, matrix instructions, and the widest
access of a thread. Rows stay as long as the source of the kernel and of all that it calls, the way
it is specialised, and Triton's version stay. tests/test_resources.py holds the table to limits.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
import triton
from tqdm import tqdm

from poolformer_kernels.kernels import architecture, group_norm, mlp, pool_mixer

from .ahead_of_time import TARGETS, Launch, compiled, recorded, source_digest
from .op_cases import DTYPES, LAYOUTS, stage_shapes
from .report import RESULTS
from .typed_csv import read_rows, write_rows

TABLE = RESULTS / "resources.csv"
BATCH = 256  # statistics of a whole batch are split as they are in training
SHAPES = [shape for variant in ("s12", "m36") for shape in stage_shapes(variant, BATCH)]
# x's dtype, and after + that of the products where it is another: mlp under autocast.
KINDS = ("float32", "bfloat16", "float16", "float32+bfloat16")
OPS = ("pool_mixer", "mlp", "group_norm")
EPS = 1e-5


@dataclass(frozen=True)
class Use:
    """One way to call an op. shape: (B, C, H, W)."""

    op: str
    direction: str
    shape: tuple[int, ...]
    dtype: str
    layout: str


@dataclass
class Row:
    """A specialisation of a kernel on a target. op to layout: its uses, joined by blanks.

    tile: its constants that are sizes. spilled: bytes of a thread in local memory. occupancy:
    resident warps ÷ the most there can be. matrix: the instruction that multiplies matrices.
    load_bytes, store_bytes: the widest access to global memory. source: digest of the kernel and of
    all that it calls; specialisation: of the launch.
    """

    op: str
    direction: str
    kernel: str
    shape: str
    dtype: str
    layout: str
    target: str
    tile: str
    warps: int
    registers: int
    spilled: int
    shared: int
    shared_limit: int
    occupancy: float
    matrix: str
    load_bytes: int
    store_bytes: int
    source: str
    specialisation: str
    triton: str

    @property
    def key(self) -> tuple[str, str]:
        return self.target, self.specialisation


# What only a compiler knows.
TOLD = ("registers", "spilled", "shared", "occupancy", "matrix", "load_bytes", "store_bytes")


def call_on_meta(use: Use) -> list[Launch]:
    """The launches of `use`, with every parameter there and statistics asked for, none given."""
    dtype, product_dtype = (DTYPES[use.dtype.split("+")[i]] for i in (0, -1))

    def meta(*size: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=kind, device="meta")

    batch, channels = use.shape[:2]
    hidden = 4 * channels
    x = torch.empty(use.shape, dtype=dtype, device="meta", memory_format=LAYOUTS[use.layout])
    vector, factor = meta(channels), meta(batch, kind=torch.float32)
    saved = meta(batch, 1, 2, kind=torch.float32)
    forward = use.direction == "forward"
    with recorded() as launches:
        if use.op == "group_norm":
            if forward:
                group_norm.forward(x, None, vector, vector, 1, EPS)
            else:
                group_norm.backward(x, x, saved, vector)
        elif use.op == "pool_mixer":
            if forward:
                pool_mixer.forward(x, None, vector, vector, factor, 3, 1, EPS, True)
            else:
                pool_mixer.backward(x, x, saved, vector, vector, factor, 3)
        else:
            sizes = ((hidden, channels), (hidden,), (channels, hidden), (channels,))
            weights = [meta(*size, kind=product_dtype) for size in sizes]
            parameters = [vector, vector, *weights, vector, factor, None, "gelu"]
            kept = meta(batch, *use.shape[2:], hidden, kind=product_dtype)
            for keep in (False, True):
                if forward:
                    mlp.forward(x, None, *parameters, 1, EPS, True, keep)
                else:
                    mlp.backward(x, x, saved, kept if keep else None, *parameters)
    return launches


def specialisation_digest(launch: Launch) -> str:
    return hashlib.sha256(repr(launch.compiles_as).encode()).hexdigest()[:12]


def tile_of(launch: Launch) -> str:
    """The constants of a kernel that are sizes: "BLOCK_ROWS 64 BLOCK_HIDDEN 32"."""
    sizes = [(n, v) for n, v in launch.constants if n.isupper() and type(v) is int]
    return " ".join(f"{name} {value}" for name, value in sizes)


def expected() -> list[tuple[Row, Launch]]:
    """Every row that the table must have, without what only a compiler knows, and its launch."""
    sources: dict[str, str] = {}
    found: dict[tuple[str, str], tuple[Row, Launch]] = {}
    uses = [
        Use(op, direction, shape, dtype, layout)
        for op, direction, dtype, layout, shape in product(
            OPS, ("forward", "backward"), KINDS, LAYOUTS, SHAPES
        )
        if op == "mlp" or "+" not in dtype
    ]
    for target in TARGETS:
        with architecture.tiles_for(target):
            calls = [(use, launch) for use in uses for launch in call_on_meta(use)]
        for use, launch in calls:
            if launch.name not in sources:
                sources[launch.name] = source_digest(launch.kernel)
            row = Row(
                use.op, use.direction, launch.name, "x".join(map(str, use.shape[1:])), use.dtype,
                use.layout, target, tile_of(launch), launch.warps, 0, 0, 0, TARGETS[target].shared,
                0.0, "", 0, 0, sources[launch.name], specialisation_digest(launch),
                triton.__version__,
            )  # fmt: skip
            before, _ = found.setdefault(row.key, (row, launch))
            for name in ("op", "direction", "shape", "dtype", "layout"):
                words = dict.fromkeys([*getattr(before, name).split(), getattr(row, name)])
                setattr(before, name, " ".join(words))
    return list(found.values())


def measured(row: Row, launch: Launch) -> Row:
    """`row` with what the compiler says."""
    code = compiled(launch, row.target)
    return replace(
        row,
        registers=code.registers,
        spilled=code.stack,
        shared=code.shared,
        occupancy=round(code.occupancy, 4),
        matrix=code.matrix,
        load_bytes=code.load_bytes,
        store_bytes=code.store_bytes,
    )


def read(path: Path = TABLE) -> dict[tuple[str, str], Row]:
    return {row.key: row for row in read_rows(path, Row)}


def write(table: Iterable[Row], path: Path) -> None:
    order = sorted(table, key=lambda r: (r.kernel, r.target, r.op, r.dtype, r.layout, r.shape))
    write_rows(path, Row, order)


def is_current(row: Row, known: Row | None) -> bool:
    """Whether `known` tells what a compiler would say of `row` now."""
    return known is not None and (known.source, known.triton) == (row.source, row.triton)


_pending: list[tuple[Row, Launch]] = []  # what the processes of a pool share, as they are forked


def _measure(index: int) -> Row:
    return measured(*_pending[index])


def renew(options: argparse.Namespace) -> int:
    """Compile what the table lacks; rows that nothing uses any more go. Returns how many spill."""
    old = read(options.out)
    rows, pending = {}, []
    for row, launch in expected():
        known = old.get(row.key)
        if known is not None:
            rows[row.key] = known
        chosen = row.target in options.targets and not {*row.op.split()}.isdisjoint(options.ops)
        if chosen and (options.all or not is_current(row, known)):
            pending.append((row, launch))
        elif is_current(row, known):
            told = {name: getattr(known, name) for name in TOLD}
            rows[row.key] = replace(row, **told)
    _pending[:] = pending
    pool = multiprocessing.get_context("fork").Pool(options.jobs) if options.jobs > 1 else None
    try:
        indices = range(len(pending))
        results = pool.imap_unordered(_measure, indices) if pool else map(_measure, indices)
        for count, row in enumerate(tqdm(results, total=len(pending), unit=" kernels"), 1):
            rows[row.key] = row
            if count % 20 == 0:  # an interrupted run goes on from here
                write(rows.values(), options.out)
    finally:
        if pool:
            pool.terminate()
    write(rows.values(), options.out)
    print(f"{options.out}: {len(rows)} rows, {len(pending)} of them new")
    return sum(row.spilled > 0 for row in rows.values())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ops", nargs="+", default=OPS, choices=OPS)
    parser.add_argument("--targets", nargs="+", default=tuple(TARGETS), choices=TARGETS)
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--all", action="store_true", help="also what has not changed")
    parser.add_argument("--out", type=Path, default=TABLE)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    spilling = renew(parse(arguments))
    if spilling:
        print(f"{spilling} rows spill", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())

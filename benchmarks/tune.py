"""Times tiles of the MLP's kernels on the GPU at hand and prints the table that it would have.

    python -m benchmarks.tune                                  # every part and width, bfloat16
    python -m benchmarks.tune --parts fused --channels 64 96   # some
    python -m benchmarks.tune --parts fused --channels 128 --tiles 128,64,8,2 64,64,4,2
    python -m benchmarks.tune --check-only                     # right or wrong, nothing is timed

For each part and width, the tile in poolformer_kernels/kernels/mlp_config.py and its rivals: those
that spill, or want more than a block may have, are dropped; the others must be as exact as plain
PyTorch (the gate of the benchmarks, two images, float64); what is left is timed in turns, only the
launches that the entry decides. The last lines are entries of mlp_config's tables, to be pasted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest import mock

import torch
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from poolformer_kernels import ops
from poolformer_kernels.kernels import mlp_config
from poolformer_kernels.kernels.architecture import architecture
from poolformer_kernels.kernels.mlp_config import FusedConfig, GemmConfig

from .harness import Contender, Disagreement, gate, measure
from .op_cases import DTYPES, LAYOUTS, Setting, make_arguments, make_case, make_step, stage_shapes

Tile = FusedConfig | GemmConfig
WARPS = (4, 8)
STAGES = (2, 3, 4)


@dataclass(frozen=True)
class Part:
    """A table of mlp_config. kernels: those that its entries decide. make: a tile from numbers."""

    name: str
    table: dict[Any, dict[str, Any]]
    kernels: tuple[str, ...]
    make: type[FusedConfig] | type[GemmConfig]
    numbers: tuple[tuple[int, ...], ...]

    def keys(self, channels: int, rows: int, dtype: torch.dtype) -> list[Any]:
        """The entries that an image of `rows` pixels uses: one, or as many as it has products."""
        exact = dtype == torch.float32
        fused = mlp_config.fused_config(channels, 1, dtype) is not None
        if self.name == "fused":
            return [next(most for most in self.table if channels <= most)] if fused else []
        if self.name == "weight gradient":
            return ["float32" if exact else "16 bits"]
        if exact:
            return ["float32"]
        if self.name == "hidden gradient":
            return ["small image" if rows <= 64 else "large image"]
        widths = (channels,) if fused else (4 * channels, channels)
        wide = ["128 | columns" if width % 128 == 0 else "64 columns" for width in widths]
        return ["small image"] if rows <= 64 else list(dict.fromkeys(wide))

    def rivals(self, channels: int) -> list[Tile]:
        """Tiles worth a look: sums must leave half of a thread's 255 registers."""
        tiles = [self.make(*numbers) for numbers in product(*self.numbers)]
        sums = 2 if "gradient" in self.name else 1

        def registers(tile: Tile) -> float:
            width = tile.columns if isinstance(tile, GemmConfig) else channels
            return sums * tile.rows * width / (32 * tile.warps)

        return [tile for tile in tiles if 8 <= registers(tile) <= 128]


PRODUCTS = ((64, 128), (32, 64, 128, 256), (16, 32, 64), WARPS, STAGES)
PARTS = {
    part.name: part
    for part in (
        Part(
            "fused",
            mlp_config.FUSED,
            ("fused_kernel",),
            FusedConfig,
            ((32, 64, 128, 256), (16, 32, 64, 128), WARPS, STAGES[:2]),
        ),
        Part(
            "product",
            mlp_config.PRODUCT,
            ("hidden_kernel", "residual_kernel", "input_gradient_kernel"),
            GemmConfig,
            PRODUCTS,
        ),
        Part(
            "hidden gradient",
            mlp_config.HIDDEN_GRADIENT,
            ("hidden_gradient_kernel",),
            GemmConfig,
            PRODUCTS,
        ),
        Part(
            "weight gradient",
            mlp_config.WEIGHT_GRADIENT,
            ("weight_parts_kernel", "weight_gradients_kernel"),
            GemmConfig,
            ((32, 64, 128), (32, 64, 128), (16, 32, 64), WARPS, STAGES),
        ),
    )
}


@contextmanager
def using(tiles: dict[str, Any], tile: Tile) -> Iterator[None]:
    """`tile` is the entry for this GPU."""
    with mock.patch.dict(tiles, {architecture(): tile}):
        yield


def numbers_of(tile: Tile) -> str:
    """How it is written in the table, without what it has by default."""
    values = [tile.rows]
    values += [tile.hidden] if isinstance(tile, FusedConfig) else [tile.columns, tile.depth]
    values += [tile.warps, tile.stages]
    if isinstance(tile, GemmConfig) and tile.registers:
        values.append(tile.registers)
    return f"{type(tile).__name__}({', '.join(map(str, values))})"


def launches_of(step: Callable[[], Any], names: tuple[str, ...]) -> Callable[[], None]:
    """What `step` launches of these kernels, to be launched again alone.

    Raises OutOfResources, also where one spills.
    """
    calls: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] = []
    run = JITFunction.run

    def noted(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **kwargs)
        if self.fn.__name__ in names:
            if getattr(kernel, "n_spills", 0):
                raise OutOfResources(kernel.n_spills, 0, "spilled registers")
            calls.append((self, args, kwargs))
        return kernel

    with mock.patch.object(JITFunction, "run", noted):
        step()
    torch.cuda.synchronize()

    def again() -> None:
        for kernel, args, kwargs in calls:
            kernel.run(*args, **kwargs)

    return again


def step_of(shape: tuple[int, ...], dtype: str, device: str) -> Callable[[], Any]:
    """Forward and backward of mlp on the Triton kernels."""
    exact = make_arguments("mlp", shape)
    arguments = {name: t.to(device, DTYPES[dtype]) for name, t in exact.items()}
    arguments["x"] = arguments["x"].contiguous(memory_format=LAYOUTS["nhwc"])

    def mlp(**leaves: torch.Tensor) -> torch.Tensor:
        return ops.mlp(**leaves, backend="triton")

    return make_step(mlp, arguments)


def refused(shape: tuple[int, ...], dtype: str, device: str, layout: str = "nhwc") -> str | None:
    """Why the present tiles' results are wrong, or None. shape: of few images."""
    setting = Setting("mlp", shape, dtype, layout, device, backward=True)
    try:
        gate(make_case(setting, ["triton"]))
    except Disagreement as disagreement:
        return str(disagreement)
    except OutOfResources as lack:
        return str(lack)
    return None


def tune(
    part: Part, key: Any, shape: tuple[int, ...], rivals: list[Tile], options: argparse.Namespace
) -> Tile:
    """The fastest tile for `key`, the present one where nothing was timed. Prints what it finds."""
    tiles = part.table[key]
    present = tiles.get(architecture(), tiles["any"])
    step = None if options.check_only else step_of(shape, options.dtype, options.device)
    contenders: dict[str, tuple[Tile, Contender]] = {}
    for tile in dict.fromkeys([present, *rivals]):
        name = numbers_of(tile)
        with using(tiles, tile):
            reason = refused((min(2, shape[0]), *shape[1:]), options.dtype, options.device)
            if reason is None and step is not None:
                try:
                    again = launches_of(step, part.kernels)
                    contenders[name] = tile, Contender(name, again)
                except OutOfResources as lack:
                    reason = str(lack)
        print(f"  {name}: {'right' if reason is None else reason}", flush=True)
    if not contenders:
        return present
    samples = measure(
        [contender for _, contender in contenders.values()],
        options.rounds,
        min_sample_s=options.min_sample_ms / 1e3,
        device=options.device,
    )
    medians = {name: statistics.median(times) for name, times in samples.items()}
    base = medians.get(numbers_of(present))
    for name in sorted(medians, key=medians.__getitem__)[: options.show]:
        gain = (
            "" if base is None else f"  {base / medians[name]:5.2f} times the present one's speed"
        )
        print(f"  {name:36} {medians[name] * 1e6:9.1f} us{gain}")
    best = min(medians, key=medians.__getitem__)
    if base is not None and base / medians[best] < 1 + options.least_gain:
        return present
    return contenders[best][0]


def entry(key: Any, tiles: dict[str, Any], tile: Tile) -> str:
    """A line of a table with `tile` for this GPU."""
    merged = tiles if tiles.get(architecture(), tiles["any"]) == tile else tiles | {
        architecture(): tile
    }  # fmt: skip
    inside = ", ".join(
        f'"{name}": {"None" if value is None else numbers_of(value)}'
        for name, value in merged.items()
    )
    return (
        f"    {key if isinstance(key, int) else repr(key).replace(chr(39), chr(34))}: {{{inside}}},"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    widths = {s[1]: s for name in ("s12", "m36") for s in stage_shapes(name, 1)}
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--channels", nargs="+", type=int, default=list(widths))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--edge", type=int, help="height and width; default: the width's stage")
    parser.add_argument("--tiles", nargs="+", help="the rivals, as the numbers of mlp_config")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--min-sample-ms", type=float, default=5)
    parser.add_argument("--least-gain", type=float, default=0.02, help="below, nothing is changed")
    parser.add_argument("--show", type=int, default=5, help="how many of the fastest are printed")
    parser.add_argument("--check-only", action="store_true", help="compare, time nothing")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    for channels in options.channels:
        if channels not in widths and options.edge is None:
            parser.error(f"--channels {channels} is no published width: give --edge too")
    if options.tiles:
        lengths = {len(text.split(",")) for text in options.tiles}
        wanted = {4} if options.parts == ["fused"] else {5, 6}
        if len(options.parts) > 1 or not lengths <= wanted:
            parser.error(
                "--tiles needs a single part of --parts, and tiles as rows,hidden,warps,stages for "
                "fused or rows,columns,depth,warps,stages[,registers] for the others"
            )
    options.shapes = [
        (options.batch, c, *(2 * (options.edge,) if options.edge else widths[c][2:]))
        for c in options.channels
    ]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("tune: PyTorch sees no GPU here, and there is nothing to time without one. "
              "`python -m benchmarks.resources` compiles the tiles for GPUs that are elsewhere.",
              file=sys.stderr)  # fmt: skip
        return 2
    print(f"{torch.cuda.get_device_name(options.device)}: tiles for {architecture()}")
    found: dict[str, dict[Any, str]] = {}
    for name, shape in product(options.parts, options.shapes):
        part, rows = PARTS[name], shape[2] * shape[3]
        for key in part.keys(shape[1], rows, DTYPES[options.dtype]):
            if key in found.get(name, {}):
                continue
            rivals = part.rivals(shape[1])
            if options.tiles:
                rivals = [part.make(*map(int, text.split(","))) for text in options.tiles]
            print(f"{name} {key!r}, {'x'.join(map(str, shape))} {options.dtype}")
            tile = tune(part, key, shape, rivals, options)
            found.setdefault(name, {})[key] = entry(key, part.table[key], tile)
    for name, lines in found.items():
        print(f"{name}:")
        print("\n".join(lines.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

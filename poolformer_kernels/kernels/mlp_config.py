"""Tiles of the MLP's kernels: small tables by shape and dtype, with the reason for each number."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ._common import ceil_div, next_power_of_2
from .architecture import architecture, is_amd

PROGRAMS = 264  # two for each multiprocessor of an H100: what weight gradients are split into
VECTOR_BLOCK = 128  # channels, or hidden units, of a program that only sums vectors


def _options(warps: int, stages: int, registers: int = 0) -> dict[str, int]:
    options = {"num_warps": warps, "num_stages": stages}
    if registers and not is_amd():
        options["maxnreg"] = registers
    return options


@dataclass(frozen=True)
class GemmConfig:
    """Tile of a product: rows × columns of the result, `depth` of the sum at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int = 0  # of a thread; 0: ptxas chooses

    @property
    def options(self) -> dict[str, int]:
        return _options(self.warps, self.stages, self.registers)

    def tiles(self, rows: int, columns: int) -> int:
        """Programs for a result of rows × columns."""
        return ceil_div(rows, self.rows) * ceil_div(columns, self.columns)


@dataclass(frozen=True)
class FusedConfig:
    """Tile of the fused forward: rows, and hidden units at a time; channels in two parts."""

    rows: int
    hidden: int
    warps: int
    stages: int
    parts: tuple[int, int] = (0, 0)

    @property
    def options(self) -> dict[str, int]:
        return _options(self.warps, self.stages)

    @property
    def partials(self) -> int:
        """Partial statistics of a program."""
        return 2 if self.parts[1] else 1


# How to read these tables: for each situation the tile of "any" architecture, and of those where
# another one is better, each with its reason. None spills, in any dtype and layout: see
# benchmarks/results/resources.csv. `python -m benchmarks.tune` measures them on the GPU at hand.
Tiles = dict[str, Any]  # by architecture

# By the most channels. Each tile reads all weights, so more rows mean fewer reads from L2. The
# sums take rows · C registers, the hidden chunk with its operands most of the rest.
FUSED: dict[int, Tiles] = {
    64: {
        "any": FusedConfig(128, 64, 8, 2),  # 256 rows spill
        "sm_100": FusedConfig(128, 32, 8, 2),  # 128 registers: two blocks; 64 units spill
        "gfx942": FusedConfig(128, 32, 8, 2),  # 64 units spill with float16 and NCHW
    },
    96: {
        "any": FusedConfig(128, 16, 8, 2),  # 32 units spill on sm_120, and cost sm_100 a block
        "sm_80": FusedConfig(128, 32, 8, 2),  # one block with either; half the barriers
        "sm_90": FusedConfig(128, 64, 8, 2),  # wgmma's operands stay in shared memory: they fit
    },
    128: {
        "any": FusedConfig(64, 64, 4, 2),  # 128 rows leave registers for 16 units only
        "sm_90": FusedConfig(128, 64, 8, 2),  # as many warps as two of 64 rows; half the reads
        "sm_100": FusedConfig(128, 64, 8, 2),  # the same
        "sm_120": FusedConfig(128, 16, 8, 2),  # with 64 units 57 KB: a single block of 4 warps
    },
    192: {
        "any": FusedConfig(64, 16, 8, 2),  # all the registers that there are
        "sm_80": FusedConfig(128, 16, 8, 2),  # one block with either; half the reads
        "sm_90": FusedConfig(128, 16, 8, 2),  # the same; 32 units spill with NCHW
        "sm_100": FusedConfig(128, 32, 8, 2),  # as many warps as two blocks of 64 rows
        "sm_120": None,  # 64 rows spill; 32 read more weights than two products read hidden
    },
}

# The same where x is float32 and the products are not (autocast): a tile of x takes twice the
# registers while it is read or written.
FUSED_MIXED: dict[int, Tiles] = {
    128: FUSED[128] | {"sm_100": FusedConfig(128, 32, 8, 2)},  # 64 units spill
    192: {  # 128 rows spill
        "any": FusedConfig(64, 16, 8, 2),
        "sm_80": FusedConfig(64, 16, 8, 3),  # 8 bytes spill with two stages
        "sm_90": FusedConfig(64, 32, 8, 2),  # half the barriers
        "sm_100": FusedConfig(64, 32, 8, 2),  # the same
        "sm_120": None,
    },
}

# Products with an epilogue.
PRODUCT: dict[str, Tiles] = {
    # FMA units, whose operands want registers too: 64 columns spill, and left to itself ptxas stops
    # at 80 registers and spills all the same.
    "float32": {
        "any": GemmConfig(64, 32, 16, 8, 2, 128),
        "sm_120": GemmConfig(64, 32, 16, 8, 2, 144),  # 128 spill two registers
    },
    "small image": {"any": GemmConfig(64, 64, 32, 4, 3)},  # 128 rows would be half empty
    "128 | columns": {"any": GemmConfig(128, 128, 32, 8, 3)},  # depth 64 costs fc1 a block
    "NCHW": {
        # Rows of 14² are not aligned: an address for each element, so at most 32 of them a thread.
        "any": GemmConfig(128, 64, 32, 8, 3),
        "sm_90": GemmConfig(128, 64, 64, 8, 3),  # as in "64 columns"
        "sm_100": GemmConfig(128, 64, 64, 8, 3),
    },
    "64 columns": {
        "any": GemmConfig(128, 64, 32, 4, 3),
        # Rows of 128 bytes, the widest that wgmma and tcgen05 read; still two blocks.
        "sm_90": GemmConfig(128, 64, 64, 8, 3),
        "sm_100": GemmConfig(128, 64, 64, 8, 3),
    },
}

# Two sums a tile (h and its gradient), two operands each: half of PRODUCT's columns. 255: left to
# itself ptxas stops at 128 registers where the hidden is given, and spills two.
_LARGE: Tiles = {
    "any": GemmConfig(128, 64, 32, 8, 3, 255),
    # One block with either depth: half the barriers. 210 KB under autocast.
    "sm_90": GemmConfig(128, 64, 64, 8, 3),
    "sm_100": GemmConfig(128, 64, 64, 8, 3),
}
HIDDEN_GRADIENT: dict[str, Tiles] = {
    "float32": {"any": GemmConfig(64, 32, 16, 8, 2)},
    "small image": {"any": GemmConfig(64, 64, 32, 4, 3)},
    "large image": _LARGE,
    "NCHW": _LARGE | {"sm_120": GemmConfig(64, 64, 32, 8, 3)},  # 128 rows spill under autocast
}

# rows: hidden units; columns: channels; depth: pixels. Two sums a tile. Larger ones would mean more
# parts for as many programs, and these are written and read in float32.
WEIGHT_GRADIENT: dict[str, Tiles] = {
    "float32": {"any": GemmConfig(32, 32, 16, 4, 2)},  # FMA units, as above
    "16 bits": {
        "any": GemmConfig(64, 64, 32, 4, 3),
        "sm_80": GemmConfig(64, 64, 16, 4, 3),  # three blocks instead of two; 32 spill
        "sm_120": GemmConfig(64, 64, 16, 4, 3),  # the same
    },
}


def _here(tiles: Tiles) -> Any:
    """The entry for the architecture that tiles are chosen for."""
    return tiles.get(architecture(), tiles["any"])


def gemm_config(
    rows: int, columns: int, dtype: torch.dtype, channels_last: bool = True
) -> GemmConfig:
    """The tile of a product whose result is (rows of an image, columns).

    channels_last: whether a row of x lies side by side, be it an operand or beside the result.
    """
    if dtype == torch.float32:
        return _here(PRODUCT["float32"])
    if rows <= 64:  # 8 × 8 and smaller would half fill 128 rows
        return _here(PRODUCT["small image"])
    if not channels_last:
        return _here(PRODUCT["NCHW"])
    # 128 columns only where they divide the width: 320 is five times 64.
    return _here(PRODUCT["128 | columns" if columns % 128 == 0 else "64 columns"])


def _two_parts(channels: int) -> tuple[int, int]:
    """Powers of two that hold `channels`: one, or a half and a quarter of it (96 = 64 + 32)."""
    whole = max(16, next_power_of_2(channels))
    if whole >= 64 and channels <= whole // 4 * 3:
        return whole // 2, whole // 4
    return whole, 0


def fused_config(
    channels: int, num_groups: int, dtype: torch.dtype, x_dtype: torch.dtype | None = None
) -> FusedConfig | None:
    """The tile of the fused forward; None where two products are the better plan.

    dtype: of the products, and of x if x_dtype is None. Above 192 channels the weights that each
    tile of rows reads from L2 cost more than the hidden in memory. float32 tiles with exact
    products do not fit the registers.
    """
    most = next((most for most in FUSED if channels <= most), None)
    if most is None or num_groups > 1 or dtype == torch.float32:
        return None
    table = FUSED if x_dtype in (None, dtype) else FUSED | FUSED_MIXED
    tile = _here(table[most])
    return None if tile is None else replace(tile, parts=_two_parts(channels))


def hidden_gradient_config(rows: int, dtype: torch.dtype, channels_last: bool = True) -> GemmConfig:
    """The tile of h and its gradient: (rows of an image, hidden units)."""
    if dtype == torch.float32:
        return _here(HIDDEN_GRADIENT["float32"])
    if rows <= 64:
        return _here(HIDDEN_GRADIENT["small image"])
    return _here(HIDDEN_GRADIENT["large image" if channels_last else "NCHW"])


def weight_gradient_config(dtype: torch.dtype) -> GemmConfig:
    """rows: hidden units; columns: channels; depth: pixels."""
    return _here(WEIGHT_GRADIENT["float32" if dtype == torch.float32 else "16 bits"])


def split(batch: int, rows: int, hidden: int, channels: int, dtype: torch.dtype) -> tuple[int, int]:
    """(parts, row tiles a part) of the weight gradients, by shape and dtype alone."""
    config = weight_gradient_config(dtype)
    row_tiles = batch * ceil_div(rows, config.depth)
    parts = min(max(1, PROGRAMS // config.tiles(hidden, channels)), row_tiles)
    tiles_a_part = ceil_div(row_tiles, parts)
    return ceil_div(row_tiles, tiles_a_part), tiles_a_part


def dot_precision() -> str:
    """ "tf32" for float32 products where PyTorch's own may use it; else exact float32."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"

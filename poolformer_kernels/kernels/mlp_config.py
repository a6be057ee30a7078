"""Tiles of the MLP's kernels: small tables by shape and dtype, with the reason for each number."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._common import ceil_div, next_power_of_2

FUSED_CHANNELS = 192
PROGRAMS = 264  # two for each multiprocessor of an H100: what weight gradients are split into
VECTOR_BLOCK = 128  # channels, or hidden units, of a program that only sums vectors


def _options(warps: int, stages: int, registers: int = 0) -> dict[str, int]:
    options = {"num_warps": warps, "num_stages": stages}
    if registers and torch.version.hip is None:
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


def gemm_config(rows: int, columns: int, dtype: torch.dtype) -> GemmConfig:
    """The tile of a product whose result is (rows of an image, columns).

    Images of 8 × 8 and smaller would half fill 128 rows. 128 columns only where they divide the
    width: 320 is five times 64. float32 runs on FMA units, whose operands want registers too: 64
    columns spill, and left to itself ptxas stops at 80 registers and spills all the same.
    """
    if dtype == torch.float32:
        return GemmConfig(64, 32, 16, 8, 2, 128)
    if rows <= 64:
        return GemmConfig(64, 64, 32, 4, 3)
    if columns % 128 == 0:
        return GemmConfig(128, 128, 32, 8, 3)
    return GemmConfig(128, 64, 32, 4, 3)


@dataclass(frozen=True)
class FusedConfig:
    """Tile of the fused forward: rows, and hidden units at a time; channels in two parts."""

    rows: int
    hidden: int
    warps: int
    stages: int
    parts: tuple[int, int]

    @property
    def options(self) -> dict[str, int]:
        return _options(self.warps, self.stages)

    @property
    def partials(self) -> int:
        """Partial statistics of a program."""
        return 2 if self.parts[1] else 1


def _two_parts(channels: int) -> tuple[int, int]:
    """Powers of two that hold `channels`: one, or a half and a quarter of it (96 = 64 + 32)."""
    whole = max(16, next_power_of_2(channels))
    if whole >= 64 and channels <= whole // 4 * 3:
        return whole // 2, whole // 4
    return whole, 0


def fused_config(channels: int, num_groups: int, dtype: torch.dtype) -> FusedConfig | None:
    """The tile of the fused forward; None where two products are the better plan.

    Above 192 channels the weights that each tile of rows reads from L2 cost more than the hidden
    in memory. float32 tiles with exact products do not fit the registers. Sums take rows · C
    registers, the hidden chunk and its operands most of the rest: more rows mean fewer reads of
    the weights, and these are the most that spill nowhere from sm_80 to sm_120.
    """
    if channels > FUSED_CHANNELS or num_groups > 1 or dtype == torch.float32:
        return None
    parts = _two_parts(channels)
    if channels <= 64:
        return FusedConfig(128, 32, 8, 2, parts)
    if channels <= 96:
        return FusedConfig(128, 16, 8, 2, parts)
    if channels <= 128:
        return FusedConfig(64, 64, 4, 2, parts)
    return FusedConfig(64, 16, 8, 2, parts)


def hidden_gradient_config(rows: int, dtype: torch.dtype) -> GemmConfig:
    """Two sums a tile (h and its gradient) and two operands each: half of gemm_config's columns."""
    if dtype == torch.float32:
        return GemmConfig(64, 32, 16, 8, 2)
    return GemmConfig(64, 64, 32, 4, 3) if rows <= 64 else GemmConfig(128, 64, 32, 8, 3)


def weight_gradient_config(dtype: torch.dtype) -> GemmConfig:
    """rows: hidden units; columns: channels; depth: pixels. Two sums a tile."""
    if dtype == torch.float32:
        return GemmConfig(32, 32, 16, 4, 2)
    return GemmConfig(64, 64, 32, 4, 3)


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

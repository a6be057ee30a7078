"""Average pooling on tiles of rows × columns × channels: what the pool_mixer kernels share.

A tile is (COLUMNS, CHANNELS) of one row at a time. With 3×3 windows (ROLLING) the sums along each
row are taken once and serve the three rows whose windows hold them; other windows are summed whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton
import triton.language as tl

from ._common import VECTOR_BYTES, ceil_div, next_power_of_2, per_channel, per_image
from .architecture import is_amd, warps_for

MOST_THREADS = 128


@dataclass(frozen=True)
class Tile:
    """What a program does: `rows` rows, one after another, of columns × channels."""

    rows: int
    columns: int
    channels: int
    threads: int

    def taller(self, times: int, height: int) -> Tile:
        """`times` as many rows, but not more than there are."""
        return replace(self, rows=min(height, self.rows * max(1, times)))

    def row_blocks(self, height: int) -> int:
        return ceil_div(height, self.rows)

    def column_blocks(self, width: int) -> int:
        return ceil_div(width, self.columns)

    def channel_blocks(self, group_channels: int) -> int:
        return ceil_div(group_channels, self.channels)


def choose_tile(
    height: int, width: int, group_channels: int, channels_last: bool, itemsize: int
) -> Tile:
    """The tile of the kernels that write a tensor.

    channels_last: as many channels as divide the group's, 32 to 128, so that C = 96, 192, 320 waste
    no lane and every row of a tile is whole 64-byte pieces; columns until each of 128 threads has
    one 16-byte vector. NCHW: up to 64 columns, which lie side by side; accesses are narrow there,
    and more than four elements a thread spill. Four rows, so that the two rows of halo (which come
    from the cache) and the programs of a batch of 1 balance.
    """
    lanes = MOST_THREADS * VECTOR_BYTES // (itemsize if channels_last else 4)
    if channels_last:
        channels = min(group_channels & -group_channels, 128)
        if channels < 32:  # odd widths: mask
            channels = min(next_power_of_2(group_channels), 64)
        columns = min(next_power_of_2(width), max(lanes // channels, 8))
    else:
        columns = min(next_power_of_2(width), 64)
        channels = min(next_power_of_2(group_channels), max(lanes // columns, 1))
    threads = max(32, min(MOST_THREADS, MOST_THREADS * columns * channels // lanes))
    return Tile(min(4, height), columns, channels, threads)


def options(tile: Tile) -> dict[str, int]:
    """How the kernels are compiled for `tile`."""
    warps = {"num_warps": warps_for(tile.threads)}
    # Left to itself, ptxas stops at 96 registers and spills two to four of them.
    return warps if is_amd() else {**warps, "maxnreg": 128}


@triton.jit
def place(group_channels, height, width, rows, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """Which tile this program has: (image · G + group as int64, tile of the group, its first row,
    column and channel, tiles of a group). Columns vary fastest: neighbours in time share a halo."""
    column_blocks = tl.cdiv(width, COLUMNS)
    channel_blocks = tl.cdiv(group_channels, CHANNELS)
    tiles = tl.cdiv(height, rows) * channel_blocks * column_blocks
    image_group = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    column = tile % column_blocks * COLUMNS
    channel = tile // column_blocks % channel_blocks * CHANNELS
    row = tile // (column_blocks * channel_blocks) * rows
    return image_group, tile, row, column, channel, tiles


@triton.jit
def view_of(
    image_group, column, channel, channels, group_channels, height, width, radius,
    CHANNELS_LAST: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """(offset of the image as int64, channels (CHANNELS), their mask, view): how a tile is read.

    view: (columns, offsets of the channels, their mask, height, width, radius, strides of a row and
    a column).
    """
    groups = channels // group_channels
    offset = image_group // groups * (channels * height * width)
    in_group = channel + tl.arange(0, CHANNELS)
    mask = in_group < group_channels
    index = (image_group % groups).to(tl.int32) * group_channels + in_group
    columns = column + tl.arange(0, COLUMNS)
    if CHANNELS_LAST:
        view = (columns, index, mask, height, width, radius, width * channels, channels)
    else:
        view = (columns, index * (height * width), mask, height, width, radius, width, 1)
    return offset, index, mask, view


@triton.jit
def row_of(view, row):
    """(offsets of one row of the tile, mask): (COLUMNS, CHANNELS) each."""
    columns, channel_offsets, channel_mask, height, width, _, row_stride, column_stride = view
    offsets = row * row_stride + columns[:, None] * column_stride + channel_offsets[None, :]
    mask = (row >= 0) & (row < height) & channel_mask[None, :] & (columns < width)[:, None]
    return offsets, mask


@triton.jit
def count(position, size, radius):
    """How many of the window's places around `position` are in 0 … size − 1; 1 if none is."""
    low = tl.maximum(position - radius, 0)
    high = tl.minimum(position + radius, size - 1)
    return tl.maximum(high - low + 1, 1).to(tl.float32)


@triton.jit
def most(size, radius):
    """The largest count."""
    return tl.minimum(2 * radius + 1, size).to(tl.float32)


@triton.jit
def _shifted(pointers, shift, row_mask, view, centre, TRANSPOSED: tl.constexpr):
    """x − centre, `shift` columns further; if TRANSPOSED, weighed as in `_row_sums`."""
    columns, _, _, _, width, radius, _, column_stride = view
    column = columns + shift
    mask = row_mask & ((column >= 0) & (column < width))[:, None]
    values = tl.load(pointers + shift * column_stride, mask=mask, other=0.0).to(tl.float32) - centre
    if TRANSPOSED:
        values *= (most(width, radius) / count(column, width, radius))[:, None]
    return tl.where(mask, values, 0.0)


@triton.jit
def _row_sums(base, row, view, centre, TRANSPOSED: tl.constexpr, ROLLING: tl.constexpr):
    """(sums along one row of x − centre over each window, x): (COLUMNS, CHANNELS) each.

    TRANSPOSED: values are divided by the counts of their own windows before they are summed, which
    the largest count multiplies: without rounding, if windows are 3×3.
    """
    columns, _, channel_mask, height, width, radius, _, _ = view
    offsets, mask = row_of(view, row)
    pointers = base + offsets
    row_mask = (row >= 0) & (row < height) & channel_mask[None, :]
    middle = tl.load(pointers, mask=mask, other=0.0)
    total = tl.where(mask, middle.to(tl.float32) - centre, 0.0)
    if TRANSPOSED:
        total *= (most(width, radius) / count(columns, width, radius))[:, None]
    if ROLLING:
        total += _shifted(pointers, -1, row_mask, view, centre, TRANSPOSED)
        total += _shifted(pointers, 1, row_mask, view, centre, TRANSPOSED)
    else:
        for shift in range(1, radius + 1):
            total += _shifted(pointers, -shift, row_mask, view, centre, TRANSPOSED)
            total += _shifted(pointers, shift, row_mask, view, centre, TRANSPOSED)
    if TRANSPOSED:
        total *= most(height, radius) / count(row, height, radius)
    return total, middle


@triton.jit
def first_rows(base, row, view, centre, TRANSPOSED: tl.constexpr, ROLLING: tl.constexpr):
    """What `pooled_row` needs at the first row of a tile: sums of two rows, and x of the second.

    Without ROLLING it needs nothing, and these are zeros that nobody reads.
    """
    if ROLLING:
        above = _row_sums(base, row - 1, view, centre, TRANSPOSED, True)[0]
        here, values = _row_sums(base, row, view, centre, TRANSPOSED, True)
    else:
        above = tl.zeros((view[0].shape[0], view[1].shape[0]), tl.float32)
        here, values = above, above.to(base.dtype.element_ty)
    return above, here, values


@triton.jit
def pooled_row(
    base, row, view, centre, above, here, values, TRANSPOSED: tl.constexpr, ROLLING: tl.constexpr
):
    """(Px − x or Pᵀx − x of a row, x of the row, and what the next row needs).

    Px − x is (n·Px − n·x) / n: a rounded 1/n times the sum would move every image to one side.
    TRANSPOSED: n is the largest count.
    """
    columns, _, _, height, width, radius, _, _ = view
    if ROLLING:
        below, next_values = _row_sums(base, row + 1, view, centre, TRANSPOSED, True)
        total = above + here + below
        above, here = here, below
    else:
        total, values = _row_sums(base, row, view, centre, TRANSPOSED, False)
        next_values = values
        for distance in range(1, radius + 1):
            upper = _row_sums(base, row - distance, view, centre, TRANSPOSED, False)[0]
            lower = _row_sums(base, row + distance, view, centre, TRANSPOSED, False)[0]
            total += upper + lower
    middle = values.to(tl.float32)
    if TRANSPOSED:
        places = most(height, radius) * most(width, radius)
    else:
        places = count(row, height, radius) * count(columns, width, radius)[:, None]
    difference = (total - places * (middle - centre)) * (1.0 / places)
    return difference, middle, above, here, next_values


@triton.jit
def branch_scale(norm_weight, layer_scale, drop_path, image, channels, mask):
    """k·s of some channels: drop path, layer scale and norm weight, each 1 where it is None."""
    scale = per_channel(norm_weight, channels, mask) * per_channel(layer_scale, channels, mask)
    return per_image(drop_path, image) * scale

"""The MLP as two products with epilogues: the norm is applied on load, the hidden is stored once.

Every kernel works on tiles of rows (pixels) of one image, so that what belongs to an image (mean,
rstd, drop-path factors) is a scalar of the program. Column tiles are the fastest in the grid: the
programs that share rows of x run together.
"""

import triton
import triton.language as tl

from ._common import merge_partials, per_channel, per_image, store_partial
from .activations import activate


@triton.jit
def place(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """(image as int64, tile of rows, tile of columns, its rows, its columns) of this program."""
    column_tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    column_tile = tl.program_id(0) % column_tiles
    row_tile = tl.program_id(0) // column_tiles % row_tiles
    image = (tl.program_id(0) // column_tiles // row_tiles).to(tl.int64)
    row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return image, row_tile, column_tile, row, column


@triton.jit
def merge_kernel(stats_ptr, saved_ptr, partials, eps, BLOCK: tl.constexpr):
    """saved: (mean, rstd) of each image and group. Grid: B · G."""
    index = tl.program_id(0).to(tl.int64)
    mean, rstd = merge_partials(stats_ptr, index, partials, eps, BLOCK)
    tl.store(saved_ptr + index * 2, mean)
    tl.store(saved_ptr + index * 2 + 1, rstd)


@triton.jit
def store_tile_statistics(stats_ptr, index, values, mask, height, width):
    """Row `index` of partial statistics: those of the height × width values where mask is true."""
    count = (height * width).to(tl.float32)
    mean = tl.sum(tl.sum(tl.where(mask, values, 0.0), 1), 0) / count
    shifted = tl.where(mask, values - mean, 0.0)
    store_partial(stats_ptr, index, count, mean, tl.sum(tl.sum(shifted * shifted, 1), 0))


@triton.jit
def load_normed(ptr, row_mask, columns, column_mask, gamma_ptr, beta_ptr, mean, rstd):
    """(x − mean)·rstd·γ + β of a tile, in float32; 0 where rows or columns are not there.

    mean, rstd: scalars, or (1, columns).
    """
    mask = row_mask[:, None] & column_mask[None, :]
    x = tl.load(ptr, mask, other=0.0).to(tl.float32)
    x = (x - mean) * rstd
    if gamma_ptr is not None:
        x *= per_channel(gamma_ptr, columns, column_mask)[None, :]
    if beta_ptr is not None:
        x += per_channel(beta_ptr, columns, column_mask)[None, :]
    return tl.where(mask, x, 0.0)


@triton.jit
def load_group_norm(saved_ptr, columns, column_mask, group_size):
    """(mean, rstd) of each column, (1, columns). saved_ptr: (G, 2) of the image."""
    group = columns // group_size
    mean = tl.load(saved_ptr + group * 2, column_mask, other=0.0)
    return mean[None, :], tl.load(saved_ptr + group * 2 + 1, column_mask, other=0.0)[None, :]


@triton.jit
def hidden_kernel(
    x_ptr,
    stats_ptr,
    saved_ptr,
    gamma_ptr,
    beta_ptr,
    weight_ptr,
    bias_ptr,
    activated_ptr,
    hidden_ptr,
    rows,
    channels,
    hidden,
    stride_row,
    stride_channel,
    partials,
    group_size,
    eps,
    MERGED_AT_ONCE: tl.constexpr,
    ACT: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """hidden = GN(x)·W1ᵀ + b1, where it is wanted, and activated = act(hidden): (B · rows, hidden).

    With one group, each program merges stats: (B, 1, P, 3), and one an image writes saved:
    (B, 1, 2). With more, saved is given. Grid: B · row tiles · hidden tiles.
    """
    image, row_tile, column_tile, row, column = place(rows, hidden, BLOCK_ROWS, BLOCK_HIDDEN)
    row_mask, column_mask = row < rows, column < hidden

    if ONE_GROUP:
        mean, rstd = merge_partials(stats_ptr, image, partials, eps, MERGED_AT_ONCE)
        if column_tile == 0 and row_tile == 0:
            tl.store(saved_ptr + image * 2, mean)
            tl.store(saved_ptr + image * 2 + 1, rstd)

    x_ptr += image * rows * channels
    saved_ptr += image * (channels // group_size) * 2
    acc = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), tl.float32)
    for start in range(0, channels, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        there = channel < channels
        if not ONE_GROUP:
            mean, rstd = load_group_norm(saved_ptr, channel, there, group_size)
        pointers = x_ptr + row[:, None] * stride_row + channel[None, :] * stride_channel
        x = load_normed(pointers, row_mask, channel, there, gamma_ptr, beta_ptr, mean, rstd)
        weight = tl.load(
            weight_ptr + column[None, :] * channels + channel[:, None],
            there[:, None] & column_mask[None, :],
            other=0.0,
        )
        acc = tl.dot(x.to(weight.dtype), weight, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += per_channel(bias_ptr, column, column_mask)[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    first = (image * rows + row_tile * BLOCK_ROWS) * hidden
    offsets = tl.arange(0, BLOCK_ROWS)[:, None] * hidden + column[None, :]
    if hidden_ptr is not None:
        tl.store(hidden_ptr + first + offsets, acc.to(hidden_ptr.dtype.element_ty), mask)
    activated = activate(acc, ACT).to(activated_ptr.dtype.element_ty)
    tl.store(activated_ptr + first + offsets, activated, mask)


@triton.jit
def scale_branch(acc, bias_ptr, scale_ptr, drop_ptr, hidden_drop_ptr, image, column, column_mask):
    """k·ls·(ka·acc + b2), the branch that is added to x."""
    acc *= per_image(hidden_drop_ptr, image)
    if bias_ptr is not None:
        acc += per_channel(bias_ptr, column, column_mask)[None, :]
    scale = per_channel(scale_ptr, column, column_mask) * per_image(drop_ptr, image)
    return acc * scale[None, :]


@triton.jit
def residual_kernel(
    activated_ptr,
    weight_ptr,
    bias_ptr,
    x_ptr,
    scale_ptr,
    drop_ptr,
    hidden_drop_ptr,
    z_ptr,
    stats_ptr,
    rows,
    channels,
    hidden,
    stride_row,
    stride_channel,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z = x + k·ls·(ka·activated·W2ᵀ + b2), and z's statistics, one part a program.

    Grid: B · row tiles · channel tiles.
    """
    image, row_tile, column_tile, row, column = place(rows, channels, BLOCK_ROWS, BLOCK_CHANNELS)
    row_mask, column_mask = row < rows, column < channels

    local_row = tl.arange(0, BLOCK_ROWS)
    activated_ptr += (image * rows + row_tile * BLOCK_ROWS) * hidden
    acc = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    for start in range(0, hidden, BLOCK_HIDDEN):
        unit = start + tl.arange(0, BLOCK_HIDDEN)
        there = unit < hidden
        activated = tl.load(
            activated_ptr + local_row[:, None] * hidden + unit[None, :],
            row_mask[:, None] & there[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + column[None, :] * hidden + unit[:, None],
            there[:, None] & column_mask[None, :],
            other=0.0,
        )
        acc = tl.dot(activated, weight, acc, input_precision=PRECISION)

    acc = scale_branch(
        acc, bias_ptr, scale_ptr, drop_ptr, hidden_drop_ptr, image, column, column_mask
    )
    mask = row_mask[:, None] & column_mask[None, :]
    offsets = image * rows * channels + (
        row[:, None] * stride_row + column[None, :] * stride_channel
    )
    z = tl.load(x_ptr + offsets, mask, other=0.0).to(tl.float32) + acc
    z = z.to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + offsets, z, mask)
    if stats_ptr is not None:
        store_tile_statistics(
            stats_ptr,
            tl.program_id(0).to(tl.int64),
            z.to(tl.float32),
            mask,
            tl.minimum(rows - row_tile * BLOCK_ROWS, BLOCK_ROWS),
            tl.minimum(channels - column_tile * BLOCK_CHANNELS, BLOCK_CHANNELS),
        )

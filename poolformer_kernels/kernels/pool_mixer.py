"""pool_mixer on Triton: y = x + k·r·s·(Px − x), s = layer_scale·γ, r = 1/std.

One launch where x's statistics are given, one more where not; it reads x and writes y once. The
backward is in pool_mixer_backward.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    MERGED_AT_ONCE,
    ceil_div,
    check,
    dense,
    dense_parameter,
    empty_result,
    merge_partials,
    on_device_of,
    store_partial,
)
from ._pooling import (
    Tile,
    branch_scale,
    choose_tile,
    first_rows,
    options,
    place,
    pooled_row,
    row_of,
    view_of,
)
from .pool_mixer_backward import backward
from .statistics import statistics

__all__ = ["backward", "forward", "stats_partials"]

MOST_PARTIALS = 256  # statistics of a group that the next op has to merge in each of its programs


@triton.jit(do_not_specialize=["partials", "radius", "rows"])
def forward_kernel(
    x, y, stats, norm_weight, layer_scale, drop_path, saved, stats_out,
    partials, channels, group_channels, height, width, radius, rows, eps,
    CHANNELS_LAST: tl.constexpr, ROLLING: tl.constexpr, MERGED: tl.constexpr,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y of one tile. x, y: (B, C, H, W). stats: (B, G, partials, 3). stats_out: None, or (B, G,
    tiles, 3) of y as stored."""
    image_group, tile, first_row, column, channel, tiles = place(
        group_channels, height, width, rows, COLUMNS, CHANNELS
    )
    image = image_group // (channels // group_channels)
    mean, rstd = merge_partials(stats, image_group, partials, eps, MERGED)
    if tile == 0:
        tl.store(saved + image_group * 2, mean)
        tl.store(saved + image_group * 2 + 1, rstd)

    offset, channel_index, channel_mask, view = view_of(
        image_group, column, channel, channels, group_channels, height, width, radius,
        CHANNELS_LAST, COLUMNS, CHANNELS,
    )  # fmt: skip
    scale = branch_scale(norm_weight, layer_scale, drop_path, image, channel_index, channel_mask)
    scale = (rstd * scale)[None, :]

    # Statistics of y: Welford's in each lane over the rows, then one merge of the lanes.
    rows_seen = 0.0
    lane_mean = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    lane_m2 = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    above, here, values = first_rows(x + offset, first_row, view, mean, False, ROLLING)
    for row in range(first_row, first_row + rows):
        difference, middle, above, here, values = pooled_row(
            x + offset, row, view, mean, above, here, values, False, ROLLING
        )
        result = (middle + scale * difference).to(y.dtype.element_ty)
        offsets, mask = row_of(view, row)
        tl.store(y + offset + offsets, result, mask=mask)
        if stats_out is not None:
            inside = (row < height).to(tl.float32)
            rows_seen += inside
            stored = result.to(tl.float32)
            distance = stored - lane_mean
            lane_mean += distance * (inside / rows_seen)
            lane_m2 += inside * distance * (stored - lane_mean)
    if stats_out is not None:
        lanes = tl.minimum(width - column, COLUMNS) * tl.minimum(group_channels - channel, CHANNELS)
        lanes = lanes.to(tl.float32)
        _, mask = row_of(view, first_row)
        tile_mean = tl.sum(tl.where(mask, lane_mean, 0.0)) / lanes
        distance = tl.where(mask, lane_mean - tile_mean, 0.0)
        m2 = tl.sum(tl.where(mask, lane_m2, 0.0) + rows_seen * distance * distance)
        store_partial(stats_out, image_group * tiles + tile, lanes * rows_seen, tile_mean, m2)


def forward_tile(
    shape: tuple[int, ...] | torch.Size, num_groups: int, channels_last: bool, dtype: torch.dtype
) -> tuple[Tile, int]:
    """(tile, tiles of each image and group) of `forward`."""
    _, channels, height, width = shape
    group_channels = channels // num_groups
    tile = choose_tile(height, width, group_channels, channels_last, dtype.itemsize)
    blocks = tile.column_blocks(width) * tile.channel_blocks(group_channels)
    tile = tile.taller(ceil_div(tile.row_blocks(height) * blocks, MOST_PARTIALS), height)
    return tile, tile.row_blocks(height) * blocks


def stats_partials(
    x_shape: tuple[int, ...] | torch.Size, num_groups: int, channels_last: bool, dtype: torch.dtype
) -> int:
    """P of the (B, G, P, 3) statistics that `forward` returns for an x like this."""
    return forward_tile(x_shape, num_groups, channels_last, dtype)[1]


def forward(
    x: Tensor,
    stats: Tensor | None,
    norm_weight: Tensor | None,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
    pool_size: int,
    num_groups: int,
    eps: float,
    return_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, saved, stats_out) of the dispatcher's pool_mixer_fwd."""
    check("pool_mixer", x)
    x, channels_last = dense(x)
    batch, channels, height, width = x.shape
    tile, tiles = forward_tile(x.shape, num_groups, channels_last, x.dtype)
    y = empty_result(x)
    saved = x.new_empty((batch, num_groups, 2), dtype=torch.float32)
    stats_shape = (batch, num_groups, tiles, 3) if return_stats else (0,)
    stats_out = x.new_empty(stats_shape, dtype=torch.float32)
    if batch == 0:
        return y, saved, stats_out
    stats = statistics(x, num_groups, channels_last) if stats is None else stats.contiguous()
    with on_device_of(x):
        forward_kernel[(batch * num_groups * tiles,)](
            x,
            y,
            stats,
            dense_parameter(norm_weight),
            dense_parameter(layer_scale),
            dense_parameter(drop_path),
            saved,
            stats_out if return_stats else None,
            stats.shape[2],
            channels,
            channels // num_groups,
            height,
            width,
            pool_size // 2,
            tile.rows,
            eps,
            CHANNELS_LAST=channels_last,
            ROLLING=pool_size == 3,
            MERGED=MERGED_AT_ONCE,
            COLUMNS=tile.columns,
            CHANNELS=tile.channels,
            **options(tile),
        )
    return y, saved, stats_out

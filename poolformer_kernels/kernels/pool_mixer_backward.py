"""The backward of pool_mixer on Triton.

With g = dL/dy, P the window average, s = layer_scale·γ, k the drop-path factor, r = 1/std, n the
elements of an image and group, Q = Σ_hw g·(Px − x) and T = Σ_c k·s·Q, three launches: partial sums
of Q and T (reads g and x), dx = g + k·r·s·(Pᵀg − g) − (r³·T/n)·(x − mean) (reads g and x again,
writes dx), and the parameters' gradients, summed over the partial sums in a fixed order.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    MERGED_AT_ONCE,
    REDUCING_PROGRAMS,
    SUMMED_CHANNELS,
    SUMMED_ROWS,
    ceil_div,
    check,
    dense,
    dense_like,
    dense_parameter,
    empty_result,
    on_device_of,
    per_channel,
    per_image,
    sum_of_products,
    sum_of_rows,
)
from ._pooling import (
    branch_scale,
    choose_tile,
    first_rows,
    options,
    place,
    pooled_row,
    row_of,
    view_of,
)


@triton.jit(do_not_specialize=["radius", "rows"])
def reduce_kernel(
    dy, x, saved, norm_weight, layer_scale, drop_path, channel_sums, group_sums,
    channels, group_channels, height, width, radius, rows,
    CHANNELS_LAST: tl.constexpr, ROLLING: tl.constexpr,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Partial sums of some rows: channel_sums (B, P, C) of k·r·Q, group_sums (B, G, tiles) of T."""
    # As if the image had one column: a program goes over all columns of its rows.
    image_group, tile, first_row, _, channel, tiles = place(
        group_channels, height, 1, rows, COLUMNS, CHANNELS
    )
    image = image_group // (channels // group_channels)
    mean = tl.load(saved + image_group * 2)
    rstd = tl.load(saved + image_group * 2 + 1)
    products = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    for column in range(0, width, COLUMNS):
        offset, channel_index, channel_mask, view = view_of(
            image_group, column, channel, channels, group_channels, height, width, radius,
            CHANNELS_LAST, COLUMNS, CHANNELS,
        )  # fmt: skip
        above, here, values = first_rows(x + offset, first_row, view, mean, False, ROLLING)
        for row in range(first_row, first_row + rows):
            offsets, mask = row_of(view, row)
            g = tl.load(dy + offset + offsets, mask=mask, other=0.0).to(tl.float32)
            difference, _middle, above, here, values = pooled_row(
                x + offset, row, view, mean, above, here, values, False, ROLLING
            )
            products += g * difference
    q = tl.sum(products, axis=0)
    offset, channel_index, channel_mask, view = view_of(
        image_group, 0, channel, channels, group_channels, height, width, radius,
        CHANNELS_LAST, COLUMNS, CHANNELS,
    )  # fmt: skip
    part = image * tl.cdiv(height, rows) + first_row // rows
    factor = rstd * per_image(drop_path, image)
    tl.store(channel_sums + part * channels + channel_index, factor * q, mask=channel_mask)
    scale = branch_scale(norm_weight, layer_scale, drop_path, image, channel_index, channel_mask)
    t = sum_of_products(scale, tl.where(channel_mask, q, 0.0))
    tl.store(group_sums + image_group * tiles + tile, t)


@triton.jit(do_not_specialize=["partials", "radius", "rows"])
def apply_kernel(
    dy, x, dx, saved, group_sums, norm_weight, layer_scale, drop_path,
    partials, channels, group_channels, height, width, radius, rows,
    CHANNELS_LAST: tl.constexpr, ROLLING: tl.constexpr, MERGED: tl.constexpr,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx of one tile. group_sums: (B, G, partials)."""
    image_group, _, first_row, column, channel, _ = place(
        group_channels, height, width, rows, COLUMNS, CHANNELS
    )
    image = image_group // (channels // group_channels)
    mean = tl.load(saved + image_group * 2)
    rstd = tl.load(saved + image_group * 2 + 1)
    sums = tl.zeros((MERGED,), tl.float32)
    for start in range(0, partials, MERGED):
        index = start + tl.arange(0, MERGED)
        pointers = group_sums + image_group * partials + index
        sums += tl.load(pointers, mask=index < partials, other=0.0)
    elements = (group_channels * height * width).to(tl.float32)
    along_x = tl.sum(sums) * rstd * rstd * rstd / elements

    offset, channel_index, channel_mask, view = view_of(
        image_group, column, channel, channels, group_channels, height, width, radius,
        CHANNELS_LAST, COLUMNS, CHANNELS,
    )  # fmt: skip
    scale = branch_scale(norm_weight, layer_scale, drop_path, image, channel_index, channel_mask)
    scale = (rstd * scale)[None, :]
    above, here, values = first_rows(dy + offset, first_row, view, 0.0, True, ROLLING)
    for row in range(first_row, first_row + rows):
        difference, g, above, here, values = pooled_row(
            dy + offset, row, view, 0.0, above, here, values, True, ROLLING
        )
        offsets, mask = row_of(view, row)
        centred = tl.load(x + offset + offsets, mask=mask, other=0.0).to(tl.float32) - mean
        result = g + scale * difference - along_x * centred
        tl.store(dx + offset + offsets, result.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def parameters_kernel(
    channel_sums, norm_weight, layer_scale, dnorm_weight, dlayer_scale, rows, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """channel_sums: (rows, C) → dγ = layer_scale·Σ, dlayer_scale = γ·Σ, both (C)."""
    index = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    channel_mask = index < channels
    q = sum_of_rows(channel_sums, rows, channels, index, channel_mask, ROWS, CHANNELS)
    gamma = per_channel(norm_weight, index, channel_mask)
    scale = per_channel(layer_scale, index, channel_mask)
    kind = dnorm_weight.dtype.element_ty
    tl.store(dnorm_weight + index, (scale * q).to(kind), mask=channel_mask)
    tl.store(dlayer_scale + index, (gamma * q).to(kind), mask=channel_mask)


def backward(
    dy: Tensor,
    x: Tensor,
    saved: Tensor,
    norm_weight: Tensor | None,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
    pool_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dnorm_weight, dlayer_scale) of the dispatcher's pool_mixer_bwd."""
    check("pool_mixer", x)
    x, channels_last = dense(x)
    dy = dense_like(dy, x)
    batch, channels, height, width = x.shape
    num_groups = saved.shape[1]
    group_channels = channels // num_groups
    norm_weight, layer_scale = dense_parameter(norm_weight), dense_parameter(layer_scale)
    drop_path, saved = dense_parameter(drop_path), saved.contiguous()
    tile = choose_tile(height, width, group_channels, channels_last, x.element_size())
    channel_blocks = tile.channel_blocks(group_channels)
    programs = batch * num_groups * channel_blocks * tile.row_blocks(height)
    # At least twice the rows: at 7x7 a second row of partial sums would cost 0.1 passes over x.
    reducing = tile.taller(max(2, programs // REDUCING_PROGRAMS), height)
    if x.element_size() == 4:  # one vector a thread: with two, sm_90 spills
        threads = tile.columns * tile.channels // 4
        reducing = replace(reducing, threads=max(tile.threads, threads))
    parts = reducing.row_blocks(height)
    channel_sums = x.new_empty((batch, parts, channels), dtype=torch.float32)
    group_sums = x.new_empty((batch, num_groups, parts * channel_blocks), dtype=torch.float32)
    dx = empty_result(x)
    dnorm_weight, dlayer_scale = x.new_empty(channels), x.new_empty(channels)
    sizes = (channels, group_channels, height, width, pool_size // 2)
    layout = {"CHANNELS_LAST": channels_last, "ROLLING": pool_size == 3, **options(tile)}
    blocks = {"COLUMNS": tile.columns, "CHANNELS": tile.channels}
    with on_device_of(x):
        if batch:
            reduce_kernel[(batch * num_groups * parts * channel_blocks,)](
                dy,
                x,
                saved,
                norm_weight,
                layer_scale,
                drop_path,
                channel_sums,
                group_sums,
                *sizes,
                reducing.rows,
                **{**layout, **options(reducing)},
                **blocks,
            )
            tiles = tile.row_blocks(height) * tile.column_blocks(width) * channel_blocks
            apply_kernel[(batch * num_groups * tiles,)](
                dy,
                x,
                dx,
                saved,
                group_sums,
                norm_weight,
                layer_scale,
                drop_path,
                group_sums.shape[2],
                *sizes,
                tile.rows,
                MERGED=MERGED_AT_ONCE,
                **layout,
                **blocks,
            )
        parameters_kernel[(ceil_div(channels, SUMMED_CHANNELS),)](
            channel_sums,
            norm_weight,
            layer_scale,
            dnorm_weight,
            dlayer_scale,
            batch * parts,
            channels,
            ROWS=SUMMED_ROWS,
            CHANNELS=SUMMED_CHANNELS,
        )
    return dx, dnorm_weight, dlayer_scale

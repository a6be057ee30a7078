"""group_norm on Triton: y = (x − mean)·r·γ + β, r = 1/std of each image and group; its backward.

Forward: one launch where x's statistics are given, one more where not; it reads x and writes y
once. Backward, with g = dL/dy and x̂ = (x − mean)·r, three launches: partial sums over positions of
g·x̂ and g (reads g and x), dx = r·(γ·g − mean(γ·g) − x̂·mean(γ·g·x̂)) (reads g and x again, writes
dx), and the parameters' gradients, summed over the partial sums in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    MERGED_AT_ONCE,
    REDUCING_PROGRAMS,
    SUMMED_CHANNELS,
    SUMMED_ROWS,
    VECTOR_BYTES,
    ceil_div,
    check,
    dense,
    dense_like,
    dense_parameter,
    empty_result,
    merge_partials,
    next_power_of_2,
    on_device_of,
    per_channel,
    sum_of_products,
    sum_of_rows,
)
from .architecture import warps_for
from .statistics import statistics

THREADS = 128
# A block that is written: a 16-byte vector of 16 bits, or two of float32, in each thread. Twice
# that spills where weights are gathered.
BLOCK = 1024


@triton.jit
def place(
    size, channels, group_channels, positions, CHANNELS_LAST: tl.constexpr, ONE_GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """This program's (image · G + group as int64, offset of the group as int64, offsets in it,
    channels, mask): elements of a group, as they lie in memory.

    size: elements of a group. positions: H·W.
    """
    blocks = tl.cdiv(size, BLOCK)
    image_group = (tl.program_id(0) // blocks).to(tl.int64)
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    groups = channels // group_channels
    first_channel = (image_group % groups).to(tl.int32) * group_channels
    if CHANNELS_LAST:
        base = image_group // groups * groups * size + first_channel
        in_group = index % group_channels
        offsets = index if ONE_GROUP else index // group_channels * channels + in_group
    else:
        base = image_group * size
        in_group = index // positions
        offsets = index
    return image_group, base, offsets, first_channel + in_group, index < size


@triton.jit(do_not_specialize=["partials"])
def forward_kernel(
    x, y, stats, weight, bias, saved, partials, size, channels, group_channels, positions, eps,
    CHANNELS_LAST: tl.constexpr, ONE_GROUP: tl.constexpr, MERGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y of one block. x, y: (B, C, H, W). stats: (B, G, partials, 3)."""
    image_group, base, offsets, channel, mask = place(
        size, channels, group_channels, positions, CHANNELS_LAST, ONE_GROUP, BLOCK
    )
    mean, rstd = merge_partials(stats, image_group, partials, eps, MERGED)
    if tl.program_id(0) % tl.cdiv(size, BLOCK) == 0:
        tl.store(saved + image_group * 2, mean)
        tl.store(saved + image_group * 2 + 1, rstd)
    values = tl.load(x + base + offsets, mask=mask, other=0.0).to(tl.float32)
    result = (values - mean) * rstd * per_channel(weight, channel, mask)
    if bias is not None:
        result += tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + base + offsets, result.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["steps"])
def reduce_kernel(
    dy, x, saved, weight, channel_sums, group_sums,
    channels, group_channels, positions, steps,
    CHANNELS_LAST: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Partial sums over `steps` times POSITIONS positions.

    channel_sums: (2, B, P, C) of g·x̂ and of g. group_sums: (B, G, tiles, 2) of γ times these.
    """
    channel_blocks = tl.cdiv(group_channels, CHANNELS)
    parts = tl.cdiv(positions, steps * POSITIONS)
    image_group = (tl.program_id(0) // (parts * channel_blocks)).to(tl.int64)
    tile = tl.program_id(0) % (parts * channel_blocks)
    part = tile // channel_blocks
    groups = channels // group_channels
    image, group = image_group // groups, (image_group % groups).to(tl.int32)
    in_group = tile % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    channel_mask = in_group < group_channels
    channel = group * group_channels + in_group
    mean = tl.load(saved + image_group * 2)
    rstd = tl.load(saved + image_group * 2 + 1)
    offset = image * (channels * positions)
    products = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    gradients = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for step in range(part * steps, part * steps + steps):
        position = step * POSITIONS + tl.arange(0, POSITIONS)
        mask = (position < positions)[:, None] & channel_mask[None, :]
        if CHANNELS_LAST:
            offsets = position[:, None] * channels + channel[None, :]
        else:
            offsets = position[:, None] + channel[None, :] * positions
        g = tl.load(dy + offset + offsets, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(x + offset + offsets, mask=mask, other=0.0).to(tl.float32)
        products += g * (values - mean)
        gradients += g
    product, gradient = rstd * tl.sum(products, axis=0), tl.sum(gradients, axis=0)
    rows = (tl.num_programs(0) // (channel_blocks * groups)).to(tl.int64)
    sums = channel_sums + (image * parts + part) * channels + channel
    tl.store(sums, product, mask=channel_mask)
    tl.store(sums + rows * channels, gradient, mask=channel_mask)
    gamma = tl.where(channel_mask, per_channel(weight, channel, channel_mask), 0.0)
    pair = group_sums + (image_group * (parts * channel_blocks) + tile) * 2
    tl.store(pair, sum_of_products(gamma, product))
    tl.store(pair + 1, sum_of_products(gamma, gradient))


@triton.jit(do_not_specialize=["partials"])
def apply_kernel(
    dy, x, dx, saved, weight, group_sums,
    partials, size, channels, group_channels, positions,
    CHANNELS_LAST: tl.constexpr, ONE_GROUP: tl.constexpr, MERGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of one block. group_sums: (B, G, partials, 2)."""
    image_group, base, offsets, channel, mask = place(
        size, channels, group_channels, positions, CHANNELS_LAST, ONE_GROUP, BLOCK
    )
    mean = tl.load(saved + image_group * 2)
    rstd = tl.load(saved + image_group * 2 + 1)
    along_x = tl.zeros((MERGED,), tl.float32)
    along_one = tl.zeros((MERGED,), tl.float32)
    for start in range(0, partials, MERGED):
        index = start + tl.arange(0, MERGED)
        pair = group_sums + (image_group * partials + index) * 2
        along_x += tl.load(pair, mask=index < partials, other=0.0)
        along_one += tl.load(pair + 1, mask=index < partials, other=0.0)
    elements = size.to(tl.float32)
    mean_x, mean_one = tl.sum(along_x) * rstd / elements, tl.sum(along_one) / elements
    g = tl.load(dy + base + offsets, mask=mask, other=0.0).to(tl.float32)
    values = tl.load(x + base + offsets, mask=mask, other=0.0).to(tl.float32)
    result = g * per_channel(weight, channel, mask) - mean_one - (values - mean) * mean_x
    tl.store(dx + base + offsets, (rstd * result).to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def parameters_kernel(
    channel_sums, dweight, dbias, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """channel_sums: (2, rows, C) → dweight and dbias, both (C)."""
    index = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = index < channels
    product = sum_of_rows(channel_sums, rows, channels, index, mask, ROWS, CHANNELS)
    second = channel_sums + tl.cast(rows, tl.int64) * channels
    gradient = sum_of_rows(second, rows, channels, index, mask, ROWS, CHANNELS)
    tl.store(dweight + index, product.to(dweight.dtype.element_ty), mask=mask)
    tl.store(dbias + index, gradient.to(dbias.dtype.element_ty), mask=mask)


def forward(
    x: Tensor,
    stats: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(y, saved) of the dispatcher's group_norm_fwd."""
    check("group_norm", x)
    x, channels_last = dense(x)
    batch, channels, height, width = x.shape
    size = channels // num_groups * height * width
    y = empty_result(x)
    saved = x.new_empty((batch, num_groups, 2), dtype=torch.float32)
    if batch == 0:
        return y, saved
    stats = statistics(x, num_groups, channels_last) if stats is None else stats.contiguous()
    with on_device_of(x):
        forward_kernel[(batch * num_groups * ceil_div(size, BLOCK),)](
            x,
            y,
            stats,
            dense_parameter(weight),
            dense_parameter(bias),
            saved,
            stats.shape[2],
            size,
            channels,
            channels // num_groups,
            height * width,
            eps,
            CHANNELS_LAST=channels_last,
            ONE_GROUP=num_groups == 1,
            MERGED=MERGED_AT_ONCE,
            BLOCK=BLOCK,
            num_warps=warps_for(THREADS),
        )
    return y, saved


def reducing_tile(
    batch: int, positions: int, group_channels: int, num_groups: int, channels_last: bool
) -> tuple[int, int, int]:
    """(POSITIONS, CHANNELS, steps) of `reduce_kernel`.

    What lies side by side gets up to 64 lanes, the rest what makes 1024 elements; as many steps as
    leave enough programs to fill a GPU.
    """
    lanes = THREADS * VECTOR_BYTES // 2
    if channels_last:
        wide = min(next_power_of_2(group_channels), 64)
        tall = min(next_power_of_2(positions), lanes // wide)
    else:
        tall = min(next_power_of_2(positions), 64)
        wide = min(next_power_of_2(group_channels), lanes // tall)
    most = ceil_div(positions, tall)
    programs = batch * num_groups * ceil_div(group_channels, wide) * most
    return tall, wide, max(1, min(most, max(4, programs // REDUCING_PROGRAMS)))


def backward(
    dy: Tensor, x: Tensor, saved: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) of the dispatcher's group_norm_bwd."""
    check("group_norm", x)
    x, channels_last = dense(x)
    dy, weight, saved = dense_like(dy, x), dense_parameter(weight), saved.contiguous()
    batch, channels, height, width = x.shape
    num_groups, positions = saved.shape[1], height * width
    group_channels = channels // num_groups
    size = group_channels * positions
    tall, wide, steps = reducing_tile(batch, positions, group_channels, num_groups, channels_last)
    parts, channel_blocks = ceil_div(positions, tall * steps), ceil_div(group_channels, wide)
    channel_sums = x.new_empty((2, batch, parts, channels), dtype=torch.float32)
    group_sums = x.new_empty((batch, num_groups, parts * channel_blocks, 2), dtype=torch.float32)
    dx = empty_result(x)
    dweight, dbias = x.new_empty(channels), x.new_empty(channels)
    with on_device_of(x):
        if batch:
            reduce_kernel[(batch * num_groups * parts * channel_blocks,)](
                dy,
                x,
                saved,
                weight,
                channel_sums,
                group_sums,
                channels,
                group_channels,
                positions,
                steps,
                CHANNELS_LAST=channels_last,
                POSITIONS=tall,
                CHANNELS=wide,
                num_warps=warps_for(THREADS),
            )
            apply_kernel[(batch * num_groups * ceil_div(size, BLOCK),)](
                dy,
                x,
                dx,
                saved,
                weight,
                group_sums,
                group_sums.shape[2],
                size,
                channels,
                group_channels,
                positions,
                CHANNELS_LAST=channels_last,
                ONE_GROUP=num_groups == 1,
                MERGED=MERGED_AT_ONCE,
                BLOCK=BLOCK,
                num_warps=warps_for(THREADS),
            )
        parameters_kernel[(ceil_div(channels, SUMMED_CHANNELS),)](
            channel_sums,
            dweight,
            dbias,
            batch * parts,
            channels,
            ROWS=SUMMED_ROWS,
            CHANNELS=SUMMED_CHANNELS,
        )
    return dx, dweight, dbias

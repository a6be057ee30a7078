"""Partial statistics of each image and group of a tensor: one pass over it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import ceil_div, on_device_of, store_partial, sum_of_products
from .architecture import warps_for

# A chunk stays in registers between its mean and its M2: 32 float32 values in each of 128 threads.
CHUNK = 4096
THREADS = 128
MOST_PARTIALS = 256  # of an image and group, so that merging them costs less than a tile of work


@triton.jit(do_not_specialize=["chunks"])
def statistics_kernel(
    x, stats, size, channels, group_channels, chunks, CONTIGUOUS: tl.constexpr, CHUNK: tl.constexpr
):
    """x: dense, (B, C, H, W). stats: (B, G, P, 3). A program merges `chunks` chunks of a group.

    size: elements of a group. CONTIGUOUS: whether they lie side by side.
    """
    parts = tl.cdiv(size, chunks * CHUNK)
    image_group = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    if CONTIGUOUS:
        base = x + image_group * size
    else:
        groups = channels // group_channels
        image, group = image_group // groups, image_group % groups
        base = x + image * groups * size + group * group_channels
    count = 0.0
    mean = 0.0
    m2 = 0.0
    for chunk in range(part * chunks, part * chunks + chunks):
        index = chunk * CHUNK + tl.arange(0, CHUNK)
        mask = index < size
        if CONTIGUOUS:
            offsets = index
        else:
            offsets = index // group_channels * channels + index % group_channels
        values = tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)
        chunk_count = tl.minimum(tl.maximum(size - chunk * CHUNK, 0), CHUNK).to(tl.float32)
        chunk_mean = tl.sum(values) / tl.maximum(chunk_count, 1.0)
        centred = tl.where(mask, values - chunk_mean, 0.0)
        distance = chunk_mean - mean
        total = count + chunk_count
        weight = chunk_count / tl.maximum(total, 1.0)
        m2 += sum_of_products(centred, centred) + distance * distance * count * weight
        mean += distance * weight
        count = total
    store_partial(stats, image_group * parts + part, count, mean, m2)


def partials(size: int) -> tuple[int, int]:
    """(P, chunks a program) for groups of `size` elements."""
    chunks = ceil_div(size, MOST_PARTIALS * CHUNK)
    return ceil_div(size, chunks * CHUNK), chunks


def statistics(x: Tensor, num_groups: int, channels_last: bool) -> Tensor:
    """Partial statistics of x, which is dense: (B, G, P, 3) in float32."""
    batch, channels, height, width = x.shape
    size = channels // num_groups * height * width
    parts, chunks = partials(size)
    stats = x.new_empty((batch, num_groups, parts, 3), dtype=torch.float32)
    if batch:
        with on_device_of(x):
            statistics_kernel[(batch * num_groups * parts,)](
                x,
                stats,
                size,
                channels,
                channels // num_groups,
                chunks,
                CONTIGUOUS=num_groups == 1 or not channels_last,
                CHUNK=CHUNK,
                num_warps=warps_for(THREADS),
            )
    return stats

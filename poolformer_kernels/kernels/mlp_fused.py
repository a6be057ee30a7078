"""The MLP's forward in one kernel: the hidden goes from registers to the second product.

A program owns all channels of a tile of rows. Channels that are no power of two are cut in two,
96 = 64 + 32 and 192 = 128 + 64: nothing is padded. Weights come from the L2 cache, chunk by chunk.
"""

import triton
import triton.language as tl

from ._common import merge_partials, per_channel
from .activations import activate
from .mlp_gemm import load_normed, scale_branch, store_tile_statistics


@triton.jit
def fused_kernel(
    x_ptr, stats_ptr, saved_ptr, gamma_ptr, beta_ptr, weight1_ptr, bias1_ptr, weight2_ptr,
    bias2_ptr, scale_ptr, drop_ptr, hidden_drop_ptr, z_ptr, stats_out_ptr, hidden_ptr,
    rows, hidden, stride_row, stride_channel, partials, eps,
    ACT: tl.constexpr, MERGED_AT_ONCE: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z = x + k·ls·(ka·act(GN(x)·W1ᵀ + b1)·W2ᵀ + b2), for one group.

    x, z: float32 or the weights' dtype, which is that of the products' operands. hidden:
    (B · rows, hidden) or None, the first product before the activation, for a backward.
    BLOCK_A, BLOCK_B: channels of the two parts; B may be 0. Statistics: two rows a program if B.
    Grid: B · row tiles.
    """
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    row_tile = tl.program_id(0) % row_tiles
    image = (tl.program_id(0) // row_tiles).to(tl.int64)
    row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row < rows
    mean, rstd = merge_partials(stats_ptr, image, partials, eps, MERGED_AT_ONCE)
    if row_tile == 0:
        tl.store(saved_ptr + image * 2, mean)
        tl.store(saved_ptr + image * 2 + 1, rstd)

    dtype = weight1_ptr.dtype.element_ty
    x_ptr += image * rows * CHANNELS
    z_ptr += image * rows * CHANNELS
    if hidden_ptr is not None:
        hidden_ptr += (image * rows + row_tile * BLOCK_ROWS) * hidden
    channel_a = tl.arange(0, BLOCK_A)
    there_a = channel_a < CHANNELS
    offsets_a = row[:, None] * stride_row + channel_a[None, :] * stride_channel
    normed_a = load_normed(
        x_ptr + offsets_a, row_mask, channel_a, there_a, gamma_ptr, beta_ptr, mean, rstd
    ).to(dtype)
    acc_a = tl.zeros((BLOCK_ROWS, BLOCK_A), tl.float32)
    if BLOCK_B > 0:
        channel_b = BLOCK_A + tl.arange(0, BLOCK_B)
        there_b = channel_b < CHANNELS
        offsets_b = row[:, None] * stride_row + channel_b[None, :] * stride_channel
        normed_b = load_normed(
            x_ptr + offsets_b, row_mask, channel_b, there_b, gamma_ptr, beta_ptr, mean, rstd
        ).to(dtype)
        acc_b = tl.zeros((BLOCK_ROWS, BLOCK_B), tl.float32)

    for start in range(0, hidden, BLOCK_HIDDEN):
        unit = start + tl.arange(0, BLOCK_HIDDEN)
        unit_mask = unit < hidden
        weight = tl.load(
            weight1_ptr + unit[None, :] * CHANNELS + channel_a[:, None],
            there_a[:, None] & unit_mask[None, :],
            other=0.0,
        )
        h = tl.dot(normed_a, weight, input_precision=PRECISION)
        if BLOCK_B > 0:
            weight = tl.load(
                weight1_ptr + unit[None, :] * CHANNELS + channel_b[:, None],
                there_b[:, None] & unit_mask[None, :],
                other=0.0,
            )
            h = tl.dot(normed_b, weight, h, input_precision=PRECISION)
        if bias1_ptr is not None:
            h += per_channel(bias1_ptr, unit, unit_mask)[None, :]
        if hidden_ptr is not None:
            tl.store(
                hidden_ptr + tl.arange(0, BLOCK_ROWS)[:, None] * hidden + unit[None, :],
                h.to(dtype),
                row_mask[:, None] & unit_mask[None, :],
            )
        h = activate(h, ACT).to(dtype)
        weight = tl.load(
            weight2_ptr + channel_a[None, :] * hidden + unit[:, None],
            unit_mask[:, None] & there_a[None, :],
            other=0.0,
        )
        acc_a = tl.dot(h, weight, acc_a, input_precision=PRECISION)
        if BLOCK_B > 0:
            weight = tl.load(
                weight2_ptr + channel_b[None, :] * hidden + unit[:, None],
                unit_mask[:, None] & there_b[None, :],
                other=0.0,
            )
            acc_b = tl.dot(h, weight, acc_b, input_precision=PRECISION)

    height = tl.minimum(rows - row_tile * BLOCK_ROWS, BLOCK_ROWS)
    acc_a = scale_branch(
        acc_a, bias2_ptr, scale_ptr, drop_ptr, hidden_drop_ptr, image, channel_a, there_a
    )
    mask = row_mask[:, None] & there_a[None, :]
    z = tl.load(x_ptr + offsets_a, mask, other=0.0).to(tl.float32) + acc_a
    z = z.to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + offsets_a, z, mask)
    index = tl.program_id(0).to(tl.int64) * (2 if BLOCK_B > 0 else 1)
    if stats_out_ptr is not None:
        width = CHANNELS if BLOCK_B == 0 else BLOCK_A
        store_tile_statistics(stats_out_ptr, index, z.to(tl.float32), mask, height, width)
    if BLOCK_B > 0:
        acc_b = scale_branch(
            acc_b, bias2_ptr, scale_ptr, drop_ptr, hidden_drop_ptr, image, channel_b, there_b
        )
        mask = row_mask[:, None] & there_b[None, :]
        z = tl.load(x_ptr + offsets_b, mask, other=0.0).to(tl.float32) + acc_b
        z = z.to(z_ptr.dtype.element_ty)
        tl.store(z_ptr + offsets_b, z, mask)
        if stats_out_ptr is not None:
            width = CHANNELS - BLOCK_A
            store_tile_statistics(stats_out_ptr, index + 1, z.to(tl.float32), mask, height, width)

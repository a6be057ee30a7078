"""Gradients of the MLP. h is given or recomputed; dh and a are stored once, for the products.

Symbols: g = dL/dz, k and ka the drop-path factors, x̂ = (x − μ)·r, h = fc1's result, a = ka·act(h),
dh = dL/dh, dn = dh·W1 = dL/dGN(x), n the number of elements of an image and group,
dx = g + r·(γ·dn − c2 − x̂·c1), c2 = Σ γ·dn / n, c1 = Σ γ·dn·x̂ / n.
With one group the sums over rows and channels are taken over rows and hidden instead, beside dh:
Σ_c γ_c·dn_c = Σ_j dh_j·w̃_j and Σ_c γ_c·dn_c·x̂_c = Σ_j dh_j·(h_j − b̃_j) for w̃ = W1·γ, b̃ = W1·β + b1.
"""

import triton
import triton.language as tl

from ._common import per_channel, per_image
from .activations import activate_with_slope
from .mlp_gemm import load_group_norm, load_normed, place


@triton.jit
def fold_kernel(
    weight_ptr, bias_ptr, gamma_ptr, beta_ptr, folded_ptr, channels, hidden,
    BLOCK_HIDDEN: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """folded: (2, hidden), w̃ = W1·γ and b̃ = W1·β + b1. Grid: hidden tiles."""
    unit = tl.program_id(0) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    unit_mask = unit < hidden
    weight_sum = tl.zeros((BLOCK_HIDDEN,), tl.float32)
    bias = tl.zeros((BLOCK_HIDDEN,), tl.float32)
    if bias_ptr is not None:
        bias += per_channel(bias_ptr, unit, unit_mask)
    for start in range(0, channels, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        there = channel < channels
        offsets = unit[:, None] * channels + channel[None, :]
        weight = tl.load(weight_ptr + offsets, unit_mask[:, None] & there[None, :], other=0.0)
        weight = weight.to(tl.float32)
        weight_sum += tl.sum(weight * per_channel(gamma_ptr, channel, there)[None, :], 1)
        if beta_ptr is not None:
            bias += tl.sum(weight * per_channel(beta_ptr, channel, there)[None, :], 1)
    tl.store(folded_ptr + unit, weight_sum, unit_mask)
    tl.store(folded_ptr + hidden + unit, bias, unit_mask)


@triton.jit
def hidden_gradient_kernel(
    dz_ptr, x_ptr, hidden_ptr, saved_ptr, gamma_ptr, beta_ptr, weight1_ptr, bias1_ptr, weight2_ptr,
    scale_ptr, drop_ptr, hidden_drop_ptr, folded_ptr, activated_ptr, gradient_ptr, sums_ptr,
    rows, channels, hidden, stride_row, stride_channel, group_size,
    ACT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """activated = a, gradient = dh: (B · rows, hidden); with one group the sums of c2 and c1.

    hidden: (B · rows, hidden), h, or None: then it is recomputed from x. activated may be None.
    sums: (B, row tiles · hidden tiles, 2). Grid: B · row tiles · hidden tiles.
    """
    image, _, _, row, column = place(rows, hidden, BLOCK_ROWS, BLOCK_HIDDEN)
    row_mask, column_mask = row < rows, column < hidden

    x_ptr += image * rows * channels
    dz_ptr += image * rows * channels
    saved_ptr += image * (channels // group_size) * 2
    if sums_ptr is not None:
        mean, rstd = tl.load(saved_ptr), tl.load(saved_ptr + 1)
    mask = row_mask[:, None] & column_mask[None, :]
    hidden_offsets = (image * rows + row[:, None]) * hidden + column[None, :]
    h = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), tl.float32)
    da = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), tl.float32)
    for start in range(0, channels, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        there = channel < channels
        offsets = row[:, None] * stride_row + channel[None, :] * stride_channel
        weight_mask = there[:, None] & column_mask[None, :]
        if hidden_ptr is None:
            if sums_ptr is None:
                mean, rstd = load_group_norm(saved_ptr, channel, there, group_size)
            x = load_normed(
                x_ptr + offsets, row_mask, channel, there, gamma_ptr, beta_ptr, mean, rstd
            )
            weight1 = tl.load(
                weight1_ptr + column[None, :] * channels + channel[:, None], weight_mask, other=0.0
            )
            h = tl.dot(x.to(weight1.dtype), weight1, h, input_precision=PRECISION)
        dz = tl.load(dz_ptr + offsets, row_mask[:, None] & there[None, :], other=0.0)
        dz = dz.to(tl.float32) * per_channel(scale_ptr, channel, there)[None, :]
        weight2 = tl.load(
            weight2_ptr + channel[:, None] * hidden + column[None, :], weight_mask, other=0.0
        )
        da = tl.dot(dz.to(weight2.dtype), weight2, da, input_precision=PRECISION)

    if hidden_ptr is not None:
        h = tl.load(hidden_ptr + hidden_offsets, mask, other=0.0).to(tl.float32)
    elif bias1_ptr is not None:
        h += per_channel(bias1_ptr, column, column_mask)[None, :]
    value, slope = activate_with_slope(h, ACT)
    ka = per_image(hidden_drop_ptr, image)
    if activated_ptr is not None:
        activated = (value * ka).to(activated_ptr.dtype.element_ty)
        tl.store(activated_ptr + hidden_offsets, activated, mask)
    dh = (da * slope * (ka * per_image(drop_ptr, image))).to(gradient_ptr.dtype.element_ty)
    tl.store(gradient_ptr + hidden_offsets, dh, mask)
    if sums_ptr is not None:
        dh = tl.where(mask, dh.to(tl.float32), 0.0)
        weight_sum = tl.load(folded_ptr + column, column_mask, other=0.0)
        bias = tl.load(folded_ptr + hidden + column, column_mask, other=0.0)
        sums_ptr += tl.program_id(0).to(tl.int64) * 2
        tl.store(sums_ptr, tl.sum(tl.sum(dh * weight_sum[None, :], 1), 0))
        tl.store(sums_ptr + 1, tl.sum(tl.sum(dh * (h - bias[None, :]), 1), 0))


@triton.jit
def input_gradient_kernel(
    gradient_ptr, weight_ptr, dz_ptr, x_ptr, saved_ptr, gamma_ptr, sums_ptr, dx_ptr,
    rows, channels, hidden, stride_row, stride_channel, parts,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dx from dh, with one group. Else γ·dn, which `norm_gradient_kernel` turns into dx.

    sums: (B, parts, 2), those of hidden_gradient_kernel. Grid: B · row tiles · channel tiles.
    """
    image, row_tile, _, row, column = place(rows, channels, BLOCK_ROWS, BLOCK_CHANNELS)
    row_mask, column_mask = row < rows, column < channels
    c1 = 0.0
    c2 = 0.0
    if sums_ptr is not None:
        for start in range(0, parts, 64):
            part = start + tl.arange(0, 64)
            pointers = sums_ptr + (image * parts + part) * 2
            c2 += tl.sum(tl.load(pointers, part < parts, other=0.0), 0)
            c1 += tl.sum(tl.load(pointers + 1, part < parts, other=0.0), 0)

    gradient_ptr += (image * rows + row_tile * BLOCK_ROWS) * hidden
    local_row = tl.arange(0, BLOCK_ROWS)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    for start in range(0, hidden, BLOCK_HIDDEN):
        unit = start + tl.arange(0, BLOCK_HIDDEN)
        there = unit < hidden
        dh = tl.load(
            gradient_ptr + local_row[:, None] * hidden + unit[None, :],
            row_mask[:, None] & there[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + unit[:, None] * channels + column[None, :],
            there[:, None] & column_mask[None, :],
            other=0.0,
        )
        acc = tl.dot(dh, weight, acc, input_precision=PRECISION)

    acc *= per_channel(gamma_ptr, column, column_mask)[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    offsets = image * rows * channels + (
        row[:, None] * stride_row + column[None, :] * stride_channel
    )
    if sums_ptr is not None:
        count = rows * channels * 1.0
        mean, rstd = tl.load(saved_ptr + image * 2), tl.load(saved_ptr + image * 2 + 1)
        x = tl.load(x_ptr + offsets, mask, other=0.0).to(tl.float32)
        acc = (acc - c2 / count - (x - mean) * rstd * (c1 / count)) * rstd
        acc += tl.load(dz_ptr + offsets, mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offsets, acc.to(dx_ptr.dtype.element_ty), mask)


@triton.jit
def norm_gradient_kernel(
    dz_ptr, x_ptr, saved_ptr, dx_ptr, rows, channels, group_size, stride_row, stride_channel,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx holds γ·dn and becomes dx. One program an image and group: for more groups than one."""
    index = tl.program_id(0).to(tl.int64)
    groups = channels // group_size
    mean, rstd = tl.load(saved_ptr + index * 2), tl.load(saved_ptr + index * 2 + 1)
    base = index // groups * rows * channels + index % groups * group_size * stride_channel
    row, channel = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_CHANNELS)
    c1 = 0.0
    c2 = 0.0
    for start in range(0, rows, BLOCK_ROWS):
        for first in range(0, group_size, BLOCK_CHANNELS):
            mask = (start + row < rows)[:, None] & (first + channel < group_size)[None, :]
            offsets = base + (
                (start + row)[:, None] * stride_row + (first + channel)[None, :] * stride_channel
            )
            gradient = tl.load(dx_ptr + offsets, mask, other=0.0).to(tl.float32)
            x = (tl.load(x_ptr + offsets, mask, other=0.0).to(tl.float32) - mean) * rstd
            c2 += tl.sum(tl.sum(gradient, 1), 0)
            c1 += tl.sum(tl.sum(gradient * x, 1), 0)
    count = rows * group_size * 1.0
    for start in range(0, rows, BLOCK_ROWS):
        for first in range(0, group_size, BLOCK_CHANNELS):
            mask = (start + row < rows)[:, None] & (first + channel < group_size)[None, :]
            offsets = base + (
                (start + row)[:, None] * stride_row + (first + channel)[None, :] * stride_channel
            )
            gradient = tl.load(dx_ptr + offsets, mask, other=0.0).to(tl.float32)
            x = (tl.load(x_ptr + offsets, mask, other=0.0).to(tl.float32) - mean) * rstd
            gradient = rstd * (gradient - c2 / count - x * (c1 / count))
            gradient += tl.load(dz_ptr + offsets, mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + offsets, gradient.to(dx_ptr.dtype.element_ty), mask)

"""Gradients of the MLP's parameters: split over rows into float32 parts, summed in a fixed order.

With E = Σ dhᵀ·x̂ and D = Σ aᵀ·(k·g), both (hidden, C), e = Σ dh and d = Σ k·g over all rows:
dW1 = E·γ + e⊗β, db1 = e, dγ = Σ_j W1·E, dβ = W1ᵀ·e, dW2 = ls·Dᵀ, db2 = ls·d,
dls = Σ_j W2ᵀ·D + b2·d.
"""

import triton
import triton.language as tl

from ._common import per_channel, per_image
from .activations import activate
from .mlp_gemm import load_group_norm, load_normed


@triton.jit
def weight_parts_kernel(
    gradient_ptr, activated_ptr, hidden_ptr, dz_ptr, x_ptr, saved_ptr, drop_ptr, hidden_drop_ptr,
    products_ptr, unit_sums_ptr, channel_sums_ptr,
    rows, channels, hidden, stride_row, stride_channel, group_size, row_tiles, tiles_a_part,
    ACT: tl.constexpr, ONE_GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Parts of E and D: (parts, 2, hidden, C); of e: (parts, hidden); of d: (parts, C).

    activated: a, or None: then it is computed from hidden, h. row_tiles: of all images.
    Grid: parts · hidden tiles · channel tiles.
    """
    unit_tiles = tl.cdiv(hidden, BLOCK_HIDDEN)
    channel_tiles = tl.cdiv(channels, BLOCK_CHANNELS)
    channel_tile = tl.program_id(0) % channel_tiles
    unit_tile = tl.program_id(0) // channel_tiles % unit_tiles
    part = tl.program_id(0) // channel_tiles // unit_tiles
    unit = unit_tile * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    channel = channel_tile * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    unit_mask, channel_mask = unit < hidden, channel < channels
    image_tiles = tl.cdiv(rows, BLOCK_ROWS)
    groups = channels // group_size

    e = tl.zeros((BLOCK_HIDDEN, BLOCK_CHANNELS), tl.float32)
    d = tl.zeros((BLOCK_HIDDEN, BLOCK_CHANNELS), tl.float32)
    unit_sum = tl.zeros((BLOCK_HIDDEN,), tl.float32)
    channel_sum = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    first = part * tiles_a_part
    for tile in range(first, tl.minimum(first + tiles_a_part, row_tiles)):
        image = (tile // image_tiles).to(tl.int64)
        start = tile % image_tiles * BLOCK_ROWS
        row = start + tl.arange(0, BLOCK_ROWS)
        row_mask = row < rows
        saved = saved_ptr + image * groups * 2
        if ONE_GROUP:
            mean, rstd = tl.load(saved), tl.load(saved + 1)
        else:
            mean, rstd = load_group_norm(saved, channel, channel_mask, group_size)
        offsets = image * rows * channels + (
            row[:, None] * stride_row + channel[None, :] * stride_channel
        )
        x = load_normed(x_ptr + offsets, row_mask, channel, channel_mask, None, None, mean, rstd)
        dz = tl.load(dz_ptr + offsets, row_mask[:, None] & channel_mask[None, :], other=0.0)
        dz = dz.to(tl.float32) * per_image(drop_ptr, image)
        # Transposed: (units, rows). Rows that are not there are 0.
        offsets = (image * rows + row[None, :]) * hidden + unit[:, None]
        mask = unit_mask[:, None] & row_mask[None, :]
        dh = tl.load(gradient_ptr + offsets, mask, other=0.0)
        if activated_ptr is not None:
            activated = tl.load(activated_ptr + offsets, mask, other=0.0)
        else:
            h = tl.load(hidden_ptr + offsets, mask, other=0.0).to(tl.float32)
            activated = (activate(h, ACT) * per_image(hidden_drop_ptr, image)).to(dh.dtype)
        e = tl.dot(dh, x.to(dh.dtype), e, input_precision=PRECISION)
        d = tl.dot(activated, dz.to(dh.dtype), d, input_precision=PRECISION)
        unit_sum += tl.sum(dh.to(tl.float32), 1)
        channel_sum += tl.sum(dz, 0)

    products_ptr += part.to(tl.int64) * 2 * hidden * channels
    offsets = unit[:, None] * channels + channel[None, :]
    mask = unit_mask[:, None] & channel_mask[None, :]
    tl.store(products_ptr + offsets, e, mask)
    tl.store(products_ptr + hidden * channels + offsets, d, mask)
    if channel_tile == 0:
        tl.store(unit_sums_ptr + part * hidden + unit, unit_sum, unit_mask)
    if unit_tile == 0:
        tl.store(channel_sums_ptr + part * channels + channel, channel_sum, channel_mask)


@triton.jit
def weight_gradients_kernel(
    products_ptr, unit_sums_ptr, weight1_ptr, weight2_ptr, gamma_ptr, beta_ptr, scale_ptr,
    dweight1_ptr, dbias1_ptr, dweight2_ptr, rows_ptr, channels, hidden, parts,
    BLOCK_HIDDEN: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """dW1, db1, dW2, and parts of dγ, dβ and dls: (hidden tiles, 3, C).

    Grid: hidden tiles · channel tiles.
    """
    channel_tiles = tl.cdiv(channels, BLOCK_CHANNELS)
    channel_tile = tl.program_id(0) % channel_tiles
    unit_tile = tl.program_id(0) // channel_tiles
    unit = unit_tile * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    channel = channel_tile * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    unit_mask, channel_mask = unit < hidden, channel < channels
    mask = unit_mask[:, None] & channel_mask[None, :]
    offsets = unit[:, None] * channels + channel[None, :]
    e = tl.zeros((BLOCK_HIDDEN, BLOCK_CHANNELS), tl.float32)
    d = tl.zeros((BLOCK_HIDDEN, BLOCK_CHANNELS), tl.float32)
    unit_sum = tl.zeros((BLOCK_HIDDEN,), tl.float32)
    for part in range(parts):
        e += tl.load(products_ptr + offsets, mask, other=0.0)
        products_ptr += hidden * channels
        d += tl.load(products_ptr + offsets, mask, other=0.0)
        products_ptr += hidden * channels
        unit_sum += tl.load(unit_sums_ptr + part * hidden + unit, unit_mask, other=0.0)
    if channel_tile == 0:
        tl.store(dbias1_ptr + unit, unit_sum.to(dbias1_ptr.dtype.element_ty), unit_mask)

    dweight1 = e * per_channel(gamma_ptr, channel, channel_mask)[None, :]
    if beta_ptr is not None:
        beta = per_channel(beta_ptr, channel, channel_mask)
        dweight1 += unit_sum[:, None] * beta[None, :]
    tl.store(dweight1_ptr + offsets, dweight1.to(dweight1_ptr.dtype.element_ty), mask)
    transposed = channel[None, :] * hidden + unit[:, None]
    dweight2 = d * per_channel(scale_ptr, channel, channel_mask)[None, :]
    tl.store(dweight2_ptr + transposed, dweight2.to(dweight2_ptr.dtype.element_ty), mask)

    weight1 = tl.load(weight1_ptr + offsets, mask, other=0.0).to(tl.float32)
    weight2 = tl.load(weight2_ptr + transposed, mask, other=0.0).to(tl.float32)
    rows_ptr += unit_tile * 3 * channels
    tl.store(rows_ptr + channel, tl.sum(weight1 * e, 0), channel_mask)
    rows_ptr += channels
    tl.store(rows_ptr + channel, tl.sum(weight1 * unit_sum[:, None], 0), channel_mask)
    rows_ptr += channels
    tl.store(rows_ptr + channel, tl.sum(weight2 * d, 0), channel_mask)


@triton.jit
def vector_gradients_kernel(
    rows_ptr, channel_sums_ptr, bias2_ptr, scale_ptr, dgamma_ptr, dbeta_ptr, dbias2_ptr,
    dscale_ptr, channels, unit_tiles, parts, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """dγ, dβ, db2 and dls from their parts. Grid: channel tiles."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask = channel < channels
    dgamma = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    dbeta = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    dscale = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    channel_sum = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    for tile in range(unit_tiles):
        base = rows_ptr + tile * 3 * channels + channel
        dgamma += tl.load(base, mask, other=0.0)
        dbeta += tl.load(base + channels, mask, other=0.0)
        dscale += tl.load(base + 2 * channels, mask, other=0.0)
    for part in range(parts):
        channel_sum += tl.load(channel_sums_ptr + part * channels + channel, mask, other=0.0)
    if bias2_ptr is not None:
        dscale += per_channel(bias2_ptr, channel, mask) * channel_sum
    dtype = dgamma_ptr.dtype.element_ty
    tl.store(dgamma_ptr + channel, dgamma.to(dtype), mask)
    tl.store(dbeta_ptr + channel, dbeta.to(dtype), mask)
    tl.store(dscale_ptr + channel, dscale.to(dtype), mask)
    dbias2 = channel_sum * per_channel(scale_ptr, channel, mask)
    tl.store(dbias2_ptr + channel, dbias2.to(dbias2_ptr.dtype.element_ty), mask)

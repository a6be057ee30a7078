"""The channel MLP's half of a block in Triton: launches, forward and backward.

NCHW and channels_last tensors are read and written as they are, by their strides; others are
copied once. The norm is applied on load, not folded into fc1: no launch prepares weights, any
number of groups works, and no difference of large sums loses digits.

Products take operands in fc1_weight's dtype, D, and so are the hidden and its gradient. x, z and
what belongs to the norm and the residual have x's dtype, R: D or, under autocast, float32. Biases
have either. Each gradient has the dtype of its parameter, or x's where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import (
    MERGED_AT_ONCE,
    ceil_div,
    check,
    dense,
    dense_like,
    dense_parameter,
    empty_result,
    on_device_of,
)
from .mlp_backward import (
    fold_kernel,
    hidden_gradient_kernel,
    input_gradient_kernel,
    norm_gradient_kernel,
)
from .mlp_config import (
    VECTOR_BLOCK,
    dot_precision,
    fused_config,
    gemm_config,
    hidden_gradient_config,
    split,
    weight_gradient_config,
)
from .mlp_fused import fused_kernel
from .mlp_gemm import hidden_kernel, merge_kernel, residual_kernel
from .mlp_weight_gradients import (
    vector_gradients_kernel,
    weight_gradients_kernel,
    weight_parts_kernel,
)
from .statistics import partials, statistics

# Channels up to which the weight gradients activate a kept hidden again, once a tile of channels:
# above, its arithmetic costs more than the passes over memory that it saves.
ACTIVATED_TWICE = 128


def stats_partials(
    x_shape: Sequence[int],
    num_groups: int,
    channels_last: bool,
    dtype: torch.dtype,
    x_dtype: torch.dtype | None = None,
) -> int:
    """P of the statistics that `forward` returns. dtype: of the products, and of x if None."""
    _, channels, height, width = x_shape
    if num_groups > 1:
        return partials(channels // num_groups * height * width)[0]
    if (fused := fused_config(channels, num_groups, dtype, x_dtype)) is not None:
        return ceil_div(height * width, fused.rows) * fused.partials
    tile = gemm_config(height * width, channels, dtype, channels_last)
    return tile.tiles(height * width, channels)


def _layout(channels_last: bool, channels: int, rows: int) -> tuple[int, int]:
    """Strides of rows (pixels) and channels."""
    return (channels, 1) if channels_last else (1, rows)


def forward(
    x: Tensor,
    stats: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
    hidden_drop_path: Tensor | None,
    act: str,
    num_groups: int,
    eps: float,
    return_stats: bool,
    save_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(z, saved, stats_out, hidden) of poolformer_kernels::mlp_fwd.

    hidden: (B, H, W, hidden), fc1's result before the activation, if save_hidden; else empty.
    """
    check("mlp", x)
    x, channels_last = dense(x)
    batch, channels, height, width = x.shape
    rows, units, dtype = height * width, fc1_weight.shape[0], fc1_weight.dtype
    z = empty_result(x)
    saved = x.new_empty((batch, num_groups, 2), dtype=torch.float32)
    parts = stats_partials(x.shape, num_groups, channels_last, dtype, x.dtype)
    shape = (batch, num_groups, parts, 3) if return_stats else (0,)
    stats_out = x.new_empty(shape, dtype=torch.float32)
    shape = (batch, height, width, units) if save_hidden else (0,)
    hidden = x.new_empty(shape, dtype=dtype)
    if batch == 0:
        return z, saved, stats_out, hidden
    stats = statistics(x, num_groups, channels_last) if stats is None else stats.contiguous()
    strides = _layout(channels_last, channels, rows)
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale)
    gamma, beta, w1, b1, w2, b2, scale = map(dense_parameter, parameters)
    drop, hidden_drop = map(dense_parameter, (drop_path, hidden_drop_path))
    if (fused := fused_config(channels, num_groups, dtype, x.dtype)) is not None:
        with on_device_of(x):
            fused_kernel[(batch * ceil_div(rows, fused.rows),)](
                x, stats, saved, gamma, beta, w1, b1, w2, b2, scale, drop, hidden_drop, z,
                stats_out if return_stats else None, hidden if save_hidden else None,
                rows, units, *strides, stats.shape[2], eps,
                ACT=act, MERGED_AT_ONCE=MERGED_AT_ONCE, CHANNELS=channels,
                BLOCK_A=fused.parts[0], BLOCK_B=fused.parts[1], BLOCK_ROWS=fused.rows,
                BLOCK_HIDDEN=fused.hidden, PRECISION="ieee", **fused.options,
            )  # fmt: skip
        return z, saved, stats_out, hidden
    # An x in float32 takes the registers of a second sum.
    first = hidden_gradient_config(rows, dtype)
    if x.dtype == dtype:
        first = gemm_config(rows, units, dtype, channels_last)
    second = gemm_config(rows, channels, dtype, channels_last)
    activated = x.new_empty((batch * rows, units), dtype=dtype)
    precision = dot_precision()
    with on_device_of(x):
        if num_groups > 1:
            merge_kernel[(batch * num_groups,)](
                stats, saved, stats.shape[2], eps, BLOCK=MERGED_AT_ONCE
            )
        hidden_kernel[(batch * first.tiles(rows, units),)](
            x, stats, saved, gamma, beta, w1, b1, activated, hidden if save_hidden else None,
            rows, channels, units, *strides, stats.shape[2], channels // num_groups, eps,
            MERGED_AT_ONCE=MERGED_AT_ONCE, ACT=act, ONE_GROUP=num_groups == 1,
            BLOCK_ROWS=first.rows, BLOCK_HIDDEN=first.columns, BLOCK_CHANNELS=first.depth,
            PRECISION=precision, **first.options,
        )  # fmt: skip
        residual_kernel[(batch * second.tiles(rows, channels),)](
            activated, w2, b2, x, scale, drop, hidden_drop, z,
            stats_out if return_stats and num_groups == 1 else None,
            rows, channels, units, *strides,
            BLOCK_ROWS=second.rows, BLOCK_CHANNELS=second.columns, BLOCK_HIDDEN=second.depth,
            PRECISION=precision, **second.options,
        )  # fmt: skip
    if return_stats and num_groups > 1:
        stats_out = statistics(z, num_groups, channels_last)
    return z, saved, stats_out, hidden


def backward(
    dz: Tensor,
    x: Tensor,
    saved: Tensor,
    hidden: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
    hidden_drop_path: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dγ, dβ, dW1, db1, dW2, db2, dls) of poolformer_kernels::mlp_bwd.

    hidden: what `forward` returned; None or empty: it is recomputed from x.
    """
    check("mlp", x)
    x, channels_last = dense(x)
    dz = dense_like(dz, x)
    batch, channels, height, width = x.shape
    rows, units, groups = height * width, fc1_weight.shape[0], saved.shape[1]
    dtype = fc1_weight.dtype
    dx = empty_result(x)
    new = x.new_zeros if batch == 0 else x.new_empty
    dgamma, dbeta, dscale = (new(channels) for _ in range(3))
    dw1, dw2 = (new(weight.shape, dtype=dtype) for weight in (fc1_weight, fc2_weight))
    db1 = new(units, dtype=x.dtype if fc1_bias is None else fc1_bias.dtype)
    db2 = new(channels, dtype=x.dtype if fc2_bias is None else fc2_bias.dtype)
    grads = (dx, dgamma, dbeta, dw1, db1, dw2, db2, dscale)
    if batch == 0:
        return grads
    saved, strides = saved.contiguous(), _layout(channels_last, channels, rows)
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale)
    gamma, beta, w1, b1, w2, b2, scale = map(dense_parameter, parameters)
    drop, hidden_drop = map(dense_parameter, (drop_path, hidden_drop_path))
    shape = (rows, channels, units, *strides)
    group_size, precision = channels // groups, dot_precision()
    hidden = None if hidden is None or hidden.numel() == 0 else hidden.contiguous()
    dh, activated = x.new_empty((batch * rows, units), dtype=dtype), None
    if hidden is None or channels > ACTIVATED_TWICE:
        activated = torch.empty_like(dh)
    first = second = hidden_gradient_config(rows, dtype, channels_last)
    if x.dtype == dtype:  # a float32 x takes registers of the product
        second = gemm_config(rows, channels, dtype, channels_last)
    with on_device_of(x):
        folded = sums = None
        if groups == 1:
            folded = x.new_empty((2, units), dtype=torch.float32)
            sums = x.new_empty((batch, first.tiles(rows, units), 2), dtype=torch.float32)
            fold_kernel[(ceil_div(units, 32),)](
                w1, b1, gamma, beta, folded, channels, units,
                BLOCK_HIDDEN=32, BLOCK_CHANNELS=64,
            )  # fmt: skip
        hidden_gradient_kernel[(batch * first.tiles(rows, units),)](
            dz, x, hidden, saved, gamma, beta, w1, b1, w2, scale, drop, hidden_drop, folded,
            activated, dh, sums, *shape, group_size,
            ACT=act, BLOCK_ROWS=first.rows, BLOCK_HIDDEN=first.columns,
            BLOCK_CHANNELS=first.depth, PRECISION=precision, **first.options,
        )  # fmt: skip
        input_gradient_kernel[(batch * second.tiles(rows, channels),)](
            dh, w1, dz, x, saved, gamma, sums, dx, *shape, first.tiles(rows, units),
            BLOCK_ROWS=second.rows, BLOCK_CHANNELS=second.columns, BLOCK_HIDDEN=second.depth,
            PRECISION=precision, **second.options,
        )  # fmt: skip
        if groups > 1:
            norm_gradient_kernel[(batch * groups,)](
                dz, x, saved, dx, rows, channels, group_size, *strides,
                BLOCK_ROWS=64, BLOCK_CHANNELS=32,
            )  # fmt: skip
        tile = weight_gradient_config(dtype)
        parts, tiles_a_part = split(batch, rows, units, channels, dtype)
        products = x.new_empty((parts, 2, units, channels), dtype=torch.float32)
        unit_sums = x.new_empty((parts, units), dtype=torch.float32)
        channel_sums = x.new_empty((parts, channels), dtype=torch.float32)
        weight_parts_kernel[(parts * tile.tiles(units, channels),)](
            dh, activated, None if activated is not None else hidden, dz, x, saved, drop,
            hidden_drop, products, unit_sums, channel_sums,
            *shape, group_size, batch * ceil_div(rows, tile.depth), tiles_a_part,
            ACT=act, ONE_GROUP=groups == 1, BLOCK_ROWS=tile.depth, BLOCK_HIDDEN=tile.rows,
            BLOCK_CHANNELS=tile.columns, PRECISION=precision, **tile.options,
        )  # fmt: skip
        unit_tiles = ceil_div(units, 32)
        part_rows = x.new_empty((unit_tiles, 3, channels), dtype=torch.float32)
        weight_gradients_kernel[(unit_tiles * ceil_div(channels, 32),)](
            products, unit_sums, w1, w2, gamma, beta, scale, dw1, db1, dw2, part_rows,
            channels, units, parts, BLOCK_HIDDEN=32, BLOCK_CHANNELS=32,
        )  # fmt: skip
        vector_gradients_kernel[(ceil_div(channels, VECTOR_BLOCK),)](
            part_rows, channel_sums, b2, scale, dgamma, dbeta, db2, dscale,
            channels, unit_tiles, parts, BLOCK_CHANNELS=VECTOR_BLOCK,
        )  # fmt: skip
    return grads

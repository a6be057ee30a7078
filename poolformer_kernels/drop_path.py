"""Stochastic depth as factors of each image's branch, drawn as eager PoolFormer draws them."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops._common import autocast_norm_dtype, is_autocast
from .reference import accumulate_dtype


def draw_drop_path(x: Tensor, rate: float, dtype: torch.dtype | None = None) -> Tensor:
    """One factor an image, 0 with probability `rate`, else 1 / (1 − rate): (B), float32 (float64).

    Draws what Hugging Face's PoolFormerDropPath draws for a tensor of x's batch in `dtype` (x's own
    if None), so that the same seed drops the same images.
    """
    keep = 1 - rate
    uniform = torch.rand((x.shape[0], 1, 1, 1), dtype=dtype or x.dtype, device=x.device)
    kept = torch.floor(uniform + keep).view(-1)
    return kept.to(accumulate_dtype(x.dtype)) / keep


def branch_dtypes(x: Tensor, layer_scale: Tensor | None) -> tuple[torch.dtype, torch.dtype]:
    """Eager's dtypes of (a scaled branch, the MLP's hidden): x's, unless autocast rules."""
    if not is_autocast(x):
        return x.dtype, x.dtype
    normed = autocast_norm_dtype(x)
    if layer_scale is not None:
        normed = torch.promote_types(normed, layer_scale.dtype)
    return normed, torch.get_autocast_dtype(x.device.type)


def draw_block_drop_path(
    x: Tensor, rate: float, layer_scale_1: Tensor | None, layer_scale_2: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Hugging Face's four draws of a block as factors (mixer, hidden, MLP branch), each (B)."""
    mixer, lower = branch_dtypes(x, layer_scale_1)
    k1 = draw_drop_path(x, rate, mixer)
    after_act = draw_drop_path(x, rate, lower)
    after_fc2 = draw_drop_path(x, rate, lower)
    promoted = lower if layer_scale_2 is None else torch.promote_types(lower, layer_scale_2.dtype)
    return k1, after_act, after_fc2 * draw_drop_path(x, rate, promoted)

"""Every op in plain PyTorch, forward and backward.

The forwards are the specification: what eager PoolFormer computes, operator by operator. In float64
on contiguous CPU tensors they are the oracle of the test suite, and they are the "torch" backend.
The backwards are the formulas that fused kernels implement; they run on tensors of any layout and
device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda h: F.relu(h).square(),
    "silu": F.silu,
}

_ACTIVATION_BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward.default,
    "gelu_pytorch_tanh": lambda g, h: torch.ops.aten.gelu_backward(g, h, approximate="tanh"),
    "relu": lambda g, h: torch.ops.aten.threshold_backward(g, h, 0),
    "relu2": lambda g, h: 2 * g * F.relu(h),
    "silu": torch.ops.aten.silu_backward.default,
}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over elements of `dtype` are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pool(x: Tensor, pool_size: int) -> Tensor:
    """Average over the part of each pool_size² window that is in the image. x: (B, C, H, W)."""
    return F.avg_pool2d(x, pool_size, stride=1, padding=pool_size // 2, count_include_pad=False)


def pool_transposed(g: Tensor, pool_size: int) -> Tensor:
    """The transpose of `pool`: divide by the window counts, then sum over windows."""

    def counts(size: int) -> Tensor:
        center = torch.arange(size, device=g.device)
        low, high = center - pool_size // 2, center + pool_size // 2
        return high.clamp(max=size - 1) - low.clamp(min=0) + 1

    h, w = counts(g.shape[2]), counts(g.shape[3])
    windows = (h[:, None] * w[None, :]).to(g.dtype)
    return F.avg_pool2d(
        g / windows, pool_size, stride=1, padding=pool_size // 2, divisor_override=1
    )


def statistics(x: Tensor, num_groups: int) -> Tensor:
    """(count, mean, M2) of each image and group. x: (B, C, H, W); returns (B, G, 1, 3)."""
    groups = x.to(accumulate_dtype(x.dtype)).unflatten(1, (num_groups, -1))
    var, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0)
    count = x.shape[1] // num_groups * x.shape[2] * x.shape[3]
    return torch.stack([torch.full_like(mean, count), mean, var * count], dim=-1).unsqueeze(2)


def _residual(
    x: Tensor, branch: Tensor, layer_scale: Tensor | None, drop_path: Tensor | None
) -> Tensor:
    """x + drop_path * layer_scale * branch, with eager's type promotion."""
    if layer_scale is not None:
        branch = layer_scale.view(-1, 1, 1) * branch
    if drop_path is not None:
        branch = (branch * drop_path.view(-1, 1, 1, 1)).to(branch.dtype)
    return x + branch


def patch_embed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int] = 0,
) -> Tensor:
    """y = conv2d(x). x: (B, C_in, H, W); weight: (C, C_in, kernel height, kernel width)."""
    return F.conv2d(x, weight, bias, stride, padding)


def pool_mixer(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    layer_scale: Tensor | None = None,
    drop_path: Tensor | None = None,
    *,
    pool_size: int = 3,
    num_groups: int = 1,
    eps: float = 1e-5,
    stats: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """x + k·ls·(pool(GN(x)) − GN(x)). `stats` is a cache that this does not need."""
    normed = torch.group_norm(x, num_groups, norm_weight, norm_bias, eps)
    y = _residual(x, pool(normed, pool_size) - normed, layer_scale, drop_path)
    return (y, statistics(y.detach(), num_groups)) if return_stats else y


def mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None = None,
    drop_path: Tensor | None = None,
    hidden_drop_path: Tensor | None = None,
    *,
    act: str | Callable[[Tensor], Tensor] = "gelu",
    num_groups: int = 1,
    eps: float = 1e-5,
    stats: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """x + k·ls·fc2(ka·act(fc1(GN(x)))). `stats` is a cache that this does not need."""
    activation = ACTIVATIONS[act] if isinstance(act, str) else act
    normed = torch.group_norm(x, num_groups, norm_weight, norm_bias, eps)
    hidden = activation(F.conv2d(normed, fc1_weight.view(*fc1_weight.shape[:2], 1, 1), fc1_bias))
    if hidden_drop_path is not None:
        hidden = (hidden * hidden_drop_path.view(-1, 1, 1, 1)).to(hidden.dtype)
    out = F.conv2d(hidden, fc2_weight.view(*fc2_weight.shape[:2], 1, 1), fc2_bias)
    z = _residual(x, out, layer_scale, drop_path)
    return (z, statistics(z.detach(), num_groups)) if return_stats else z


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    num_groups: int = 1,
    eps: float = 1e-5,
    stats: Tensor | None = None,
) -> Tensor:
    """(x − μ)·r·γ + β per image and group. `stats` is a cache that this does not need."""
    return torch.group_norm(x, num_groups, weight, bias, eps)


# Backwards. Symbols: g = dL/dy, μ and r the saved mean and 1/std, x̂ = (x − μ)·r, s =
# layer_scale·γ, k the # drop-path factor, n the number of elements of one group of one image.


def _per_channel(saved: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """(mean, rstd) of (B, G, 2), each expanded to (B, C, 1, 1)."""
    expanded = saved.repeat_interleave(channels // saved.shape[1], dim=1)[:, :, None, None]
    return expanded[..., 0], expanded[..., 1]


def _channels(vector: Tensor | None, like: Tensor) -> Tensor:
    """A per-channel parameter as (C) in the dtype of `like`, ones where it is None."""
    return like.new_ones(like.shape[1]) if vector is None else vector.to(like.dtype)


def _images(factor: Tensor | None, like: Tensor) -> Tensor:
    """A per-image factor as (B, 1) in the dtype of `like`, ones where it is None."""
    return (like.new_ones(like.shape[0]) if factor is None else factor.to(like.dtype))[:, None]


def pool_mixer_backward(
    dy: Tensor,
    x: Tensor,
    saved: Tensor,
    norm_weight: Tensor | None,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
    pool_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dx, dγ, dls) of `pool_mixer`, in the accumulation dtype; that of β is exactly 0.

    y = x + k·r·s·(Px − x), so with Q = Σ_hw g·(Px − x) and T = Σ_c k·s·Q (one per image and group):
    dx = g + k·r·s·(Pᵀg − g) − (r²·T/n)·x̂,  dγ = ls·Σ_b k·r·Q,  dls = γ·Σ_b k·r·Q.
    """
    acc, channels, groups = accumulate_dtype(x.dtype), x.shape[1], saved.shape[1]
    x, g = x.to(acc), dy.to(acc)
    gamma, scale, k = _channels(norm_weight, x), _channels(layer_scale, x), _images(drop_path, x)
    mean, rstd = _per_channel(saved, channels)
    x = x - mean  # P·1 = 1, so the mean cancels; without it the difference keeps more digits
    q = (g * (pool(x, pool_size) - x)).sum((2, 3))
    ks = k * (gamma * scale)
    t = (ks * q).unflatten(1, (groups, -1)).mean(2) / (x.shape[2] * x.shape[3])
    t = t.repeat_interleave(channels // groups, dim=1)[:, :, None, None]
    dx = g + ks[:, :, None, None] * rstd * (pool_transposed(g, pool_size) - g)
    dx = dx - t * rstd**3 * x
    q = (k * rstd[:, :, 0, 0] * q).sum(0)
    return dx, scale * q, gamma * q


def group_norm_backward(
    dy: Tensor, x: Tensor, saved: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dx, dγ, dβ) of `group_norm`, in the accumulation dtype."""
    acc, groups = accumulate_dtype(x.dtype), saved.shape[1]
    g = dy.to(acc)
    mean, rstd = _per_channel(saved, x.shape[1])
    normed = (x.to(acc) - mean) * rstd
    gw = g * _channels(weight, g)[:, None, None]

    def group_mean(v: Tensor) -> Tensor:
        mean = v.unflatten(1, (groups, -1)).mean((2, 3, 4))
        return mean.repeat_interleave(v.shape[1] // groups, dim=1)[:, :, None, None]

    dx = rstd * (gw - group_mean(gw) - normed * group_mean(gw * normed))
    return dx, (g * normed).sum((0, 2, 3)), g.sum((0, 2, 3))


def mlp_backward(
    dz: Tensor,
    x: Tensor,
    saved: Tensor,
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
    """Gradients (dx, dγ, dβ, dW1, db1, dW2, db2, dls) of `mlp`, in the accumulation dtype.

    The hidden is recomputed from x. Products run over rows: one row a pixel, one column a channel.
    """
    acc, (batch, channels, height, width) = accumulate_dtype(x.dtype), x.shape
    w1, w2 = fc1_weight.flatten(1).to(acc), fc2_weight.flatten(1).to(acc)

    def rows(v: Tensor) -> Tensor:
        return v.permute(0, 2, 3, 1).reshape(-1, channels)

    def per_row(factor: Tensor) -> Tensor:
        return factor.expand(batch, height * width).reshape(-1, 1)

    g, xf = rows(dz.to(acc)), x.to(acc)
    scale = _channels(layer_scale, xf)
    gk, ka = per_row(_images(drop_path, xf)) * g, per_row(_images(hidden_drop_path, xf))
    mean, rstd = _per_channel(saved, channels)
    normed = (xf - mean) * rstd * _channels(norm_weight, xf)[:, None, None]
    if norm_bias is not None:
        normed = normed + norm_bias.to(acc)[:, None, None]
    normed = rows(normed)
    hidden = normed @ w1.t()
    if fc1_bias is not None:
        hidden += fc1_bias.to(acc)
    d = gk.t() @ (ka * ACTIVATIONS[act](hidden))
    dh = _ACTIVATION_BACKWARDS[act](ka * ((gk * scale) @ w2), hidden)
    dls, colsum = (w2 * d).sum(1), gk.sum(0)
    if fc2_bias is not None:
        dls = dls + fc2_bias.to(acc) * colsum
    dn = (dh @ w1).view(batch, height, width, channels).permute(0, 3, 1, 2)
    dx, dgamma, dbeta = group_norm_backward(dn, x, saved, norm_weight)
    dw1, dw2 = (dh.t() @ normed).view_as(fc1_weight), (scale[:, None] * d).view_as(fc2_weight)
    return dz + dx, dgamma, dbeta, dw1, dh.sum(0), dw2, scale * colsum, dls

"""Every op in plain PyTorch: the specification, what eager PoolFormer computes.

In float64 on contiguous CPU tensors these functions are the oracle of the test suite. In every
dtype, layout and device they are the "torch" backend, whose gradients are autograd's.
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


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over elements of `dtype` are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pool(x: Tensor, pool_size: int) -> Tensor:
    """Average over the part of each pool_size² window that is in the image. x: (B, C, H, W)."""
    return F.avg_pool2d(x, pool_size, stride=1, padding=pool_size // 2, count_include_pad=False)


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

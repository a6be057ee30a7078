"""Both halves of a block on the fused ops, from the parameters of any library's block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import backends
from .ops._common import canonical_act, device_type, is_autocast, needs_grad
from .ops.blocks import BlockCall, BlockParameters, Settings
from .ops.mlp import mlp
from .ops.pool_mixer import pool_mixer


def shares_stats(x: Tensor, act: str, grad: bool, backend: str | None) -> bool:
    """Whether the block's ops hand statistics to one another: all backends but "torch" do."""
    device, autocast = device_type(x), is_autocast(x)
    mixer = backends.resolve("pool_mixer", device, x.dtype, None, grad, autocast, backend)
    channel = backends.resolve("mlp", device, x.dtype, act, grad, autocast, backend)
    return "torch" not in (mixer, channel)


class Product(NamedTuple):
    """The parameters of a 1×1 convolution. weight: (out, in, 1, 1); bias: (out) or None."""

    weight: Tensor
    bias: Tensor | None


class Norm(NamedTuple):
    """The parameters of a GroupNorm. weight, bias: (C) or None."""

    weight: Tensor | None
    bias: Tensor | None
    num_groups: int
    eps: float


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.to(dtype) for t in tensors]


def _norm_in(norm: nn.GroupNorm | Norm, dtype: torch.dtype) -> Norm:
    weight, bias = _cast(dtype, norm.weight, norm.bias)
    return Norm(weight, bias, norm.num_groups, norm.eps)


class Halves(NamedTuple):
    """What the two halves of a block are made of, in any library's block.

    layer_scale_1, layer_scale_2: (C) or None; pool_size, act: as `pool_mixer` and `mlp` take them.
    """

    norm1: nn.GroupNorm | Norm
    norm2: nn.GroupNorm | Norm
    fc1: nn.Conv2d | Product
    fc2: nn.Conv2d | Product
    layer_scale_1: Tensor | None
    layer_scale_2: Tensor | None
    pool_size: int
    act: str | Callable[[Tensor], Tensor]

    def to(self, dtype: torch.dtype) -> Halves:
        """All parameters in `dtype`; gradients come back in their own."""
        return self._replace(
            norm1=_norm_in(self.norm1, dtype),
            norm2=_norm_in(self.norm2, dtype),
            fc1=Product(*_cast(dtype, self.fc1.weight, self.fc1.bias)),
            fc2=Product(*_cast(dtype, self.fc2.weight, self.fc2.bias)),
            layer_scale_1=_cast(dtype, self.layer_scale_1)[0],
            layer_scale_2=_cast(dtype, self.layer_scale_2)[0],
        )


def block_call(
    block: Halves, *, backend: str | None, returns_tuple: bool = False
) -> BlockCall | None:
    """What `blocks` runs for this block, not in training; None if it needs the ops one by one."""
    norm1, norm2, fc1, fc2, layer_scale_1, layer_scale_2, pool_size, act = block
    name = canonical_act(act)
    if name == "callable" or (norm1.num_groups, norm1.eps) != (norm2.num_groups, norm2.eps):
        return None
    parameters = BlockParameters(
        norm1.weight,
        norm1.bias,
        layer_scale_1,
        norm2.weight,
        norm2.bias,
        fc1.weight,
        fc1.bias,
        fc2.weight,
        fc2.bias,
        layer_scale_2,
    )
    settings = Settings(pool_size, norm1.num_groups, norm1.eps, name)
    return BlockCall(parameters, settings, backend, returns_tuple)


def fused_block(
    x: Tensor,
    block: Halves,
    factors: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    residual_scales: tuple[Tensor | None, Tensor | None] = (None, None),
    *,
    save_hidden: bool | None = None,
    residual_in_fp32: bool = True,
    backend: str | None = None,
    stats: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """Both halves of a block; factors of its images' branches: (mixer, hidden, MLP).

    residual_scales: (C) each, what PoolFormerV2 multiplies the residual of mixer and MLP with.
    residual_in_fp32: under autocast, False runs all of it in autocast's dtype (see `accelerate`).
    With return_stats: (result, its statistics, or None where the backends do not share them).
    """
    if not residual_in_fp32 and is_autocast(x):
        device = device_type(x)
        dtype = torch.get_autocast_dtype(device)
        scales = _cast(dtype, *residual_scales)
        with torch.autocast(device, enabled=False):
            return fused_block(
                x.to(dtype),
                block.to(dtype),
                factors,
                (scales[0], scales[1]),
                save_hidden=save_hidden,
                backend=backend,
                stats=stats,
                return_stats=return_stats,
            )
    norm1, norm2, fc1, fc2, layer_scale_1, layer_scale_2, pool_size, act = block
    k1, hidden_drop_path, k2 = factors
    scale_1, scale_2 = residual_scales
    grad = needs_grad(x, fc1.weight, fc2.weight)
    shares = norm1.num_groups == norm2.num_groups and shares_stats(
        x, canonical_act(act), grad, backend
    )
    x = _as_promoted(x, scale_1)
    y = pool_mixer(
        x,
        norm1.weight,
        norm1.bias,
        layer_scale_1,
        k1,
        pool_size=pool_size,
        num_groups=norm1.num_groups,
        eps=norm1.eps,
        stats=stats,
        return_stats=shares and scale_1 is None,
        backend=backend,
    )
    y, stats = y if isinstance(y, tuple) else (y, None)
    y = _as_promoted(_scale_residual(y, x, scale_1), scale_2)
    z = mlp(
        y,
        norm2.weight,
        norm2.bias,
        fc1.weight,
        fc1.bias,
        fc2.weight,
        fc2.bias,
        layer_scale_2,
        k2,
        hidden_drop_path,
        act=act,
        num_groups=norm2.num_groups,
        eps=norm2.eps,
        stats=stats,
        return_stats=return_stats and shares and scale_2 is None,
        save_hidden=save_hidden,
        backend=backend,
    )
    z, stats = z if isinstance(z, tuple) else (z, None)
    z = _scale_residual(z, y, scale_2)
    return (z, stats) if return_stats else z


def _as_promoted(x: Tensor, scale: Tensor | None) -> Tensor:
    """x in the dtype of scale · x, so that x + branch is not rounded to a narrower one."""
    return x if scale is None else x.to(torch.promote_types(x.dtype, scale.dtype))


def _scale_residual(y: Tensor, x: Tensor, scale: Tensor | None) -> Tensor:
    """scale · x + branch from y = x + branch, as y + (scale − 1)·x; scale: (C).

    Its error is eager's around scale 1, where training starts, and eps·|x| elsewhere.
    """
    return y if scale is None else torch.addcmul(y, x, scale.view(-1, 1, 1) - 1)

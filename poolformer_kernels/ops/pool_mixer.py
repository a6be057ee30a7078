"""pool_mixer: the token mixer's half of a PoolFormer block, GroupNorm to residual, as one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import resolve
from . import _common as common

common.define(
    "pool_mixer_fwd(Tensor x, Tensor? stats, Tensor? norm_weight, Tensor? layer_scale, "
    "Tensor? drop_path, int pool_size, int num_groups, float eps, bool return_stats, str backend) "
    "-> (Tensor y, Tensor saved, Tensor stats_out)"
)
common.define(
    "pool_mixer_bwd(Tensor dy, Tensor x, Tensor saved, Tensor? norm_weight, Tensor? layer_scale, "
    "Tensor? drop_path, int pool_size, str backend) "
    "-> (Tensor dx, Tensor dnorm_weight, Tensor dlayer_scale)"
)


def _fake_forward(
    x: Tensor,
    stats: Tensor | None,
    norm_weight: Tensor | None,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
    pool_size: int,
    num_groups: int,
    eps: float,
    return_stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    y = common.empty_like_op_output(x)
    return (
        y,
        common.fake_saved(x, num_groups),
        common.fake_stats("pool_mixer", x, num_groups, return_stats, backend),
    )


def _fake_backward(
    dy: Tensor, x: Tensor, saved: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    return common.empty_like_op_output(x), x.new_empty(channels), x.new_empty(channels)


common.register_fake("pool_mixer_fwd", _fake_forward)
common.register_fake("pool_mixer_bwd", _fake_backward)
common.register_gpu("pool_mixer")


_forward_op = torch.ops.poolformer_kernels.pool_mixer_fwd.default
_backward_op = torch.ops.poolformer_kernels.pool_mixer_bwd.default


class PoolMixerFunction(common.KernelFunction):
    """Autograd of `pool_mixer`. Saves x and two numbers per image and group, no intermediate.

    Its arguments are norm_bias, the dtype to compute in, and then those of pool_mixer_fwd. x is
    saved as it came.
    """

    @staticmethod
    def forward(
        norm_bias: Tensor | None, dtype: torch.dtype, x: Tensor, *args: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _forward_op(x.to(dtype), *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        norm_bias, dtype, x, _, norm_weight, layer_scale, *rest = inputs
        drop_path, ctx.pool_size, *_, ctx.backend = rest
        _, saved, stats_out = output
        ctx.mark_non_differentiable(saved, stats_out)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, saved, norm_weight, norm_bias, layer_scale, drop_path)
        ctx.dtype = dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 12
        x, saved, norm_weight, norm_bias, layer_scale, drop_path = ctx.saved_tensors
        with torch.no_grad():
            parameters = (norm_weight, layer_scale, drop_path)
            dx, dnorm_weight, dlayer_scale = _backward_op(
                dy, x.to(ctx.dtype), saved, *parameters, ctx.pool_size, ctx.backend
            )
            dx = dx.to(x.dtype)
            dnorm_bias = None if norm_bias is None else torch.zeros_like(norm_bias)
        grads = (
            dnorm_bias,
            None,
            dx,
            None,
            None if norm_weight is None else dnorm_weight,
            None if layer_scale is None else dlayer_scale,
        )
        return *common.once("pool_mixer", grads, dy, x, norm_weight, layer_scale), *(None,) * 6


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
    backend: str | None = None,
) -> Tensor | Any:
    """y = x + drop_path · layer_scale · (pool(GN(x)) − GN(x)), pool being a pool_size² average.

    Args:
        x: (B, C, H, W), NCHW or channels_last, float32, bfloat16, float16 or float64.
        norm_weight, norm_bias: (C), GroupNorm's γ and β. β cancels; its gradient is zeros.
        layer_scale: (C).
        drop_path: (B), the factor of each image's branch: 0, or 1 / (1 − rate). float32 or x's
            dtype.
        pool_size: odd; windows are clipped at the border and divided by what is left of them.
        num_groups: of the GroupNorm; it divides C.
        stats: (B, G, P, 3), what the op that made x returned for return_stats=True: partial
            statistics (count, mean, M2) of x. They only save the time to compute them.
        return_stats: return (y, statistics of y).
        backend: "auto", "torch", "cpu", "triton" or "cuda"; see `use_backend`.

    Returns:
        y: (B, C, H, W) in x's dtype and layout; with return_stats also (B, G, P, 3) in float32
            (float64). Under torch.autocast it is computed in float32, and y has eager's dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what would.
        BackendUnavailable: `backend` cannot run this call.

    Source: MetaFormer Is Actually What You Need for Vision, arXiv:2111.11418, Algorithm 1.
    """
    common.check_input("pool_mixer", x, num_groups, eps)
    common.check_pool_size("pool_mixer", pool_size)
    autocast, vector = common.is_autocast(x), (x.shape[1],)
    common.check_parameter("pool_mixer", "norm_weight", norm_weight, vector, x, autocast)
    common.check_parameter("pool_mixer", "norm_bias", norm_bias, vector, x, autocast)
    common.check_parameter("pool_mixer", "layer_scale", layer_scale, vector, x, autocast)
    common.check_factor("pool_mixer", "drop_path", drop_path, x)
    common.check_stats("pool_mixer", stats, x, num_groups)
    grad = common.needs_grad(x, norm_weight, norm_bias, layer_scale)
    backend = resolve("pool_mixer", common.device_type(x), x.dtype, None, grad, autocast, backend)
    if backend == "torch":
        return reference.pool_mixer(
            x,
            norm_weight,
            norm_bias,
            layer_scale,
            drop_path,
            pool_size=pool_size,
            num_groups=num_groups,
            eps=eps,
            return_stats=return_stats,
        )
    dtype = computed = x.dtype
    if autocast:
        normed = common.autocast_norm_dtype(x)
        dtype, computed = common.promote(normed, layer_scale, x), torch.float32
        norm_weight, norm_bias, layer_scale, drop_path = common.as_float32(
            norm_weight, norm_bias, layer_scale, drop_path
        )
    args = (
        norm_bias,
        computed,
        x,
        stats,
        norm_weight,
        layer_scale,
        drop_path,
        pool_size,
        num_groups,
        eps,
        return_stats,
        backend,
    )
    y, _, stats_out = (PoolMixerFunction.apply if grad else PoolMixerFunction.forward)(*args)
    y = y if y.dtype == dtype else y.to(dtype)
    return (y, stats_out) if return_stats else y

"""mlp: the channel MLP's half of a PoolFormer block, GroupNorm to residual, as one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import resolve
from . import _common as common

common.define(
    "mlp_fwd(Tensor x, Tensor? stats, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "
    "Tensor? layer_scale, Tensor? drop_path, Tensor? hidden_drop_path, str act, int num_groups, "
    "float eps, bool return_stats, bool save_hidden, str backend, *, ScalarType? product=None) "
    "-> (Tensor z, Tensor saved, Tensor stats_out, Tensor hidden)"
)
common.define(
    "mlp_bwd(Tensor dz, Tensor x, Tensor saved, Tensor? hidden, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "
    "Tensor? layer_scale, Tensor? drop_path, Tensor? hidden_drop_path, str act, str backend, *, "
    "ScalarType? product=None) "
    "-> (Tensor dx, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dfc1_weight, Tensor dfc1_bias, "
    "Tensor dfc2_weight, Tensor dfc2_bias, Tensor dlayer_scale)"
)


def _fake_forward(
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
    backend: str,
    *,
    product: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, height, width = x.shape
    hidden = (batch, height, width, fc1_weight.shape[0]) if save_hidden else (0,)
    return (
        common.empty_like_op_output(x),
        common.fake_saved(x, num_groups),
        common.fake_stats("mlp", x, num_groups, return_stats, backend, fc1_weight.dtype),
        fc1_weight.new_empty(hidden, dtype=product),
    )


def _fake_backward(
    dz: Tensor,
    x: Tensor,
    saved: Tensor,
    hidden: Tensor | None,
    *args: Any,
    product: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    parameters, channels = args[:7], x.shape[1]
    units = parameters[2].shape[0]
    products = (parameters[2].shape, units, parameters[4].shape)
    shapes = (channels, channels, *products, channels, channels)
    likes = (x if p is None else p for p in parameters)
    grads = (like.new_empty(shape) for like, shape in zip(likes, shapes, strict=True))
    return common.empty_like_op_output(x), *grads


common.register_fake("mlp_fwd", _fake_forward)
common.register_fake("mlp_bwd", _fake_backward)
common.register_gpu("mlp")


_forward_op = torch.ops.poolformer_kernels.mlp_fwd.default
_backward_op = torch.ops.poolformer_kernels.mlp_bwd.default


class MlpFunction(common.KernelFunction):
    """Autograd of `mlp`, with the arguments of mlp_fwd, `product` the last.

    Saves x, two numbers per image and group and, if asked for, the hidden; else it is recomputed.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _forward_op(*args[:-1], product=args[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, _, *tensors = inputs[:11]
        _, saved, stats_out, hidden = output
        ctx.mark_non_differentiable(saved, stats_out, hidden)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, saved, hidden if hidden.dim() == 4 else None, *tensors)
        ctx.act, ctx.backend, ctx.product = inputs[11], inputs[16], inputs[17]

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dz is None:
            return (None,) * 18
        x, saved, hidden, *tensors = ctx.saved_tensors
        parameters = tensors[:7]
        with torch.no_grad():
            args = (dz, x, saved, hidden, *tensors, ctx.act, ctx.backend)
            dx, *grads = _backward_op(*args, product=ctx.product)
        given = (None if t is None else grad for t, grad in zip(parameters, grads, strict=True))
        return *common.once("mlp", (dx, None, *given), dz, x, *parameters), *(None,) * 9


def _saves_hidden(x: Tensor, backend: str, autocast: bool, product: torch.dtype | None) -> bool:
    """Whether `backend` keeps the hidden when it is not told: where that is quick and not large."""
    narrow = not autocast or product == torch.bfloat16  # no wider than what eager keeps
    return backend == "cpu" and narrow and x.shape[1] >= 256


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
    save_hidden: bool | None = None,
    backend: str | None = None,
) -> Tensor | Any:
    """z = x + drop_path · layer_scale · fc2(hidden_drop_path · act(fc1(GN(x)))).

    Args:
        x: (B, C, H, W), NCHW or channels_last, float32, bfloat16, float16 or float64.
        norm_weight, norm_bias: (C).
        fc1_weight: (hidden, C) or (hidden, C, 1, 1); fc1_bias: (hidden) or None.
        fc2_weight: (C, hidden) or (C, hidden, 1, 1); fc2_bias: (C) or None.
        layer_scale: (C).
        drop_path, hidden_drop_path: (B), the factors of each image's branch and hidden: 0, or
            1 / (1 − rate). float32 or x's dtype.
        act: "gelu" (erf), "gelu_pytorch_tanh" (also "gelu_new"), "relu", "silu", "relu2" (relu
            squared, which GPU kernels lack), or a callable, which only the "torch" backend runs.
        num_groups: of the GroupNorm; it divides C.
        stats: (B, G, P, 3), what the op that made x returned for return_stats=True: partial
            statistics (count, mean, M2) of x. They only save the time to compute them.
        return_stats: return (z, statistics of z).
        save_hidden: keep fc1's result for the backward, B · H · W · hidden elements, instead of
            computing it again from x. None leaves that to the backend: "cpu" keeps it where C >=
            256 (under autocast if products are of bfloat16), so that a whole model saves under a
            third of what eager does; "triton" and "cuda" do not. "torch" always saves what eager
            saves.
        backend: "auto", "torch", "cpu", "triton" or "cuda"; see `use_backend`.

    Returns:
        z: (B, C, H, W) in x's dtype and layout; with return_stats also (B, G, P, 3) in float32
            (float64). Under torch.autocast the products are in its dtype (on backend "cpu" in
            float32, but for bfloat16 that the CPU multiplies natively), all else in float32, and z
            has eager's dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what would.
        BackendUnavailable: `backend` cannot run this call.

    Source: MetaFormer Is Actually What You Need for Vision, arXiv:2111.11418, equation 3.
    """
    common.check_input("mlp", x, num_groups, eps)
    act_name = common.canonical_act(act)
    autocast, vector = common.is_autocast(x), (x.shape[1],)
    hidden = common.check_weights("mlp", fc1_weight, fc2_weight, x, autocast)
    common.check_parameter("mlp", "norm_weight", norm_weight, vector, x, autocast)
    common.check_parameter("mlp", "norm_bias", norm_bias, vector, x, autocast)
    common.check_parameter("mlp", "fc1_bias", fc1_bias, (hidden,), x, autocast)
    common.check_parameter("mlp", "fc2_bias", fc2_bias, vector, x, autocast)
    common.check_parameter("mlp", "layer_scale", layer_scale, vector, x, autocast)
    common.check_factor("mlp", "drop_path", drop_path, x)
    common.check_factor("mlp", "hidden_drop_path", hidden_drop_path, x)
    common.check_stats("mlp", stats, x, num_groups)
    grad = common.needs_grad(
        x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale
    )
    backend = resolve("mlp", common.device_type(x), x.dtype, act_name, grad, autocast, backend)
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale)
    if backend == "torch":
        return reference.mlp(
            x,
            *parameters,
            drop_path,
            hidden_drop_path,
            act=act if act_name == "callable" else act_name,
            num_groups=num_groups,
            eps=eps,
            return_stats=return_stats,
        )
    factors: tuple[Tensor | None, ...] = (drop_path, hidden_drop_path)
    dtype, rounded = x.dtype, None
    if autocast:
        product = torch.get_autocast_dtype(common.device_type(x))
        dtype = common.promote(product, layer_scale, x)
        x, norm_weight, norm_bias, layer_scale, *factors = common.as_float32(
            x, norm_weight, norm_bias, layer_scale, *factors
        )
        if backend == "cpu":  # whose kernels round the weights themselves
            rounded = common.cpu_product_dtype(product)
            product = torch.float32
            fc1_bias, fc2_bias = common.as_float32(fc1_bias, fc2_bias)
        weights = (fc1_weight.to(product), fc1_bias, fc2_weight.to(product), fc2_bias)
        parameters = (norm_weight, norm_bias, *weights, layer_scale)
    saves = save_hidden
    if saves is None:
        saves = _saves_hidden(x, backend, autocast, rounded)
    args = (
        x,
        stats,
        *parameters,
        *factors,
        act_name,
        num_groups,
        eps,
        return_stats,
        grad and saves,
        backend,
    )
    if grad:
        z, _, stats_out, _ = MlpFunction.apply(*args, rounded)
    else:
        z, _, stats_out, _ = _forward_op(*args, product=rounded)
    z = z if z.dtype == dtype else z.to(dtype)
    return (z, stats_out) if return_stats else z

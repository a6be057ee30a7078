"""group_norm: GroupNorm of the classifier's head as one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import resolve
from . import _common as common

common.define(
    "group_norm_fwd(Tensor x, Tensor? stats, Tensor? weight, Tensor? bias, int num_groups, "
    "float eps, str backend) -> (Tensor y, Tensor saved)"
)
common.define(
    "group_norm_bwd(Tensor dy, Tensor x, Tensor saved, Tensor? weight, str backend) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)"
)


def _fake_forward(
    x: Tensor,
    stats: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return common.empty_like_op_output(x), common.fake_saved(x, num_groups)


def _fake_backward(
    dy: Tensor, x: Tensor, saved: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    return common.empty_like_op_output(x), x.new_empty(channels), x.new_empty(channels)


common.register_fake("group_norm_fwd", _fake_forward)
common.register_fake("group_norm_bwd", _fake_backward)
common.register_gpu("group_norm")


_forward_op = torch.ops.poolformer_kernels.group_norm_fwd.default
_backward_op = torch.ops.poolformer_kernels.group_norm_bwd.default


class GroupNormFunction(common.KernelFunction):
    """Autograd of `group_norm`, with its arguments. Saves x and two numbers per image and group."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _forward_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, _, weight, bias, *_, backend = inputs
        _, saved = output
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, saved, weight)
        ctx.has_bias, ctx.backend = bias is not None, backend

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        x, saved, weight = ctx.saved_tensors
        with torch.no_grad():
            dx, dweight, dbias = _backward_op(dy, x, saved, weight, ctx.backend)
        grads = (
            dx,
            None,
            None if weight is None else dweight,
            dbias if ctx.has_bias else None,
        )
        return *common.once("group_norm", grads, dy, x, weight), *(None,) * 3


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    num_groups: int = 1,
    eps: float = 1e-5,
    stats: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = (x − mean) / sqrt(var + eps) · weight + bias, mean and var of each image and group.

    Args:
        x: (B, C, H, W), NCHW or channels_last, float32, bfloat16, float16 or float64.
        weight, bias: (C).
        num_groups: it divides C.
        stats: (B, G, P, 3), what the op that made x returned for return_stats=True: partial
            statistics (count, mean, M2) of x. They only save the time to compute them.
        backend: "auto", "torch", "cpu", "triton" or "cuda"; see `use_backend`.

    Returns:
        (B, C, H, W) in x's dtype and layout. Under torch.autocast it has eager's dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what would.
        BackendUnavailable: `backend` cannot run this call.

    Source: Group Normalization, arXiv:1803.08494.
    """
    common.check_input("group_norm", x, num_groups, eps)
    autocast, vector = common.is_autocast(x), (x.shape[1],)
    common.check_parameter("group_norm", "weight", weight, vector, x, autocast)
    common.check_parameter("group_norm", "bias", bias, vector, x, autocast)
    common.check_stats("group_norm", stats, x, num_groups)
    grad = common.needs_grad(x, weight, bias)
    backend = resolve("group_norm", common.device_type(x), x.dtype, None, grad, autocast, backend)
    if backend == "torch":
        return reference.group_norm(x, weight, bias, num_groups=num_groups, eps=eps)
    dtype = x.dtype
    if autocast:
        dtype = common.autocast_norm_dtype(x)
        x, weight, bias = common.as_float32(x, weight, bias)
    args = (x, stats, weight, bias, num_groups, eps, backend)
    y, _ = GroupNormFunction.apply(*args) if grad else _forward_op(*args)
    return y if y.dtype == dtype else y.to(dtype)

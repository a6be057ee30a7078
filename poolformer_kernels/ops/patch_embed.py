"""patch_embed: the strided convolution that begins a stage, as one product on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .. import reference
from ..backends import requested, resolve
from ..reference import accumulate_dtype
from . import _common as common

common.define(
    "patch_embed_fwd(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
    "str backend) -> Tensor"
)


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    backend: str,
) -> Tensor:
    sizes = (
        (x.shape[2 + i] + 2 * padding[i] - weight.shape[2 + i]) // stride[i] + 1 for i in (0, 1)
    )
    last = torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight))
    return torch.empty(
        (x.shape[0], weight.shape[0], *sizes),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


common.register_fake("patch_embed_fwd", _fake_forward)
_forward_op = torch.ops.poolformer_kernels.patch_embed_fwd.default


common.define(
    "patch_embed_bwd(Tensor dy, Tensor x, Tensor weight, int[2] stride, int[2] padding, "
    "bool[3] wanted, str backend) -> (Tensor, Tensor, Tensor)"
)


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight = (
        common.empty_like_op_output(t) if want else t.new_empty(0)
        for t, want in zip((x, weight), wanted, strict=False)
    )
    return dx, dweight, x.new_empty(weight.shape[0] if wanted[2] else 0)


common.register_fake("patch_embed_bwd", _fake_backward)
_backward_op = torch.ops.poolformer_kernels.patch_embed_bwd.default


class PatchEmbedFunction(common.KernelFunction):
    """Autograd of `patch_embed`, with the arguments of patch_embed_fwd and the dtype of products.

    Saves x and the weight, which is rounded again rather than saved twice. Gradients that are
    differentiated are PyTorch's.
    """

    @staticmethod
    def forward(*args: Any) -> Tensor:
        x, weight, bias, *rest, product = args
        return _forward_op(x, *_in_dtype(product, weight, bias), *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.stride, ctx.padding, ctx.backend, ctx.product = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted, geometry = list(ctx.needs_input_grad[:3]), (ctx.stride, ctx.padding)
        dtypes = (x.dtype, weight.dtype, ctx.bias_dtype)
        weight = weight.to(ctx.product)
        if torch.is_grad_enabled():
            # In float32: in 16 bits it is slow, or reads memory that no one has set.
            dtype = accumulate_dtype(x.dtype)
            grads = torch.ops.aten.convolution_backward(
                dy.to(dtype),
                x.to(dtype),
                weight.to(dtype),
                None if ctx.bias_dtype is None else weight.shape[:1],
                *geometry,
                [1, 1],
                False,
                [0, 0],
                1,
                wanted,
            )
        else:
            grads = _backward_op(dy, x, weight, *geometry, wanted, ctx.backend)
        given = zip(grads, wanted, dtypes, strict=True)
        return *(g.to(dtype) if w else None for g, w, dtype in given), *(None,) * 4


def _in_dtype(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def patch_embed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int] = 0,
    backend: str | None = None,
) -> Tensor:
    """y = conv2d(x, weight, bias, stride, padding), PoolFormer's stem and downsampling.

    GPU backends leave it to PyTorch. Second derivatives are PyTorch's everywhere.

    Args:
        x: (B, C_in, H, W), NCHW or channels_last, float32, bfloat16, float16 or float64.
        weight: (C, C_in, kernel height, kernel width).
        bias: (C).
        stride, padding: of height and width, in pixels; the padding is zeros.
        backend: "auto", "torch" or "cpu"; see `use_backend`.

    Returns:
        (B, C, H', W') with H' = (H + 2 padding − kernel height) // stride + 1, in x's dtype;
        channels_last if x or weight is. Under torch.autocast it has eager's dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what would.
        BackendUnavailable: `backend` cannot run this call.

    Source: torch.nn.functional.conv2d.
    """
    stride, padding = _pair("stride", stride, 1), _pair("padding", padding, 0)
    common.check_input("patch_embed", x, 1, 0.0)
    autocast = common.is_autocast(x)
    _check_weight(x, weight, bias, padding, autocast)
    grad = common.needs_grad(x, weight, bias)
    name = requested(backend)
    if name in ("cuda", "triton"):
        name = "torch"
    device = common.device_type(x)
    name = resolve("patch_embed", device, x.dtype, None, grad, autocast, name)
    if name == "torch":
        return reference.patch_embed(x, weight, bias, stride=stride, padding=padding)
    dtype = product = x.dtype
    if autocast:
        dtype = torch.get_autocast_dtype(device)
        product = common.cpu_product_dtype(dtype)
        x = x.to(product)
    args = (x, weight, bias, stride, padding, name, product)
    y = PatchEmbedFunction.apply(*args) if grad else PatchEmbedFunction.forward(*args)
    return y if y.dtype == dtype else y.to(dtype)


def _pair(name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or any(type(v) is not int or v < least for v in pair):
        raise ValueError(
            f"patch_embed: {name} is {value!r}; it has to be one or two ints of at least {least}."
        )
    return pair


def _check_weight(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int], autocast: bool
) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"patch_embed: weight is a {type(weight).__name__}; it has to be a torch.Tensor."
        )
    shape = tuple(weight.shape)
    if weight.dim() != 4 or weight.numel() == 0 or shape[1] != x.shape[1]:
        raise ValueError(
            f"patch_embed: weight has shape {shape}; x of shape {tuple(x.shape)} needs "
            f"(C, {x.shape[1]}, kernel height, kernel width)."
        )
    common.check_parameter("patch_embed", "weight", weight, weight.shape, x, autocast)
    common.check_parameter("patch_embed", "bias", bias, shape[:1], x, autocast)
    if any(x.shape[2 + i] + 2 * padding[i] < shape[2 + i] for i in (0, 1)):
        raise ValueError(
            f"patch_embed: x has shape {tuple(x.shape)}; with padding {padding} it is smaller than "
            f"the window {shape[2:]}. Enlarge the images."
        )

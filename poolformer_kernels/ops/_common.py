"""What all ops share: the dispatcher library, the checks of arguments, the layout of outputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .. import _extension
from ..backends import BackendUnavailable
from ..reference import ACTIVATIONS, accumulate_dtype

LIBRARY = torch.library.Library("poolformer_kernels", "DEF")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ALIASES = {"gelu_new": "gelu_pytorch_tanh"}

_extension.load()  # registers the C++ kernels with the dispatcher


def define(schema: str) -> None:
    """Define the op of `schema` in the poolformer_kernels namespace."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def register_fake(name: str, fake: Callable[..., Any]) -> None:
    """`fake` tells the tracer the shapes, dtypes and strides of what op `name` returns."""
    torch.library.register_fake(f"poolformer_kernels::{name}", fake, lib=LIBRARY)


def empty_like_op_output(x: Tensor) -> Tensor:
    """What an op returns for x: dense, in the memory format that x suggests, as kernels do."""
    return torch.empty_like(x, memory_format=suggest_memory_format(x))


def fake_saved(x: Tensor, num_groups: int) -> Tensor:
    """(mean, rstd) of each image and group."""
    return x.new_empty((x.shape[0], num_groups, 2), dtype=accumulate_dtype(x.dtype))


def fake_stats(
    op: str,
    x: Tensor,
    num_groups: int,
    return_stats: bool,
    backend: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The partial statistics beside an op's output; the "cpu" backend merges them to one.

    dtype: that of products, if it is not x's.
    """
    shape: tuple[Any, ...] = (0,)
    if return_stats:
        partials = 1
        channels_last = suggest_memory_format(x) == torch.channels_last
        if backend == "triton":
            dtypes = (x.dtype,) if dtype is None else (dtype, x.dtype)
            partials = kernels(op).stats_partials(x.shape, num_groups, channels_last, *dtypes)
        elif backend == "cuda":
            itemsize = (dtype or x.dtype).itemsize
            partials = cuda_function("stats_partials")(
                op, *x.shape[1:], num_groups, channels_last, itemsize
            )
        shape = (x.shape[0], num_groups, partials, 3)
    return x.new_empty(shape, dtype=accumulate_dtype(x.dtype))


def kernels(op: str) -> Any:
    """The module of `op`'s Triton kernels, and with it Triton: imported when first asked for."""
    return importlib.import_module(f"poolformer_kernels.kernels.{op}")


def cuda_function(name: str) -> Callable[..., Any]:
    """A function of the extension's CUDA kernels."""
    function = getattr(_extension.load(), f"cuda_{name}", None)
    if function is None:
        reason = _extension.why_not() or f"this build has no CUDA kernel {name}"
        raise BackendUnavailable(f"backend 'cuda' cannot run this call: {reason}.")
    return function


def gpu_kernel(op: str, direction: str, backend: str) -> Callable[..., Any]:
    """The "forward" or "backward" of `op` on a GPU.

    Raises:
        BackendUnavailable: this build has no CUDA kernels.
        ValueError: `backend` is none of GPUs'.
    """
    if backend == "triton":
        return getattr(kernels(op), direction)
    if backend == "cuda":
        return cuda_function(f"{op}_{direction}")
    raise ValueError(
        f"{op}: the tensors are on a GPU and backend is {backend!r}; this op runs backends 'cuda' "
        "and 'triton' there."
    )


def register_gpu(op: str) -> None:
    """Let GPU kernels implement forward and backward of `op` there."""

    def run(direction: str, *args: Any, product: torch.dtype | None = None) -> Any:
        *arguments, backend = args
        if product is not None:
            raise ValueError(f"{op}: product is {product}; on a GPU it is the weights' dtype.")
        return gpu_kernel(op, direction, backend)(*arguments)

    LIBRARY.impl(f"{op}_fwd", partial(run, "forward"), "CUDA")
    LIBRARY.impl(f"{op}_bwd", partial(run, "backward"), "CUDA")


class _Once(torch.autograd.Function):
    """Gradients as they are; the gradient of them is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, count: int, *tensors: Tensor | None) -> Any:
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{ctx.op}: this gradient was computed by a kernel and cannot be differentiated again. "
            'For second derivatives (create_graph=True) run the forward with backend "torch": '
            'use_backend("torch"), or accelerate(model, "torch").'
        )


class KernelFunction(torch.autograd.Function):
    """Autograd of an op whose forward and backward are kernels.

    Under torch.func.vmap the op runs once for each slice. It has no forward mode: torch.compile
    refuses Functions with a jvp, also with one that only says so.
    """

    generate_vmap_rule = True


def once(op: str, grads: tuple[Tensor | None, ...], *inputs: Tensor | None) -> Any:
    """`grads` of `op`, which depend on `inputs`; differentiating them raises a clear error."""
    return _Once.apply(op, len(grads), *grads, *inputs) if torch.is_grad_enabled() else grads


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record a call with these arguments."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def canonical_act(act: str | Callable[[Tensor], Tensor]) -> str:
    """The name under which kernels know `act`: "callable" for a callable.

    Raises:
        ValueError: unknown name.
        TypeError: neither a name nor a callable.
    """
    if isinstance(act, str):
        act = ALIASES.get(act, act)
        if act not in ACTIVATIONS:
            known = ", ".join(repr(name) for name in (*ACTIVATIONS, *ALIASES))
            raise ValueError(f"mlp: act is {act!r}; it has to be one of {known}, or a callable.")
        return act
    if not callable(act):
        raise TypeError(f"mlp: act is a {type(act).__name__}; it has to be a name or a callable.")
    return "callable"


def check_input(op: str, x: Tensor, num_groups: int, eps: float) -> None:
    """Refuse an x, num_groups or eps that no backend can work with."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x is a {type(x).__name__}; it has to be a torch.Tensor.")
    if x.dim() != 4:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)}; it has to be (B, C, H, W). Add the missing "
            "dimension with x.unsqueeze(0), or reshape tokens (B, N, C) to images."
        )
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{op}: x is {x.dtype}; it has to be float32, bfloat16, float16 or float64. Convert it "
            "with x.float(), say."
        )
    _, channels, height, width = x.shape
    if channels == 0 or height == 0 or width == 0:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; C, H and W have to be at least 1.")
    if type(num_groups) is not int or num_groups < 1 or channels % num_groups != 0:
        raise ValueError(
            f"{op}: num_groups is {num_groups!r}; it has to be a positive int that divides the "
            f"{channels} channels of x. PoolFormer uses 1."
        )
    if not eps >= 0:
        raise ValueError(f"{op}: eps is {eps!r}; it has to be a number that is not negative.")


def check_pool_size(op: str, pool_size: int) -> None:
    """Refuse a window that has no centre."""
    if type(pool_size) is not int or pool_size < 1 or pool_size % 2 == 0:
        raise ValueError(
            f"{op}: pool_size is {pool_size!r}; it has to be an odd positive int. An even window "
            "changes the image's size, so that the result cannot be subtracted from it."
        )


def check_parameter(
    op: str, name: str, t: Tensor | None, shape: tuple[int, ...], x: Tensor, autocast: bool
) -> None:
    """Refuse a parameter (None is fine) that does not fit x in shape, device or dtype."""
    if t is None:
        return
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} is a {type(t).__name__}; it has to be a torch.Tensor.")
    if t.shape == shape and t.device == x.device and (t.dtype == x.dtype or autocast):
        return
    if t.shape != shape:
        raise ValueError(
            f"{op}: {name} has shape {tuple(t.shape)}; x of shape {tuple(x.shape)} needs {shape}."
        )
    if t.device != x.device:
        raise ValueError(
            f"{op}: {name} is on {t.device} and x is on {x.device}; move one with .to(device)."
        )
    raise TypeError(
        f"{op}: {name} is {t.dtype} and x is {x.dtype}; nothing is cast silently. Convert one of "
        "them with .to(dtype), or run under torch.autocast."
    )


def check_weights(op: str, fc1: Tensor, fc2: Tensor, x: Tensor, autocast: bool) -> int:
    """Refuse products' weights that do not fit x or one another; returns the hidden width."""
    for name, weight in (("fc1_weight", fc1), ("fc2_weight", fc2)):
        if not isinstance(weight, Tensor):
            raise TypeError(
                f"{op}: {name} is a {type(weight).__name__}; it has to be a torch.Tensor."
            )
    channels, hidden = x.shape[1], fc1.shape[0] if fc1.dim() else 0
    if hidden == 0:
        raise ValueError(
            f"{op}: fc1_weight has shape {tuple(fc1.shape)}; x of shape {tuple(x.shape)} needs "
            f"(hidden, {channels}) with hidden >= 1."
        )
    ones1, ones2 = (1,) * (fc1.dim() - 2), (1,) * (fc2.dim() - 2)
    check_parameter(op, "fc1_weight", fc1, (hidden, channels, *ones1[:2]), x, autocast)
    check_parameter(op, "fc2_weight", fc2, (channels, hidden, *ones2[:2]), x, autocast)
    return hidden


def check_factor(op: str, name: str, factor: Tensor | None, x: Tensor) -> None:
    """Refuse per-image factors that are not (B), constant, and float32 or x's dtype."""
    if factor is None:
        return
    accumulated = isinstance(factor, Tensor) and factor.dtype == accumulate_dtype(x.dtype)
    check_parameter(op, name, factor, (x.shape[0],), x, accumulated)
    if factor.requires_grad:
        raise ValueError(
            f"{op}: {name} requires a gradient, and none is computed for it; pass {name}.detach()."
        )


def check_stats(op: str, stats: Tensor | None, x: Tensor, num_groups: int) -> None:
    """Refuse statistics that cannot be those of x."""
    if stats is None:
        return
    if not isinstance(stats, Tensor):
        raise TypeError(f"{op}: stats is a {type(stats).__name__}; it has to be a torch.Tensor.")
    acc = accumulate_dtype(x.dtype)
    partials = stats.shape[2] if stats.dim() == 4 else 1
    if stats.shape != (x.shape[0], num_groups, partials, 3) or partials == 0:
        raise ValueError(
            f"{op}: stats has shape {tuple(stats.shape)}; x of shape {tuple(x.shape)} needs "
            f"({x.shape[0]}, {num_groups}, P, 3) with P >= 1, as ops return with return_stats=True."
        )
    if stats.dtype != acc or stats.device != x.device:
        raise TypeError(
            f"{op}: stats is {stats.dtype} on {stats.device}; x needs {acc} on {x.device}."
        )


def device_type(x: Tensor) -> str:
    """x.device.type, without the microsecond that it takes on the CPU."""
    return "cpu" if x.is_cpu else x.device.type


def is_autocast(x: Tensor) -> bool:
    """Whether torch.autocast rules the dtypes of operators on x's device."""
    return torch.is_autocast_enabled(device_type(x))


def autocast_norm_dtype(x: Tensor) -> torch.dtype:
    """Eager's dtype of GroupNorm's result under autocast, which rules it on GPUs alone."""
    return torch.float32 if device_type(x) == "cuda" else x.dtype


def promote(branch: torch.dtype, layer_scale: Tensor | None, x: Tensor) -> torch.dtype:
    """Eager's dtype of x + layer_scale · branch."""
    if layer_scale is not None:
        branch = torch.promote_types(branch, layer_scale.dtype)
    return torch.promote_types(branch, x.dtype)


def as_float32(*tensors: Any) -> Any:
    """Each tensor that is there in float32; gradients come back in its own dtype."""
    return tuple(None if t is None else t.float() for t in tensors)


@torch.compiler.assume_constant_result
def cpu_product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the CPU kernels multiply for autocast to `dtype`: that or, if not natively, float32."""
    module: Any = _extension.load()
    return dtype if dtype == torch.bfloat16 and module.cpu_multiplies_bf16() else torch.float32

"""Which implementation runs an op: one table, and the rule that picks from it.

The rule: the op's `backend` argument, else the innermost `use_backend`, else the environment
variable POOLFORMER_BACKEND (read when the package is imported), else "auto", which is the first
backend of `PREFERENCE` that can run the call and is not known to be slower there. A backend that
was asked for by name and cannot run the call is an error that says why.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.compiler import is_exporting
from torch.jit import is_tracing

from . import _extension

OPS = ("pool_mixer", "mlp", "group_norm", "patch_embed")
PREFERENCE = ("cuda", "triton", "cpu", "torch")


class BackendUnavailable(RuntimeError):
    """The backend that was asked for by name cannot run this call."""


@dataclass(frozen=True)
class Call:
    """What a backend has to know of a call to say whether it can run it."""

    op: str
    device: str
    dtype: torch.dtype
    act: str | None = None  # "callable" where it is no name; None where the op has no activation
    grad: bool = False
    autocast: bool = False  # then dtype is x's alone


def _torch(call: Call) -> str | None:
    return None


_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CPU_DTYPES = (*_GPU_DTYPES, torch.float64)


def _kernel_limits(call: Call, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """What keeps a call from any kernel of our own that is there for `dtypes`."""
    if call.op == "patch_embed" and call.device != "cpu":
        return "it leaves convolutions to PyTorch"
    if call.dtype not in dtypes:
        return f"it has no kernel for {call.dtype}"
    if call.act == "callable":
        return "it has no kernel for an activation given as a callable"
    if call.act == "relu2" and call.device != "cpu":
        return "it has no kernel for the activation 'relu2' (PoolFormerV2's)"
    return None


def _cpu(call: Call) -> str | None:
    if call.device != "cpu":
        return f"it runs on CPU tensors, and this one is on {call.device}"
    if _extension.load() is None:
        return _extension.why_not()
    if call.autocast and call.dtype == torch.float64:
        return "under autocast its kernels compute in float32"
    return _kernel_limits(call, _CPU_DTYPES)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton(call: Call) -> str | None:
    if call.device != "cuda":
        return f"it runs on GPUs, and this tensor is on {call.device}"
    if not _has_triton():
        return "Triton is not installed: pip install triton"
    if torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < (8, 0):
            return f"it needs compute capability 8.0, and this GPU has {capability}"
    return _kernel_limits(call, _GPU_DTYPES)


def _cuda(call: Call) -> str | None:
    if call.device != "cuda":
        return f"it runs on NVIDIA GPUs, and this tensor is on {call.device}"
    module = _extension.load()
    if module is None:
        return _extension.why_not()
    if not hasattr(module, "cuda_architecture"):
        why = (_extension.build_info() or {}).get("why", "of an older build")
        return f"the extension was built without CUDA kernels ({why})"
    if torch.cuda.is_available() and not module.cuda_architecture(torch.cuda.current_device()):
        major, minor = torch.cuda.get_device_capability()
        built = ", ".join((_extension.build_info() or {}).get("cuda_archs", ()))
        return (
            f"none of its kernels, built for {built}, runs on this GPU of compute capability "
            f"{major}.{minor}: build again with TORCH_CUDA_ARCH_LIST={major}.{minor}, or update "
            "the driver"
        )
    return _kernel_limits(call, _GPU_DTYPES)


BACKENDS: dict[str, Callable[[Call], str | None]] = {
    "torch": _torch,
    "cpu": _cpu,
    "triton": _triton,
    "cuda": _cuda,
}


def _cpu_slower(call: Call) -> str | None:
    """Where plain PyTorch is known to be as fast as the CPU kernels, or faster."""
    if call.op == "group_norm":
        return "PyTorch's own group_norm is as fast"
    if call.dtype == torch.float64:
        return "float64 is there to check gradients, not for speed"
    product = torch.get_autocast_dtype("cpu") if call.autocast else call.dtype
    if call.op in ("mlp", "patch_embed") and product in (torch.bfloat16, torch.float16):
        module: Any = _extension.load()
        if product == torch.float16 and module.native_fp16():
            return f"this CPU multiplies {product} natively, which the kernel does not use yet"
        if product == torch.bfloat16 and module.amx_bf16():
            return f"this CPU has matrix units for {product}, which the kernel does not use yet"
    return None


def _cuda_slower(call: Call) -> str | None:
    """Where the Triton kernels are expected to be ahead of those in CUDA C++."""
    if call.op != "mlp" or not torch.cuda.is_available() or BACKENDS["triton"](call) is not None:
        return None
    if torch.cuda.get_device_capability()[0] not in (9, 10, 11):
        return None
    return "Triton compiles products for the wider matrix instructions of this GPU"


def explain(call: Call) -> dict[str, str | None]:
    """For each backend in order of preference: None if "auto" would take it, else the reason."""
    reasons = {name: BACKENDS[name](call) for name in PREFERENCE}
    for name, slower in (("cuda", _cuda_slower), ("cpu", _cpu_slower)):
        if reasons[name] is None:
            reasons[name] = slower(call)
    return reasons


class _State(threading.local):
    backend: str | None = None  # of the innermost use_backend of this thread


_state = _State()
_resolved: dict[tuple[object, ...], str] = {}


def check_name(name: str, source: str = "backend") -> str:
    """`name` itself if it is "auto" or a backend; else a ValueError that names its source."""
    if name != "auto" and name not in BACKENDS:
        known = ", ".join(repr(known) for known in ("auto", *BACKENDS))
        raise ValueError(f"{source} is {name!r}; it has to be one of {known}.")
    return name


_default = check_name(os.environ.get("POOLFORMER_BACKEND", "auto"), "POOLFORMER_BACKEND")


def requested(backend: str | None = None) -> str:
    """The name that rules: the argument, the innermost `use_backend`, the environment, "auto".

    While torch.onnx.export runs it is "torch", so that an accelerated model gives a stock graph.
    """
    if (is_exporting() or is_tracing()) and torch.onnx.is_in_onnx_export():  # it takes 4 µs to ask
        return "torch"
    if backend is not None:
        return check_name(backend)
    return _state.backend or _default


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context and thread, run ops with backend `name` unless they are told otherwise.

    A model that torch.compile has compiled keeps the backends that it was compiled with.
    """
    before = _state.backend
    _state.backend = check_name(name)
    try:
        yield
    finally:
        _state.backend = before


@torch.compiler.assume_constant_result
def resolve(
    op: str,
    device: str,
    dtype: torch.dtype,
    act: str | None = None,
    grad: bool = False,
    autocast: bool = False,
    backend: str | None = None,
) -> str:
    """The backend that runs this call.

    Raises:
        BackendUnavailable: the backend asked for by name cannot run it.
    """
    name = requested(backend)
    product = torch.get_autocast_dtype(device) if autocast else dtype
    key = (name, op, device, dtype, act, grad, autocast, product)
    chosen = _resolved.get(key)
    if chosen is None:
        chosen = _resolved[key] = _choose(name, Call(op, device, dtype, act, grad, autocast))
    return chosen


def _choose(name: str, call: Call) -> str:
    if name == "auto":
        return next(name for name, reason in explain(call).items() if reason is None)
    if (reason := BACKENDS[name](call)) is not None:
        raise BackendUnavailable(
            f"{call.op}: backend {name!r} cannot run this call: {reason}. Pass backend='auto' to "
            "take the best one that can; `python -m poolformer_kernels` shows them all."
        )
    return name

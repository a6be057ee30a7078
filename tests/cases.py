"""The shapes, layouts, dtypes and tolerances of the ops' tests, and the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from poolformer_kernels import _extension, reference

BACKENDS = [
    pytest.param("torch"),
    pytest.param(
        "cpu", marks=pytest.mark.skipif(_extension.load() is None, reason=str(_extension.why_not()))
    ),
]
KERNELS = [backend for backend in BACKENDS if backend.values != ("torch",)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["nchw", "channels_last", "sliced", "permuted", "expanded"]


@dataclass(frozen=True)
class Case:
    """An input of an op: shape (B, C, H, W), and how the op is configured."""

    shape: tuple[int, int, int, int]
    num_groups: int = 1
    pool_size: int = 3
    act: str = "gelu"
    affine: bool = True  # whether norm's weight, all biases and the layer scale are there
    drop: bool = False
    hidden: int = 0  # 4 C if 0
    mean: float = 0.0  # of x, in units of its standard deviation

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), self.act, f"p{self.pool_size}g{self.num_groups}"]
        return "-".join(parts + ["drop"] * self.drop + ["plain"] * (not self.affine))


CASES = [
    Case((2, 64, 7, 7), drop=True),
    Case((1, 96, 14, 14)),
    Case((3, 20, 9, 5), num_groups=4, act="silu", hidden=24),
    Case((1, 13, 6, 11), pool_size=5, act="relu", affine=False),
    Case((5, 8, 1, 1), num_groups=2, act="gelu_pytorch_tanh", drop=True, hidden=7),
    Case((2, 6, 3, 4), pool_size=9, mean=30.0),
    Case((1, 64, 31, 17), mean=3.0),
    Case((0, 16, 4, 4)),
]


def layout_of(x: Tensor, layout: str) -> Tensor:
    """A tensor of x's values and shape with the strides that `layout` names."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        batch, channels, height, width = x.shape
        wide = x.new_empty((batch, channels + 3, height + 1, 2 * width))
        view = wide[:, 1 : channels + 1, 1:, ::2]
        return view.copy_(x)
    if layout == "permuted":
        return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    return x.contiguous()


def random_input(case: Case, layout: str, dtype: torch.dtype) -> Tensor:
    """x: random, in `dtype` and `layout`; "expanded" repeats one image without copying it."""
    x = torch.randn(case.shape, dtype=torch.float64) + case.mean
    if layout == "expanded":
        return x[:1].to(dtype).expand(case.shape) if case.shape[0] else x.to(dtype)
    return layout_of(x.to(dtype), layout)


def parameters(op: str, case: Case, dtype: torch.dtype) -> list[Tensor | None]:
    """The op's parameters in order, of the size that hides no error: scales around 1."""

    def vector(size: int, center: float = 0.0) -> Tensor | None:
        return (center + 0.5 * torch.randn(size)).to(dtype) if case.affine else None

    channels = case.shape[1]
    norm = [vector(channels, 1.0), vector(channels)]
    if op == "group_norm":
        return norm
    if op == "pool_mixer":
        return [*norm, vector(channels, 1.0)]
    hidden = case.hidden or 4 * channels
    fc1 = (torch.randn(hidden, channels) / channels**0.5).to(dtype)
    fc2 = (torch.randn(channels, hidden, 1, 1) / hidden**0.5).to(dtype)
    return [*norm, fc1, vector(hidden), fc2, vector(channels), vector(channels, 1.0)]


def options(op: str, case: Case) -> dict[str, Any]:
    """The op's keyword arguments."""
    options: dict[str, Any] = {"num_groups": case.num_groups}
    if op == "pool_mixer":
        options["pool_size"] = case.pool_size
    if op == "mlp":
        options["act"] = case.act
    if case.drop and op != "group_norm":
        options["drop_path"] = torch.linspace(0, 1.5, case.shape[0])
        if op == "mlp":
            options["hidden_drop_path"] = torch.linspace(1.25, 0, case.shape[0])
    return options


def run(
    op: Callable[..., Tensor],
    x: Tensor,
    params: list[Tensor | None],
    dy: Tensor | None = None,
    **options: Any,
) -> list[Tensor]:
    """The op's output and, given dy, its gradients for x and each parameter that is there."""
    if dy is None:
        return [op(x, *params, **options)]
    x = x.detach().requires_grad_()
    params = [None if p is None else p.detach().requires_grad_() for p in params]
    y = op(x, *params, **options)
    return [y.detach(), *torch.autograd.grad(y, [x, *(p for p in params if p is not None)], dy)]


def oracle(
    op: str,
    x: Tensor,
    params: list[Tensor | None],
    dy: Tensor | None = None,
    **options: Any,
) -> list[Tensor]:
    """What `run` gives in float64, on the CPU, contiguous, in plain PyTorch."""

    def exact(t: Any) -> Any:
        return t.detach().cpu().double().contiguous() if isinstance(t, Tensor) else t

    options = {key: exact(value) for key, value in options.items()}
    params = [exact(p) for p in params]
    return run(getattr(reference, op), exact(x), params, exact(dy), **options)


# Roundings, in eps of the dtype, that a result may have beyond a multiple of eager's error: one
# where eager's own error is that of its stored result, a few where both are noise of float32 sums.
ROUNDINGS = {torch.float32: 4.0, torch.bfloat16: 0.5, torch.float16: 0.5}


def assert_as_exact_as_eager(ours: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> None:
    """The error against float64: at most twice eager's in the 2-norm, four times its largest."""
    assert len(ours) == len(eager) == len(exact)
    for index, (a, b, c) in enumerate(zip(ours, eager, exact, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, index
        if a.numel() == 0:
            continue
        rounding = ROUNDINGS[a.dtype] * torch.finfo(a.dtype).eps
        a, b = a.detach().cpu().double(), b.detach().cpu().double()
        assert a.isfinite().all(), f"result {index} is not finite"
        for order, factor in ((2, 2), (torch.inf, 4)):
            norm = [torch.linalg.vector_norm(v, order).item() for v in (a - c, b - c, c)]
            allowed = factor * norm[1] + rounding * norm[2]
            message = f"result {index}, {order}-norm: error {norm[0]:.3e}, allowed {allowed:.3e}"
            assert norm[0] <= allowed, message

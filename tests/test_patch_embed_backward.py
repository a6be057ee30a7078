"""The gradients of patch_embed, of its kernels and through autograd."""

from __future__ import annotations

import math
from typing import Any

import cases
import pytest
import torch
from torch import Tensor
from windows import CPU, DTYPES, LAYOUTS, WINDOWS, Window, tensors

import poolformer_kernels as pk
from poolformer_kernels import reference


def assert_as_exact_as_eager(
    window: Window, x: Tensor, params: list[Tensor | None], dy: Tensor
) -> None:
    """The result and all gradients of the kernels, in the dtype of x."""

    def ours(*args: Tensor, **geometry: Any) -> Tensor:
        return pk.patch_embed(*args, **geometry, backend="cpu")

    result = cases.run(ours, x, params, dy, **window.geometry)
    exact = cases.oracle("patch_embed", x, params, dy, **window.geometry)
    assert all(g.dtype == x.dtype for g in result)
    if x.dtype == torch.float64:
        return torch.testing.assert_close(result, exact, rtol=1e-11, atol=1e-11)
    args = x, params, dy
    if window is WINDOWS["one pixel"]:  # in bfloat16 oneDNN reads memory that no one has set
        args = x.float(), [None if p is None else p.float() for p in params], dy.float()
    eager = cases.run(reference.patch_embed, *args, **window.geometry)
    cases.assert_as_exact_as_eager(result, [g.to(x.dtype) for g in eager], exact)


def arguments(
    window: Window, dtype: torch.dtype, x_format: torch.memory_format, w_format: torch.memory_format
) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """x, weight and bias, and the result's gradient."""
    x, *params = tensors(window, dtype, x_format, w_format)
    dy = torch.randn(reference.patch_embed(x, *params, **window.geometry).shape).to(dtype)
    return x, [*params], dy.contiguous(memory_format=x_format)


@CPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("w_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("x_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_as_exact_as_eager(
    window: Window,
    x_format: torch.memory_format,
    w_format: torch.memory_format,
    dtype: torch.dtype,
    capability: str,
) -> None:
    assert_as_exact_as_eager(window, *arguments(window, dtype, x_format, w_format))


@CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_on_a_machine_of_many_cores(
    window: Window, dtype: torch.dtype, capability: str, many_cores: None
) -> None:
    assert_as_exact_as_eager(window, *arguments(window, dtype, *LAYOUTS))


@CPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", ["stem", "downsample", "dense groups"])
def test_without_a_bias(window: str, dtype: torch.dtype) -> None:
    x, params, dy = arguments(WINDOWS[window], dtype, *LAYOUTS)
    assert_as_exact_as_eager(WINDOWS[window], x, params[:1], dy)


@CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strides", ["sliced", "permuted", "expanded"])
def test_any_strides(strides: str, dtype: torch.dtype) -> None:
    def spread(t: Tensor) -> Tensor:
        if strides == "expanded":
            return t[:, :, :1, :1].expand_as(t)
        return cases.layout_of(t, strides)

    x, (weight, bias), dy = arguments(WINDOWS["downsample"], dtype, *LAYOUTS)
    assert weight is not None
    params = [spread(weight), bias]
    assert_as_exact_as_eager(WINDOWS["downsample"], spread(x), params, spread(dy))


@CPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_nothing_is_left_of_an_earlier_call(
    window: Window, layout: torch.memory_format, dtype: torch.dtype, capability: str
) -> None:
    def ours(*args: Tensor) -> Tensor:
        return pk.patch_embed(*args, **window.geometry, backend="cpu")

    x, *params = tensors(window, dtype, layout, layout)
    dy = torch.randn(reference.patch_embed(x, *params, **window.geometry).shape).to(dtype)
    first, _, second = (
        cases.run(ours, x * factor, [p * factor for p in params], dy * factor)
        for factor in (1, math.nan, 1)
    )
    assert all(map(torch.equal, first, second))
    assert all(t.isfinite().all() for t in second)


@CPU
@pytest.mark.parametrize("window", ["downsample", "dense", "dense groups"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_wanted_gradients(wanted: tuple[int, ...], window: str) -> None:
    geometry = WINDOWS[window].geometry
    args = tensors(WINDOWS[window], torch.float32, *LAYOUTS)
    chosen = [args[i].requires_grad_() for i in wanted]
    y = pk.patch_embed(*args, **geometry, backend="cpu")
    expected = reference.patch_embed(*args, **geometry)
    dy = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, chosen, dy), torch.autograd.grad(expected, chosen, dy)
    )


@CPU
def test_gradcheck_also_of_second_derivatives() -> None:
    window = WINDOWS["oblong"]
    args = [t.requires_grad_() for t in tensors(window, torch.float64, *LAYOUTS)]

    def op(*args: Tensor) -> Tensor:
        return pk.patch_embed(*args, **window.geometry, backend="cpu")

    assert torch.autograd.gradcheck(op, args)
    assert torch.autograd.gradgradcheck(op, args)


@CPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_that_are_differentiated(dtype: torch.dtype) -> None:
    window = WINDOWS["one pixel"]
    args = [t.requires_grad_() for t in tensors(window, dtype, *LAYOUTS)]
    y = pk.patch_embed(*args, **window.geometry, backend="cpu")
    dy = torch.randn_like(y)
    exact = cases.oracle("patch_embed", args[0], args[1:], dy, **window.geometry)[1:]
    for _ in range(10):
        memory = [torch.full((n,), math.nan, dtype=dtype) for n in (1152, 4608, 20000)]
        del memory  # what reads memory that no one has set finds NaN
        ours = torch.autograd.grad(y, args, dy, create_graph=True)
        for a, b in zip(ours, exact, strict=True):
            assert a.dtype == dtype and a.requires_grad
            torch.testing.assert_close(a.double(), b, rtol=0.02, atol=0.02)


@CPU
@pytest.mark.parametrize(
    ("dy", "error", "message"),
    [
        (torch.zeros(1, 6, 4, 5), ValueError, "the output's gradient has shape"),
        (torch.zeros(1, 6, 4, 4).half(), TypeError, "the output's gradient is Half"),
    ],
)
def test_the_backward_refuses_a_gradient_that_does_not_fit(
    dy: Tensor, error: type[Exception], message: str
) -> None:
    args = [torch.zeros(1, 4, 8, 8), torch.zeros(6, 4, 3, 3), [2, 2], [1, 1], [True] * 3, "cpu"]
    with pytest.raises(error, match=message):
        torch.ops.poolformer_kernels.patch_embed_bwd(dy, *args)

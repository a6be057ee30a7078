"""The Triton kernels of mlp against float64: on a GPU, and some in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from subprocess import CompletedProcess

import cases
import pytest
import torch
from cases import CASES, DTYPES, Case
from torch import Tensor

from poolformer_kernels import reference
from poolformer_kernels.ops._common import empty_like_op_output

pytest.importorskip("triton")
from mlp_checks import merged
from triton_mlp import (
    DEVICE,
    INTERPRETED,
    backward,
    forward,
    hidden_of,
    on_device,
    setup,
)

from poolformer_kernels.kernels import mlp as kernels

RUNS = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU")
# Triton's interpreter computes on the bits of bfloat16 values as if they were integers.
QUICK_DTYPES = [d for d in DTYPES if not INTERPRETED or d != torch.bfloat16]
QUICK_CASES = [CASES[i] for i in (0, 2, 3, 4, 7)]
# One group: fused up to 192 channels in 16 bits; two products above. Of three images with drop
# factors the second keeps both branch and hidden.
WIDTHS = [
    Case((2, 1, 3, 2), hidden=5),
    Case((1, 128, 9, 8), hidden=72, act="gelu_pytorch_tanh"),
    Case((3, 192, 3, 5), hidden=40, drop=True),
    Case((3, 200, 5, 5), hidden=72, act="relu", mean=3.0, drop=True),
]
FAR_FROM_ZERO = [  # rounded before the norm, x would lose all of its digits
    Case((3, 32, 6, 5), mean=1000.0, drop=True),
    Case((2, 208, 4, 5), hidden=24, mean=1000.0, num_groups=2),
]
# Fused, two products, more groups; a compilation each.
MIXED = [
    (case, layout, dtype)
    for case in (Case((3, 64, 7, 5), drop=True), WIDTHS[3])
    for layout in ("nchw", "channels_last")
    for dtype in DTYPES[1:]
] + [
    (case, *how)
    for case in (CASES[2], WIDTHS[2], *FAR_FROM_ZERO)
    for how in (("nchw", torch.bfloat16), ("channels_last", torch.float16))
]


def check(case: Case, layout: str, dtype: torch.dtype, autocast: torch.dtype | None = None) -> None:
    """Everything that forward and backward return; with `autocast`, products in that dtype."""
    x, params, options, dz = setup(case, dtype, autocast)
    if layout == "expanded" and case.shape[0]:
        x, dz = (t[:1].expand(case.shape) for t in (x, dz))
    given = list(params)
    if autocast is not None:  # eager casts the weights and the biases; ours get one bias as it is
        for index in (2, 4, 5 if layout == "nchw" else 3):
            given[index] = None if params[index] is None else params[index].to(autocast)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        eager = cases.run(reference.mlp, x, params, dz, **options)
        eager.append(hidden_of(x, params, options))
    exact = cases.oracle("mlp", x, params, dz, **options)
    doubled = [None if p is None else p.double() for p in params]
    exact.append(hidden_of(x.double(), doubled, options))

    x_there, dz_there = on_device(x, layout), on_device(dz, layout)
    strides, groups = empty_like_op_output(x_there).stride(), case.num_groups
    partials = kernels.stats_partials(x.shape, groups, strides[1] == 1, autocast or dtype, dtype)
    bits = []
    # An operator of the interpreter is slow: there, each layout stands for one of the two.
    for save in (False, True) if not INTERPRETED else (layout == "nchw",):
        z, saved, stats, hidden = forward(x_there, given, options, None, True, save)
        kept = hidden if save else None
        ours = [z, *backward(dz_there, x_there, saved, kept, given, options)]
        assert z.stride() == ours[1].stride() == strides
        assert stats.shape[2] == partials and hidden.dtype == (autocast or dtype)
        ours = [t.cpu().to(e.dtype) for t, e in zip(ours, eager[:-1], strict=True)]
        ours.append(hidden.cpu() if save else eager[-1])
        cases.assert_as_exact_as_eager(ours, eager, exact)
        assert hidden.is_contiguous() and (save or hidden.shape == (0,))
        bits.append(z)
        if case.shape[0]:
            of_result = reference.statistics(z.cpu().double(), groups)[:, :, 0]
            torch.testing.assert_close(merged(stats), of_result, rtol=1e-5, atol=1e-5)
    assert torch.equal(bits[0], bits[-1])


@pytest.mark.skipif(INTERPRETED, reason="this is what it starts")
def test_in_the_interpreter(run_python: Callable[..., CompletedProcess[str]]) -> None:
    """The tests of this file that need no GPU, in a process of their own."""
    options = ("-q", "-p", "no:cacheprovider", "-m", "not gpu", "-W", "ignore")
    result = run_python("-m", "pytest", *options, __file__, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-3000:]


@RUNS
@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", QUICK_CASES, ids=str)
def test_forward_and_gradients(case: Case, layout: str, dtype: torch.dtype) -> None:
    check(case, layout, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[6], *WIDTHS], ids=str)
def test_forward_and_gradients_on_a_gpu(case: Case, layout: str, dtype: torch.dtype) -> None:
    check(case, layout, dtype)


@RUNS
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", QUICK_DTYPES[1:], ids=str)
def test_products_in_another_dtype(dtype: torch.dtype, layout: str) -> None:
    check(Case((3, 16, 5, 3), drop=True, hidden=40), layout, torch.float32, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "layout", "dtype"), MIXED, ids=str)
def test_products_in_another_dtype_on_a_gpu(case: Case, layout: str, dtype: torch.dtype) -> None:
    check(case, layout, torch.float32, dtype)


@RUNS
@pytest.mark.parametrize("layout", ["sliced", "permuted", "expanded"])
def test_layouts_that_are_copied(layout: str) -> None:
    check(CASES[2], layout, torch.float32)


@RUNS
def test_given_statistics_are_used_and_merged() -> None:
    for groups in (1, 2):
        x, params, options, _ = setup(Case((2, 12, 6, 8), num_groups=groups, mean=5.0), DTYPES[0])
        whole, saved, *_ = forward(on_device(x), params, options)
        halves = [reference.statistics(half, groups) for half in (x[:, :, :2], x[:, :, 2:])]
        stats = torch.cat(halves, 2)
        parts, saved_too, *_ = forward(on_device(x), params, options, on_device(stats))
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(saved_too, saved, rtol=1e-5, atol=1e-5)
        exact = merged(stats)
        torch.testing.assert_close(saved[..., 0].cpu(), exact[..., 1].float(), rtol=1e-5, atol=1e-6)
        wrong = stats * torch.tensor([1.0, 1.0, 4.0])
        z, *_ = forward(on_device(x), params, options, on_device(wrong))
        assert not torch.allclose(z, whole, atol=1e-2)


@RUNS
@pytest.mark.parametrize("shape", [(2, 16, 6, 7), (1, 200, 3, 3)], ids=str)
def test_same_bits_on_every_run(shape: tuple[int, int, int, int]) -> None:
    x, params, options, dz = setup(Case(shape, hidden=40), torch.float16)

    def results() -> list[Tensor]:
        first = forward(on_device(x), params, options, None, True, True)
        grads = backward(on_device(dz), on_device(x), first[1], first[3], params, options)
        return [
            *first,
            *grads,
            *backward(on_device(dz), on_device(x), first[1], None, params, options),
        ]

    for a, b in zip(results(), results(), strict=True):
        assert torch.equal(a, b)


def test_what_no_kernel_takes_is_refused_before_a_launch() -> None:
    x, params, options, _ = setup(CASES[2], torch.float64)
    with pytest.raises(TypeError, match=r"mlp: x is torch.float64; .* take .* backend='torch'"):
        forward(x, params, options)
    x = torch.empty((1, 2**16, 128, 128), dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match=r"mlp: one image of x has 1073741824 elements"):
        forward(x, params, options)


@pytest.mark.gpu
def test_float32_products_round_only_where_pytorch_may() -> None:
    x, params, options, _ = setup(Case((1, 32, 4, 4)), torch.float32)
    exact = cases.oracle("mlp", x, params, **options)[0]
    errors = []
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            z = forward(on_device(x), params, options)[0]
            errors.append((z.cpu().double() - exact).norm() / exact.norm())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert errors[0] < 3e-7 and 1e-5 < errors[1] < 2e-3


@RUNS
def test_a_constant_image() -> None:
    """Pixels that fill up a tile are not in its image: (0 − mean) / std of them is infinite."""
    x, params, options, dz = setup(Case((1, 16, 3, 3)), torch.float16)
    x = torch.full_like(x, 300.0)
    z, saved, _, hidden = forward(on_device(x), params, options, save_hidden=True)
    for kept in (hidden, None):
        grads = backward(on_device(dz), on_device(x), saved, kept, params, options)
        assert all(t.isfinite().all() for t in (z, *grads))

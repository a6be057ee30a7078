"""The Triton kernels of mlp against float64: on a GPU, and some in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from subprocess import CompletedProcess

import cases
import pytest
import torch
from cases import CASES, DTYPES, Case

pytest.importorskip("triton")
from mlp_checks import FAR_FROM_ZERO, setup
from triton_mlp import DEVICE, INTERPRETED, MLP

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
    # An operator of the interpreter is slow: there, each layout stands for one of the two.
    keeps = (layout == "nchw",) if INTERPRETED else (False, True)
    MLP.assert_right(case, layout, dtype, autocast, keeps)


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
@pytest.mark.parametrize("groups", [1, 2])
def test_given_statistics_are_used_and_merged(groups: int) -> None:
    MLP.assert_given_statistics(Case((2, 12, 6, 8), num_groups=groups, mean=5.0), torch.float32)


@RUNS
@pytest.mark.parametrize("shape", [(2, 16, 6, 7), (1, 200, 3, 3)], ids=str)
def test_same_bits_on_every_run(shape: tuple[int, int, int, int]) -> None:
    MLP.assert_same_bits(Case(shape, hidden=40))


def test_what_no_kernel_takes_is_refused_before_a_launch() -> None:
    x, params, options, _ = setup(CASES[2], torch.float64)
    with pytest.raises(TypeError, match=r"mlp: x is torch.float64; .* take .* backend='torch'"):
        MLP.forward(x, params, options)
    x = torch.empty((1, 2**16, 128, 128), dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match=r"mlp: one image of x has 1073741824 elements"):
        MLP.forward(x, params, options)


@pytest.mark.gpu
def test_float32_products_round_only_where_pytorch_may() -> None:
    x, params, options, _ = setup(Case((1, 32, 4, 4)), torch.float32)
    exact = cases.oracle("mlp", x, params, **options)[0]
    errors = []
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            z = MLP.forward(MLP.there(x), params, options)[0]
            errors.append((z.cpu().double() - exact).norm() / exact.norm())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert errors[0] < 3e-7 and 1e-5 < errors[1] < 2e-3


@RUNS
def test_a_constant_image() -> None:
    MLP.assert_constant_image(Case((1, 16, 3, 3)))

"""The Triton kernels of mlp against float64: on a GPU, and some in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from subprocess import CompletedProcess
from typing import Any
from unittest import mock

import cases
import pytest
import torch
from cases import CASES, DTYPES, Case
from torch import Tensor

from poolformer_kernels import reference
from poolformer_kernels.ops._common import empty_like_op_output

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

from poolformer_kernels.kernels import mlp as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported
DEVICE = "cpu" if INTERPRETED else "cuda"
RUNS = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU")
# Triton's interpreter computes on the bits of bfloat16 values as if they were integers.
QUICK_DTYPES = [d for d in DTYPES if not INTERPRETED or d != torch.bfloat16]
QUICK_CASES = [CASES[i] for i in (0, 2, 3, 4, 7)]
WIDTHS = [  # one group: fused up to 192 channels in 16 bits; two products above
    Case((2, 1, 3, 2), hidden=5),
    Case((1, 128, 9, 8), hidden=72, act="gelu_pytorch_tanh"),
    Case((2, 192, 3, 5), hidden=40, drop=True),
    Case((2, 200, 5, 5), hidden=72, act="relu", mean=3.0, drop=True),
]
EPS = 1e-5


def setup(
    case: Case, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor | None], dict[str, Any], Tensor]:
    x = cases.random_input(case, "nchw", dtype)
    params, options = cases.parameters("mlp", case, dtype), cases.options("mlp", case)
    return x, params, options, torch.randn(case.shape).to(dtype)


def on_device(t: Tensor | None, layout: str = "nchw") -> Tensor | None:
    if t is None:
        return None
    if layout == "expanded":
        return t[:1].to(DEVICE).expand(t.shape)
    return cases.layout_of(t.to(DEVICE), layout)


def forward(
    x: Tensor,
    params: list[Tensor | None],
    options: dict[str, Any],
    stats: Tensor | None = None,
    return_stats: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    factors = (options.get("drop_path"), options.get("hidden_drop_path"))
    return kernels.forward(
        x,
        stats,
        *(None if p is None else p.to(x.device) for p in (*params, *factors)),
        options["act"],
        options["num_groups"],
        EPS,
        return_stats,
    )


def merged(stats: Tensor) -> Tensor:
    """(count, mean, M2) of partial ones: (B, G, P, 3) to (B, G, 3), in float64."""
    count, mean, m2 = stats.cpu().double().unbind(-1)
    total = count.sum(-1)
    center = (count * mean).sum(-1) / total
    m2 = (m2 + count * (mean - center[..., None]) ** 2).sum(-1)
    return torch.stack([total, center, m2], -1)


def backward(
    dz: Tensor,
    x: Tensor,
    saved: Tensor,
    params: list[Tensor | None],
    options: dict[str, Any],
) -> list[Tensor]:
    """dx, and the gradients of the parameters that are there."""
    on_it = [None if p is None else p.to(DEVICE) for p in params]
    factors = [on_device(options.get(name)) for name in ("drop_path", "hidden_drop_path")]
    dx, *grads = kernels.backward(dz, x, saved, *on_it, *factors, options["act"])
    return [dx, *(g for g, p in zip(grads, params, strict=True) if p is not None)]


def check(case: Case, layout: str, dtype: torch.dtype) -> None:
    x, params, options, dz = setup(case, dtype)
    if layout == "expanded" and case.shape[0]:
        x, dz = (t[:1].expand(case.shape) for t in (x, dz))
    x_there = on_device(x, layout)
    z, saved, stats = forward(x_there, params, options, return_stats=True)
    ours = [z, *backward(on_device(dz, layout), x_there, saved, params, options)]
    eager = cases.run(reference.mlp, x, params, dz, **options)
    exact = cases.oracle("mlp", x, params, dz, **options)
    cases.assert_as_exact_as_eager([t.cpu() for t in ours], eager, exact)

    groups, channels_last = case.num_groups, z.stride(1) == 1
    assert z.stride() == ours[1].stride() == empty_like_op_output(x_there).stride()
    assert stats.shape[2] == kernels.stats_partials(x.shape, groups, channels_last, dtype)
    if case.shape[0]:
        of_result = reference.statistics(z.cpu().double(), groups)[:, :, 0]
        torch.testing.assert_close(merged(stats), of_result, rtol=1e-5, atol=1e-5)


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
@pytest.mark.parametrize("layout", ["sliced", "permuted", "expanded"])
def test_layouts_that_are_copied(layout: str) -> None:
    check(CASES[2], layout, torch.float32)


@RUNS
def test_given_statistics_are_used_and_merged() -> None:
    for groups in (1, 2):
        x, params, options, _ = setup(Case((2, 12, 6, 8), num_groups=groups, mean=5.0), DTYPES[0])
        whole, saved, _ = forward(on_device(x), params, options)
        halves = [reference.statistics(half, groups) for half in (x[:, :, :2], x[:, :, 2:])]
        stats = torch.cat(halves, 2)
        parts, saved_too, _ = forward(on_device(x), params, options, on_device(stats))
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(saved_too, saved, rtol=1e-5, atol=1e-5)
        exact = merged(stats)
        torch.testing.assert_close(saved[..., 0].cpu(), exact[..., 1].float(), rtol=1e-5, atol=1e-6)
        wrong = stats * torch.tensor([1.0, 1.0, 4.0])
        z, _, _ = forward(on_device(x), params, options, on_device(wrong))
        assert not torch.allclose(z, whole, atol=1e-2)


@RUNS
@pytest.mark.parametrize("shape", [(2, 16, 6, 7), (1, 200, 3, 3)], ids=str)
def test_same_bits_on_every_run(shape: tuple[int, int, int, int]) -> None:
    x, params, options, dz = setup(Case(shape, hidden=40), torch.float16)

    def results() -> list[Tensor]:
        z, saved, stats = forward(on_device(x), params, options, return_stats=True)
        grads = backward(on_device(dz), on_device(x), saved, params, options)
        return [z, saved, stats, *grads]

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


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "passes", "launches"),
    [((1, 64, 32, 16), 2.2, 1), ((1, 256, 16, 8), 11.3, 2)],
    ids=str,
)
def test_bytes_of_a_forward(shape: tuple[int, int, int, int], passes: float, launches: int) -> None:
    """Distinct bytes that each launch loads and stores, but for parameters, in passes over x."""
    simgpu = pytest.importorskip("simgpu", reason="only the simulated GPU counts bytes")
    x, params, options, _ = setup(Case(shape), torch.bfloat16)
    x = on_device(x, "channels_last")
    stats = on_device(reference.statistics(x.cpu(), 1))
    params = [on_device(p) for p in params]
    counts, run = [], JITFunction.run

    def counted(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        run(self, *args, **kwargs)
        counts.append(simgpu.last_launch())

    with mock.patch.object(JITFunction, "run", counted):
        forward(x, params, options, stats, return_stats=True)
    moved = sum(c["unique_load_bytes"] + c["unique_store_bytes"] for c in counts)
    moved -= sum(p.numel() * p.element_size() for p in params)
    assert len(counts) == launches
    assert moved <= passes * x.numel() * x.element_size(), moved / x.numel() / x.element_size()

"""Every op × backend × dtype × layout, forward and every gradient, against float64."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from cases import BACKENDS, CASES, DTYPES, KERNELS, LAYOUTS, Case
from torch import Tensor

import poolformer_kernels as pk
from poolformer_kernels import reference

OPS = ["pool_mixer", "mlp", "group_norm"]


def setup(
    op: str, case: Case, layout: str, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor | None], dict[str, Any]]:
    x = cases.random_input(case, layout, dtype)
    return x, cases.parameters(op, case, dtype), cases.options(op, case)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_forward_and_gradients(
    op: str, case: Case, layout: str, dtype: torch.dtype, backend: str
) -> None:
    x, params, options = setup(op, case, layout, dtype)
    dy = cases.layout_of(torch.randn(case.shape).to(dtype), layout)
    ours = cases.run(getattr(pk, op), x, params, dy, backend=backend, **options)
    eager = cases.run(getattr(reference, op), x, params, dy, **options)
    exact = cases.oracle(op, x, params, dy, **options)
    cases.assert_as_exact_as_eager(ours, eager, exact)
    no_grad = cases.run(getattr(pk, op), x, params, backend=backend, **options)[0]
    assert torch.equal(no_grad, ours[0]), "the forward depends on whether gradients are wanted"


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", KERNELS)
def test_autocast_follows_eager(
    backend: str, op: str, dtype: torch.dtype, x_dtype: torch.dtype
) -> None:
    """Parameters in float32, x as a block before or a convolution under autocast returns it."""
    case = Case((2, 24, 7, 5), drop=True, hidden=40, mean=10.0)
    x = cases.random_input(case, "channels_last", x_dtype)
    params, options = cases.parameters(op, case, torch.float32), cases.options(op, case)
    if x_dtype != torch.float32 and op != "group_norm":
        params[-1] = None  # a layer scale makes every result float32
    dy = torch.randn(case.shape)
    with torch.autocast("cpu", dtype):
        ours, eager = (
            cases.run(getattr(pk, op), x, params, dy, backend=name, **options)
            for name in (backend, "torch")
        )
    exact = cases.oracle(op, x, params, dy, **options)
    cases.assert_as_exact_as_eager(ours, eager, exact)
    assert [t.dtype for t in ours] == [t.dtype for t in eager]


@pytest.mark.parametrize("op", ["pool_mixer", "mlp"])
@pytest.mark.parametrize("backend", KERNELS)
def test_under_autocast_a_layer_scale_makes_the_result_float32(backend: str, op: str) -> None:
    """Also of the bfloat16 that the convolution before a stage returns."""
    x, params, options = setup(op, Case((2, 8, 7, 5)), "nchw", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for name in (backend, "torch"):
            result = getattr(pk, op)(x.bfloat16(), *params, backend=name, **options)
            assert result.dtype == torch.float32


@pytest.mark.parametrize("backend", KERNELS)
def test_long_sums_have_at_most_twice_the_error_of_eager(backend: str) -> None:
    x, params, options = setup("mlp", Case((8, 320, 14, 14)), "nchw", torch.float32)
    exact = cases.oracle("mlp", x, params, **options)[0]
    ours = cases.run(pk.mlp, x, params, backend=backend, **options)[0]
    eager = cases.run(reference.mlp, x, params, **options)[0]
    assert (ours - exact).norm() <= 2 * (eager - exact).norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("op", OPS)
def test_layout_of_results(op: str, layout: str, backend: str) -> None:
    x, params, options = setup(op, CASES[1], layout, torch.float32)
    x.requires_grad_()
    y = getattr(pk, op)(x, *params, backend=backend, **options)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert y.stride() == x.stride()
    if backend != "torch":  # eager's own gradients have the layout that autograd happens to give
        assert dx.stride() == x.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op: str, layout: str, backend: str) -> None:
    case = Case((2, 4, 4, 3), num_groups=2, drop=True, hidden=6)
    x, params, options = setup(op, case, layout, torch.float64)
    options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    inputs = [t.requires_grad_() for t in (x, *params) if t is not None]
    assert torch.autograd.gradcheck(
        lambda *args: getattr(pk, op)(*args, backend=backend, **options), inputs
    )


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("op", OPS)
def test_a_second_derivative_is_an_error_that_names_the_backend_that_has_it(
    op: str, backend: str
) -> None:
    x, params, options = setup(op, CASES[1], "nchw", torch.float32)
    x.requires_grad_()
    y = getattr(pk, op)(x, *params, backend=backend, **options)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    with pytest.raises(RuntimeError, match=rf"{op}: .* with backend \"torch\""):
        torch.autograd.grad(dx.square().sum(), x)
    y = getattr(pk, op)(x, *params, backend="torch", **options)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    torch.autograd.grad(dx.square().sum(), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dbeta_of_pool_mixer_is_zeros(backend: str) -> None:
    x, params, options = setup("pool_mixer", CASES[0], "nchw", torch.float32)
    _, _, _, dbeta, _ = cases.run(
        pk.pool_mixer, x, params, torch.randn_like(x), backend=backend, **options
    )
    assert dbeta.abs().max() <= (1e-4 if backend == "torch" else 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("op", ["pool_mixer", "mlp"])
def test_returned_statistics_are_those_of_the_result(op: str, layout: str, backend: str) -> None:
    for case in (CASES[0], CASES[2], Case((2, 8, 12, 10), mean=100.0)):
        for dtype in DTYPES:
            x, params, options = setup(op, case, layout, dtype)
            y, stats = getattr(pk, op)(x, *params, return_stats=True, backend=backend, **options)
            exact = reference.statistics(y.double(), case.num_groups)
            assert stats.dtype == torch.float32 and stats.shape[:2] == exact.shape[:2]
            count, mean, m2 = merged(stats.double())
            assert torch.equal(count, exact[:, :, 0, 0])
            torch.testing.assert_close(mean, exact[:, :, 0, 1], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(m2, exact[:, :, 0, 2], rtol=1e-5, atol=1e-6)


def merged(stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, M2) of partial ones: (B, G, P, 3) to three of (B, G)."""
    count, mean, m2 = stats.unbind(-1)
    total = count.sum(-1)
    center = (count * mean).sum(-1) / total
    return total, center, (m2 + count * (mean - center[..., None]) ** 2).sum(-1)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("op", OPS)
def test_given_statistics_are_used_and_merged(op: str, backend: str) -> None:
    case = Case((2, 12, 6, 8), num_groups=2, mean=5.0)
    x, params, options = setup(op, case, "channels_last", torch.float32)
    options["backend"] = backend
    whole = getattr(pk, op)(x, *params, **options)
    halves = [reference.statistics(half, 2) for half in (x[:, :, :2], x[:, :, 2:])]
    parts = getattr(pk, op)(x, *params, stats=torch.cat(halves, 2), **options)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    wrong = torch.cat(halves, 2) * torch.tensor([1.0, 1.0, 4.0])
    assert not torch.allclose(getattr(pk, op)(x, *params, stats=wrong, **options), whole, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_same_bits_on_every_run_and_for_any_number_of_threads(op: str, backend: str) -> None:
    x, params, options = setup(op, CASES[6], "nchw", torch.float32)
    dy = torch.randn_like(x)
    results = []
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        if backend == "torch" and threads == 1:
            continue  # eager promises no more than the same bits for the same number of threads
        results.append(cases.run(getattr(pk, op), x, params, dy, backend=backend, **options))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_the_reference_is_what_the_modules_of_eager_models_compute() -> None:
    x, params, _ = setup("mlp", CASES[0], "nchw", torch.float64)
    gamma, beta, w1, b1, w2, b2, scale = params
    norm = torch.nn.GroupNorm(1, 64).double()
    pool = torch.nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    fc1, fc2 = torch.nn.Conv2d(64, 256, 1).double(), torch.nn.Conv2d(256, 64, 1).double()
    values = zip((norm.weight, norm.bias, fc1.bias, fc2.bias), (gamma, beta, b1, b2), strict=True)
    with torch.no_grad():
        for parameter, value in values:
            parameter.copy_(value)
        fc1.weight.copy_(w1[:, :, None, None])
        fc2.weight.copy_(w2)
        mixed = x + scale[:, None, None] * (pool(norm(x)) - norm(x))
        z = x + scale[:, None, None] * fc2(torch.nn.GELU()(fc1(norm(x))))
    torch.testing.assert_close(reference.pool_mixer(x, gamma, beta, scale), mixed)
    torch.testing.assert_close(reference.mlp(x, *params), z)


def test_a_callable_activation_runs_on_the_torch_backend() -> None:
    x, params, options = setup("mlp", CASES[0], "nchw", torch.float32)
    ours = pk.mlp(x, *params, **{**options, "act": torch.nn.functional.gelu})
    assert torch.equal(ours, pk.mlp(x, *params, backend="torch", **options))
    assert torch.equal(
        pk.mlp(x, *params, **{**options, "act": "gelu_new"}, backend="torch"),
        pk.mlp(x, *params, **{**options, "act": "gelu_pytorch_tanh"}, backend="torch"),
    )

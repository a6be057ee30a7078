"""The backwards of the C++ kernels on every instruction set this machine runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import Case
from torch import Tensor, nn

import poolformer_kernels as pk
from benchmarks.saved_bytes import saved_storages
from poolformer_kernels import _extension, reference

C = _extension.load()
if C is None:
    pytest.skip(str(_extension.why_not()), allow_module_level=True)

OPS = ["pool_mixer", "mlp", "group_norm"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = ["nchw", "channels_last"]
CASES = [  # beyond those of test_ops: parts of pixels and of the hidden, tails of every vector
    Case((3, 64, 40, 56), hidden=200, drop=True),
    Case((3, 160, 7, 7), drop=True, mean=3.0, hidden=330),
    Case((1, 192, 14, 15), num_groups=3, act="silu", hidden=300),
    Case((2, 15, 33, 19), num_groups=5, pool_size=7, act="gelu_pytorch_tanh"),
    Case((7, 33, 1, 1), hidden=3, drop=True),
    Case((2, 5, 1, 40), pool_size=1001, act="relu"),
    Case((1, 512, 7, 7), hidden=900),
    Case((1, 3, 130, 70), pool_size=5, affine=False),
    Case((1, 37, 6, 2), pool_size=5),  # five rows of three columns
]


@cache
def arguments(
    op: str, case: Case, layout: str, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor | None], Tensor, dict[str, Any]]:
    """x, parameters, the output's gradient and options."""
    options = cases.options(op, case)
    if dtype == torch.float64:
        options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    x, params = cases.random_input(case, layout, dtype), cases.parameters(op, case, dtype)
    return x, params, cases.layout_of(torch.randn(case.shape).to(dtype), layout), options


@cache
def expected(
    op: str, case: Case, layout: str, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients in float64, and eager's."""
    x, params, dy, options = arguments(op, case, layout, dtype)
    exact = cases.oracle(op, x, params, dy, **options)
    if dtype == torch.float64:
        return exact, exact
    return exact, cases.run(getattr(reference, op), x, params, dy, **options)


def gradients(op: str, case: Case, layout: str, dtype: torch.dtype, **more: Any) -> list[Tensor]:
    """Output and gradients of the kernels."""
    x, params, dy, options = arguments(op, case, layout, dtype)
    return cases.run(getattr(pk, op), x, params, dy, backend="cpu", **options, **more)


def assert_right(ours: list[Tensor], op: str, case: Case, layout: str, dtype: torch.dtype) -> None:
    exact, eager = expected(op, case, layout, dtype)
    if dtype == torch.float64:
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    else:
        cases.assert_as_exact_as_eager(ours, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_as_exact_as_eager(
    op: str, case: Case, layout: str, dtype: torch.dtype, capability: str
) -> None:
    assert_right(gradients(op, case, layout, dtype), op, case, layout, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_nothing_is_left_of_an_earlier_call(
    op: str, case: Case, layout: str, dtype: torch.dtype, capability: str
) -> None:
    x, params, dy, options = arguments(op, case, layout, dtype)
    nan = [None if p is None else p * math.nan for p in params]
    cases.run(getattr(pk, op), x * math.nan, nan, dy * math.nan, backend="cpu", **options)
    assert_right(gradients(op, case, layout, dtype), op, case, layout, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hidden_of_one_channel(layout: str, dtype: torch.dtype, capability: str) -> None:
    case = Case((7, 33, 1, 1), hidden=1, drop=True)
    draws = []
    for _ in range(16):  # the error of a gradient that is one number may be small by chance
        x, params, dy, options = arguments.__wrapped__("mlp", case, layout, dtype)
        exact = cases.oracle("mlp", x, params, dy, **options)
        eager = cases.run(reference.mlp, x, params, dy, **options)
        draws.append((cases.run(pk.mlp, x, params, dy, backend="cpu", **options), eager, exact))
    ours, eager, exact = (
        [torch.stack(result) for result in zip(*results, strict=True)]
        for results in zip(*draws, strict=True)
    )
    if dtype == torch.float64:
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11)
    else:
        cases.assert_as_exact_as_eager(ours, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_eager_where_the_hidden_is_kept(
    case: Case, layout: str, dtype: torch.dtype, capability: str
) -> None:
    ours = gradients("mlp", case, layout, dtype, save_hidden=True)
    assert_right(ours, "mlp", case, layout, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [*CASES[:5], Case((0, 8, 5, 5))], ids=str)
def test_the_kept_hidden_is_what_the_backward_reads(
    case: Case, layout: str, capability: str
) -> None:
    x, params, dz, options = arguments("mlp", case, layout, torch.float32)
    factors = (options.get("drop_path"), options.get("hidden_drop_path"))
    settings = (case.num_groups, 1e-5, False, True, "cpu")
    _, saved, _, hidden = torch.ops.poolformer_kernels.mlp_fwd(
        x, None, *params, *factors, case.act, *settings
    )
    gamma, beta, fc1, fc1_bias = (None if p is None else p.double() for p in params[:4])
    normed = torch.group_norm(x.double(), case.num_groups, gamma, beta)
    exact = F.conv2d(normed, fc1[:, :, None, None], fc1_bias).permute(0, 2, 3, 1)
    assert hidden.is_contiguous()
    torch.testing.assert_close(hidden.double(), exact, rtol=1e-4, atol=1e-4)
    rest = (*params, *factors, case.act, "cpu")
    once, twice = (
        torch.ops.poolformer_kernels.mlp_bwd(dz, x, saved, kept, *rest)
        for kept in (hidden, 2 * hidden)
    )
    assert case.shape[0] == 0 or not torch.allclose(once[3], twice[3], rtol=0.01)


@pytest.mark.parametrize(
    ("channels", "autocast", "kept"),
    [(64, False, False), (256, False, True), (192, True, False), (256, True, True)],
)
def test_where_the_hidden_is_kept_unasked(
    channels: int, autocast: bool, kept: bool, capability: str
) -> None:
    kept &= not autocast or C.cpu_multiplies_bf16()
    x = torch.randn(1, channels, 3, 3, requires_grad=True)
    parameters = cases.parameters("mlp", Case(tuple(x.shape)), torch.float32)
    with torch.autocast("cpu", enabled=autocast), saved_storages(nn.Module()) as saved:
        pk.mlp(x, *parameters, backend="cpu")
    sizes = {storage.nbytes() for storage in saved.values()}
    assert bool(sizes & {x.numel() * 4 * itemsize for itemsize in (2, 4)}) == kept


@pytest.mark.parametrize("autocast", [False, True])
def test_training_keeps_less_than_a_third_of_what_eager_does(autocast: bool) -> None:
    sizes = []
    for backend in ("torch", "cpu"):
        model = pk.PoolFormerForImageClassification(pk.PoolFormerConfig.from_variant("s12"))
        with (
            pk.use_backend(backend),
            saved_storages(model) as saved,
            torch.autocast("cpu", enabled=autocast),
        ):
            model.train()(torch.randn(8, 3, 128, 128))
        sizes.append(sum(storage.nbytes() for storage in saved.values()))
    assert 0 < sizes[1] < sizes[0] / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[2], CASES[6]], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_same_bits_on_any_number_of_threads(
    op: str,
    case: Case,
    layout: str,
    dtype: torch.dtype,
    capability: str,
    threads: Callable[[int], None],
) -> None:
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(gradients(op, case, layout, dtype))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_machine_of_many_cores(
    case: Case, dtype: torch.dtype, capability: str, many_cores: None
) -> None:
    assert_right(gradients("mlp", case, "nchw", dtype), "mlp", case, "nchw", dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", ["sliced", "permuted", "expanded", "other"])
@pytest.mark.parametrize("op", OPS)
def test_any_strides_of_the_gradient_and_the_parameters(op: str, strides: str, layout: str) -> None:
    x, params, dy, options = arguments(op, CASES[3], layout, torch.float32)
    if strides == "other":
        given = cases.layout_of(dy, LAYOUTS[layout == LAYOUTS[0]])
    elif strides == "expanded":
        given = dy[:1, :, :1, :1].expand(dy.shape)
    else:
        given = cases.layout_of(dy, strides)
    spread = [None if p is None else p.repeat_interleave(2, dim=0)[::2] for p in params]
    ours = cases.run(getattr(pk, op), x, spread, given, backend="cpu", **options)
    dense = cases.run(
        getattr(pk, op), x, params, cases.layout_of(given, layout), backend="cpu", **options
    )
    assert all(map(torch.equal, ours, dense))


@pytest.mark.parametrize("op", OPS)
def test_an_empty_batch_has_gradients_of_zero(op: str, capability: str) -> None:
    case = Case((0, 8, 5, 5))
    _, dx, *grads = gradients(op, case, "nchw", torch.float32)
    assert dx.shape == case.shape and grads
    assert not any(g.any() for g in grads)


def slopes(act: str, values: Tensor) -> Tensor:
    """act'(values), through an MLP: fc1 is zero with bias `values`, fc2 the identity."""
    out = []
    for part in values.split(64):
        size = len(part)
        x, weight, eye = torch.zeros(1, size, 1, 1), torch.zeros(size, size), torch.eye(size)
        bias = part.clone().requires_grad_()
        z = pk.mlp(x, None, None, weight, bias, eye, None, act=act, backend="cpu")
        out += torch.autograd.grad(z, bias, torch.ones_like(z))
    return torch.cat(out)


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "relu", "silu"])
def test_slopes_of_activations(act: str, capability: str) -> None:
    grid = torch.cat([torch.linspace(-10, 10, 4001), torch.tensor([-1e-30, 1e-40, 12.0, 1e30])])
    v = grid.double().requires_grad_()
    (exact,) = torch.autograd.grad(reference.ACTIVATIONS[act](v).sum(), v)
    error = (slopes(act, grid).double() - exact).abs()
    assert error.max() <= 1e-6
    assert slopes(act, torch.tensor([float("nan")])).isnan() or act == "relu"
    if act == "gelu":
        ends = torch.tensor([-float("inf"), -20.0, 20.0, float("inf")])
        assert slopes(act, ends).tolist() == [0, 0, 1, 1]


def direct(op: str, **changes: Any) -> Any:
    """A correct call of the dispatcher's backward, past the checks in Python, with `changes`."""
    values: dict[str, Any] = {"dy": torch.randn(2, 6, 4, 5), "x": torch.randn(2, 6, 4, 5)}
    values |= {"saved": torch.ones(2, 3, 2)}
    if op == "mlp":
        values |= {"hidden": None, "norm_weight": None, "norm_bias": None}
        values |= {"fc1_weight": torch.randn(9, 6), "fc1_bias": None}
        values |= {"fc2_weight": torch.randn(6, 9, 1, 1), "fc2_bias": None}
        values |= {"layer_scale": None, "drop_path": None, "hidden_drop_path": None, "act": "gelu"}
    elif op == "pool_mixer":
        values |= {"norm_weight": None, "layer_scale": None, "drop_path": None, "pool_size": 3}
    else:
        values |= {"weight": None}
    values |= {"backend": "cpu"}
    assert changes.keys() <= values.keys()
    return getattr(torch.ops.poolformer_kernels, f"{op}_bwd")(*(values | changes).values())


BAD = [
    (OPS, {"x": torch.randn(6, 4, 5)}, ValueError, "shape"),
    (OPS, {"dy": torch.randn(2, 6, 4, 4)}, ValueError, r"gradient has shape \[2, 6, 4, 4\]"),
    (OPS, {"dy": torch.randn(2, 6, 4, 5).half()}, TypeError, "gradient is Half and x is Float"),
    (OPS, {"saved": torch.ones(2, 4, 2)}, ValueError, "num_groups is 4.*6 channels"),
    (OPS, {"saved": torch.ones(2, 0, 2)}, ValueError, "num_groups is 0"),
    (OPS, {"saved": torch.ones(1, 3, 2)}, ValueError, r"saved has shape.*\(2, G, 2\)"),
    (OPS, {"saved": torch.ones(2, 3, 2).double()}, TypeError, "saved is Double.*Float"),
    (OPS, {"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    (OPS[:1], {"pool_size": 4}, ValueError, "pool_size is 4"),
    (OPS[:2], {"norm_weight": torch.ones(5)}, ValueError, r"norm_weight has shape \[5\]"),
    (OPS[:2], {"layer_scale": torch.ones(6).half()}, TypeError, "layer_scale is Half"),
    (OPS[:2], {"drop_path": torch.ones(3)}, ValueError, "drop_path"),
    (OPS[1:2], {"fc1_weight": torch.randn(9, 5)}, ValueError, "fc1_weight"),
    (OPS[1:2], {"fc2_weight": torch.randn(6, 8)}, ValueError, "fc2_weight"),
    (OPS[1:2], {"fc1_bias": torch.randn(6)}, ValueError, "fc1_bias"),
    (OPS[1:2], {"hidden": torch.ones(2, 4, 5, 8)}, ValueError, r"hidden has shape.*4, 5, 9\]"),
    (OPS[1:2], {"hidden": torch.ones(2, 4, 5, 9).half()}, TypeError, "hidden is Half"),
    (OPS[1:2], {"act": "tanh"}, ValueError, "act is 'tanh'"),
    (OPS[2:], {"weight": torch.ones(7)}, ValueError, "weight has shape"),
]


@pytest.mark.parametrize(
    ("op", "changes", "error", "message"), [(op, *bad) for ops, *bad in BAD for op in ops]
)
def test_bad_input(op: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    direct(op)
    with pytest.raises(error, match=message):
        direct(op, **changes)

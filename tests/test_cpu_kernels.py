"""The C++ kernels on every instruction set this machine runs: exactness, statistics, same bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from cases import Case
from torch import Tensor

import poolformer_kernels as pk
from poolformer_kernels import _extension, reference

C = _extension.load()
if C is None:
    pytest.skip(str(_extension.why_not()), allow_module_level=True)

OPS = ["pool_mixer", "mlp", "group_norm"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CAPABILITIES = C.cpu_capabilities()
CASES = [  # beyond those of test_ops: several tiles, phases, tails of every vector
    Case((1, 64, 40, 56), hidden=200),
    Case((3, 160, 7, 7), drop=True, mean=3.0, hidden=330),
    Case((1, 192, 14, 15), num_groups=3, act="silu", hidden=300),
    Case((2, 15, 33, 19), num_groups=5, pool_size=7, act="gelu_pytorch_tanh"),
    Case((7, 33, 1, 1), hidden=1, drop=True),
    Case((2, 5, 1, 40), pool_size=1001, act="relu"),
    Case((1, 512, 7, 7), hidden=900),
    Case((1, 24, 7, 7), hidden=2400),  # phases, a lone pixel, long sums in steps
    Case((1, 24, 19, 27), hidden=200),  # a lone pixel in tiles
    Case((1, 3, 130, 70), pool_size=5, affine=False),
    Case((1, 37, 6, 2), pool_size=5),  # five rows of three columns
]


def arguments(
    op: str, case: Case, layout: str, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor | None], dict[str, Any]]:
    options = cases.options(op, case)
    if dtype == torch.float64:
        options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    return cases.random_input(case, layout, dtype), cases.parameters(op, case, dtype), options


def forward(op: str, x: Tensor, params: list[Tensor | None], **options: Any) -> Any:
    return getattr(pk, op)(x, *params, backend="cpu", **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_as_exact_as_eager(
    op: str, case: Case, layout: str, dtype: torch.dtype, capability: str
) -> None:
    x, params, options = arguments(op, case, layout, dtype)
    ours = forward(op, x, params, **options)
    exact = cases.oracle(op, x, params, **options)
    if dtype == torch.float64:
        torch.testing.assert_close(ours, exact[0], rtol=1e-12, atol=1e-12)
    else:
        eager = cases.run(getattr(reference, op), x, params, **options)
        cases.assert_as_exact_as_eager([ours], eager, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vectors", [0, 1, 2, 3, 70])
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5])
def test_pixels_beyond_the_last_vector(
    vectors: int, columns: int, dtype: torch.dtype, capability: str
) -> None:
    case = Case((1, 35, 1, 16 * vectors + columns), hidden=333)
    x, params, options = arguments("mlp", case, "nchw", dtype)
    ours = forward("mlp", x, params, **options)
    exact = cases.oracle("mlp", x, params, **options)
    if dtype == torch.float64:
        torch.testing.assert_close(ours, exact[0], rtol=1e-12, atol=1e-12)
    else:
        eager = cases.run(reference.mlp, x, params, **options)
        last = [[y[0][..., -columns:]] for y in ([ours], eager, exact)]
        cases.assert_as_exact_as_eager(*last)


@pytest.mark.parametrize("layout", ["sliced", "permuted", "expanded"])
@pytest.mark.parametrize("case", CASES[3:5], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_any_strides(op: str, case: Case, layout: str) -> None:
    x, params, options = arguments(op, case, layout, torch.float32)
    params = [None if p is None else p.repeat_interleave(2, dim=0)[::2] for p in params]
    assert not x.is_contiguous() or layout == "expanded"
    y = forward(op, x, params, **options)
    dense = x.contiguous(memory_format=torch.contiguous_format)
    dense_params = [None if p is None else p.contiguous() for p in params]
    assert torch.allclose(y, forward(op, dense, dense_params, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", [*CASES[1:5], Case((2, 24, 40, 56), num_groups=2)], ids=str)
@pytest.mark.parametrize("op", ["pool_mixer", "mlp"])
def test_statistics_of_the_output_are_those_of_what_is_stored(
    op: str, case: Case, layout: str, dtype: torch.dtype, capability: str
) -> None:
    x, params, options = arguments(op, case, layout, dtype)
    y, stats = forward(op, x, params, return_stats=True, **options)
    exact = reference.statistics(y.double().contiguous(), case.num_groups)
    assert stats.shape == exact.shape
    assert torch.equal(stats[..., 0].double(), exact[..., 0])
    std = (exact[..., 2] / exact[..., 0]).sqrt()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert ((stats[..., 1] - exact[..., 1]).abs() <= tolerance * (std + exact[..., 1].abs())).all()
    assert ((stats[..., 2] - exact[..., 2]).abs() <= 4 * tolerance * exact[..., 2]).all()


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_variance_beside_a_large_mean(layout: str, capability: str) -> None:
    x = cases.layout_of(torch.randn(2, 64, 40, 40) + 3000, layout)
    _, saved = torch.ops.poolformer_kernels.group_norm_fwd(x, None, None, None, 4, 1e-5, "cpu")
    exact = reference.statistics(x.double(), 4)[:, :, 0]
    torch.testing.assert_close(saved[..., 0].double(), exact[..., 1], rtol=1e-7, atol=0)
    rstd = (exact[..., 2] / exact[..., 0] + 1e-5).rsqrt()
    torch.testing.assert_close(saved[..., 1].double(), rstd, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_given_statistics_are_used(op: str, dtype: torch.dtype, capability: str) -> None:
    case = Case((2, 24, 9, 7), num_groups=3, mean=1.0)
    x, params, options = arguments(op, case, "nchw", dtype)
    plain = forward(op, x, params, **options)
    halves = (
        x.double().unflatten(1, (3, 8)).chunk(2, dim=3)
    )  # partials over the upper and lower rows
    parts = []
    for half in halves:
        var, mean = torch.var_mean(half, dim=(2, 3, 4), correction=0)
        count = torch.full_like(mean, half[0, 0].numel())
        parts.append(torch.stack([count, mean, var * count], dim=-1))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    stats = torch.stack(parts, dim=2).to(acc)
    eps = torch.finfo(dtype).eps
    with_stats = forward(op, x, params, stats=stats, **options)
    torch.testing.assert_close(with_stats, plain, rtol=4 * eps, atol=16 * eps)
    stats[..., 2] *= 100
    assert (forward(op, x, params, stats=stats, **options) - plain).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
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
    x, params, options = arguments(op, case, layout, dtype)
    if op != "group_norm":
        options["return_stats"] = True
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        result = forward(op, x, params, **options)
        results.append(result if isinstance(result, tuple) else (result,))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_whether_threads_share_pixels_or_not(
    dtype: torch.dtype, capability: str, threads: Callable[[int], None]
) -> None:
    """Two threads have tiles of their own here, where one and eight share all pixels."""
    torch.manual_seed(0)
    channels, hidden = 40, 1400  # more than one chunk of the hidden
    x = torch.randn(1, channels, 14, 14).to(dtype)
    fc1, fc2 = (torch.randn(*s) / s[1] ** 0.5 for s in ((hidden, channels), (channels, hidden)))
    weights = (fc1.to(dtype), torch.randn(hidden).to(dtype), fc2.to(dtype), None)
    results = []
    for count in (1, 2, 8):
        threads(count)
        results.append(pk.mlp(x, None, None, *weights, backend="cpu", return_stats=True))
    for z, stats in results[1:]:
        assert torch.equal(z, results[0][0]) and torch.equal(stats, results[0][1])


def activations(act: str, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """act(values), through an MLP: fc1 is zero with bias `values`, fc2 the identity."""
    out = []
    for part in values.to(dtype).split(64):
        size = len(part)
        x, zeros = torch.zeros(1, size, 1, 1, dtype=dtype), torch.zeros(size, size, dtype=dtype)
        eye = torch.eye(size, dtype=dtype)
        z = pk.mlp(x, None, None, zeros, part, eye, None, act=act, backend="cpu")
        out.append(z.flatten())
    return torch.cat(out)


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "relu", "silu"])
def test_activations(act: str, capability: str) -> None:
    parts = [torch.linspace(-10, 10, 4001), torch.tensor([-1e-30, 1e-40, 12.0, 1e30])]
    if act == "gelu":  # to where it is 0
        parts += [torch.linspace(-16, -10, 1201)]
    grid = torch.cat(parts)
    v = grid.double()
    exact = reference.ACTIVATIONS[act](v)
    if act == "gelu":  # whose usual form cancels for negative values, in float64 too
        exact = v * torch.erfc(v * -(0.5**0.5)) / 2
    error = (activations(act, grid).double() - exact).abs()
    ulps = error / (exact.abs() * 2**-23 + 2.0**-149)
    assert error[v.abs() <= 10].max() <= 1.2e-6
    assert ulps[grid >= 0].max() <= 4
    if act in ("gelu", "silu"):
        assert ulps.max() <= 8
    for value, limit in ((math.inf, math.inf), (-math.inf, 0.0), (math.nan, math.nan)):
        got = activations(act, torch.tensor([value])).item()
        assert got == limit or (math.isnan(got) and math.isnan(limit))


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "relu", "silu"])
def test_activations_in_bfloat16(act: str, capability: str) -> None:
    """Every bfloat16 from -13 to 1000: at most two thirds of its last place off."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    grid = bits.view(torch.bfloat16)
    grid = grid[(grid > -13) & (grid < 1000) & (grid.abs() > 1e-37)]
    v = grid.double()
    exact = reference.ACTIVATIONS[act](v)
    if act == "gelu":
        exact = v * torch.erfc(v * -(0.5**0.5)) / 2
    error = (activations(act, grid, torch.bfloat16).double() - exact).abs()
    limit = torch.exp2(exact.abs().clamp(min=2.0**-125).log2().floor() - 7) * (2 / 3)
    if act == "gelu_pytorch_tanh":  # whose tail cancels, in float64 too
        error, limit = error[v > -5], limit[v > -5]
    assert (error <= limit + 2.0**-126).all()
    for value in (math.inf, math.nan):
        got = activations(act, torch.tensor([value]), torch.bfloat16).item()
        assert got == value or (math.isnan(got) and math.isnan(value))
    assert abs(activations(act, torch.tensor([-1e30]), torch.bfloat16).item()) == 0


def test_rounding_of_16_bits_is_that_of_torch(capability: str) -> None:
    """Every half, and floats between and beyond them, through the copy that group_norm makes."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype)
        x = x[x.isfinite() & (x.abs().double() < 1e30)].reshape(1, 1, 1, -1)
        stats = torch.tensor([1.0, 0.0, 1.0]).reshape(1, 1, 1, 3)  # mean 0, variance 1
        y = pk.group_norm(x, None, None, eps=0.0, stats=stats, backend="cpu")
        assert torch.equal(y, x)
        for factor in (1.0017, 0.33, 3e-5, 6e4):
            weight = torch.tensor([factor], dtype=dtype)
            y = pk.group_norm(x, weight, None, eps=0.0, stats=stats, backend="cpu")
            assert torch.equal(y, (x.float() * weight.float()).to(dtype))


def test_empty_batch(capability: str) -> None:
    for op in OPS:
        x, params, options = arguments(op, Case((0, 8, 5, 5)), "nchw", torch.float32)
        assert forward(op, x, params, **options).shape == (0, 8, 5, 5)
        if op != "group_norm":
            y, stats = forward(op, x, params, return_stats=True, **options)
            assert y.shape == x.shape and stats.shape == (0, 1, 1, 3)


def test_capabilities(run_python: Callable[..., Any]) -> None:
    assert C.cpu_capability() == CAPABILITIES[0] and CAPABILITIES[-1] == "default"
    with pytest.raises(ValueError, match=r"'neon'.*it can run: .*default"):
        C.set_cpu_capability("neon")
    script = """if True:
        import os
        from poolformer_kernels import _extension
        C = _extension.load()
        try:
            C.cpu_capability()
        except ValueError as error:
            print(error)
        os.environ["POOLFORMER_CPU_CAPABILITY"] = "default"
        print(C.cpu_capability())
    """
    done = run_python("-c", script, POOLFORMER_CPU_CAPABILITY="sse9")
    error, name = done.stdout.splitlines()
    assert error.startswith("POOLFORMER_CPU_CAPABILITY is 'sse9', which this CPU cannot run")
    assert name == "default"


def direct(op: str, **changes: Any) -> Any:
    """A correct call of the dispatcher's op, past the checks in Python, with `changes`."""
    values: dict[str, Any] = {"x": torch.randn(2, 6, 4, 5), "stats": None}
    if op == "mlp":
        values |= {"norm_weight": None, "norm_bias": None}
        values |= {"fc1_weight": torch.randn(9, 6), "fc1_bias": None}
        values |= {"fc2_weight": torch.randn(6, 9, 1, 1), "fc2_bias": None}
        values |= {"layer_scale": None, "drop_path": None, "hidden_drop_path": None, "act": "gelu"}
    elif op == "pool_mixer":
        values |= {"norm_weight": None, "layer_scale": None, "drop_path": None, "pool_size": 3}
    else:
        values |= {"weight": None, "bias": None}
    values |= {"num_groups": 2, "eps": 1e-5}
    values |= {} if op == "group_norm" else {"return_stats": False}
    values |= {"save_hidden": False} if op == "mlp" else {}
    values |= {"backend": "cpu"}
    assert changes.keys() <= values.keys()
    return getattr(torch.ops.poolformer_kernels, f"{op}_fwd")(*(values | changes).values())


EVERY_OP = [
    ({"x": torch.randn(6, 4, 5)}, ValueError, r"\[6, 4, 5\].*\(B, C, H, W\)"),
    ({"x": torch.ones(2, 6, 4, 5, dtype=torch.int32)}, TypeError, "float32, bfloat16"),
    ({"x": torch.randn(2, 6, 0, 5)}, ValueError, "at least 1"),
    ({"num_groups": 4}, ValueError, "num_groups is 4.*6 channels"),
    ({"num_groups": 0}, ValueError, "num_groups is 0"),
    ({"eps": -1.0}, ValueError, "eps is -1"),
    ({"eps": math.nan}, ValueError, "eps is nan"),
    ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ({"stats": torch.ones(2, 1, 1, 3)}, ValueError, r"stats has shape.*\(2, 2, P, 3\)"),
    ({"stats": torch.ones(2, 2, 0, 3)}, ValueError, "P >= 1"),
    ({"stats": torch.ones(2, 2, 1, 3).double()}, TypeError, "stats is Double.*Float"),
]
MIXER_AND_MLP = [
    ({"norm_weight": torch.ones(5)}, ValueError, r"norm_weight has shape \[5\].*needs \[6\]"),
    ({"norm_weight": torch.ones(6).half()}, TypeError, "norm_weight is Half and x is Float"),
    ({"layer_scale": torch.ones(6, 1)}, ValueError, "layer_scale has shape"),
    ({"drop_path": torch.ones(3)}, ValueError, r"drop_path.*one factor an image, \(2\)"),
    ({"drop_path": torch.ones(2).double()}, TypeError, "drop_path is Double"),
]
MLP = [
    ({"fc1_weight": torch.randn(9, 5)}, ValueError, r"fc1_weight.*needs \[9, 6\]"),
    ({"fc1_weight": torch.randn(9, 6, 3, 3)}, ValueError, r"needs \[9, 6, 1, 1\]"),
    ({"fc1_weight": torch.randn(0, 6)}, ValueError, "hidden >= 1"),
    ({"fc1_weight": torch.randn(())}, ValueError, "hidden >= 1"),
    ({"fc2_weight": torch.randn(6, 8)}, ValueError, r"fc2_weight.*needs \[6, 9\]"),
    ({"fc2_weight": torch.randn(6, 9).double()}, TypeError, "fc2_weight is Double"),
    ({"fc1_bias": torch.randn(6)}, ValueError, "fc1_bias"),
    ({"fc2_bias": torch.randn(9)}, ValueError, "fc2_bias"),
    ({"norm_bias": torch.randn(9)}, ValueError, "norm_bias"),
    ({"hidden_drop_path": torch.ones(2, 1)}, ValueError, "hidden_drop_path"),
    ({"act": "tanh"}, ValueError, "act is 'tanh'.*'silu'"),
]
BAD = [(op, *bad) for op in OPS for bad in EVERY_OP]
BAD += [(op, *bad) for op in OPS[:2] for bad in MIXER_AND_MLP] + [("mlp", *bad) for bad in MLP]
BAD += [("pool_mixer", {"pool_size": p}, ValueError, f"pool_size is {p}") for p in (-3, 0, 4)]
BAD += [("group_norm", {"weight": torch.ones(7)}, ValueError, "weight has shape")]
BAD += [("group_norm", {"bias": torch.ones(6).double()}, TypeError, "bias is Double")]


@pytest.mark.parametrize(("op", "changes", "error", "message"), BAD)
def test_bad_input(op: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    direct(op)
    with pytest.raises(error, match=message):
        direct(op, **changes)

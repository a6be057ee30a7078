"""The C++ kernels under autocast to bfloat16, with native products and without."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from cases import Case
from torch import Tensor, nn

import poolformer_kernels as pk
from benchmarks.saved_bytes import saved_storages
from poolformer_kernels import _extension, reference

C = _extension.load()
if C is None:
    pytest.skip(str(_extension.why_not()), allow_module_level=True)

LAYOUTS = ["nchw", "channels_last"]
CASES = [  # parts of pixels and of the hidden, odd channels and pixels, tails of every vector
    Case((3, 64, 40, 57), hidden=200, drop=True),
    Case((3, 161, 7, 7), drop=True, mean=3.0, hidden=331),
    Case((1, 192, 14, 15), num_groups=3, act="silu", hidden=300),
    Case((2, 15, 33, 19), num_groups=5, act="gelu_pytorch_tanh"),
    Case((7, 33, 1, 1), hidden=5, drop=True),
    Case((2, 5, 1, 40), act="relu", affine=False),
    Case((1, 512, 7, 7), hidden=900),
    Case((0, 8, 5, 5)),
]


def arguments(
    case: Case, layout: str
) -> tuple[Tensor, list[Tensor | None], Tensor, dict[str, Any]]:
    """x, parameters, the output's gradient, all float32, and options."""
    x = cases.random_input(case, layout, torch.float32)
    params = cases.parameters("mlp", case, torch.float32)
    dz = cases.layout_of(torch.randn(case.shape), layout)
    return x, params, dz, cases.options("mlp", case)


def mlp(case: Case, layout: str, autocast: bool = True, **more: Any) -> list[Tensor]:
    """The output and all gradients."""
    x, params, dz, options = arguments(case, layout)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return cases.run(pk.mlp, x, params, dz, **options, **more)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_eager(case: Case, layout: str, keeps: bool, capability: str) -> None:
    torch.manual_seed(0)
    ours = mlp(case, layout, backend="cpu", save_hidden=keeps)
    torch.manual_seed(0)
    eager = mlp(case, layout, backend="torch")
    torch.manual_seed(0)
    x, params, dz, options = arguments(case, layout)
    cases.assert_as_exact_as_eager(ours, eager, cases.oracle("mlp", x, params, dz, **options))
    assert all(t.dtype == torch.float32 for t in ours[1:])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pk.mlp(x, *params, backend="cpu", **options), ours[0])


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_left_of_an_earlier_call(case: Case, keeps: bool, capability: str) -> None:
    results = []
    for factor in (1.0, math.nan, 1.0):
        torch.manual_seed(0)
        x, params, dz, options = arguments(case, "nchw")
        params = [None if p is None else p * factor for p in params]
        with torch.autocast("cpu", torch.bfloat16):
            options |= {"backend": "cpu", "save_hidden": keeps}
            results.append(cases.run(pk.mlp, x * factor, params, dz * factor, **options))
    assert all(map(torch.equal, results[0], results[2]))
    assert all(t.isfinite().all() for t in results[2])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_products_are_of_float32_where_bfloat16_is_not_native(
    case: Case, layout: str, capability: str
) -> None:
    results = []
    for autocast in (True, False):
        torch.manual_seed(0)
        results.append(mlp(case, layout, autocast, backend="cpu", save_hidden=False))
    same = all(map(torch.equal, *results))
    assert same != C.cpu_multiplies_bf16()
    assert C.cpu_multiplies_bf16() == (capability == "avx512_bf16")


def test_patch_embed_is_in_bfloat16_where_that_is_native(capability: str) -> None:
    x, weight, bias = torch.randn(2, 12, 15, 15), torch.randn(20, 12, 3, 3), torch.randn(20)
    geometry: dict[str, Any] = {"stride": 2, "padding": 1, "backend": "cpu"}
    with torch.autocast("cpu", torch.bfloat16):
        ours = pk.patch_embed(x, weight, bias, **geometry)
    dtype = torch.bfloat16 if C.cpu_multiplies_bf16() else torch.float32
    expected = pk.patch_embed(x.to(dtype), weight.to(dtype), bias.to(dtype), **geometry)
    assert torch.equal(ours, expected.bfloat16())


def test_autocast_to_float16_has_products_of_float32(capability: str) -> None:
    x, params, _, options = arguments(CASES[1], "nchw")
    plain = pk.mlp(x, *params, backend="cpu", **options)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(pk.mlp(x, *params, backend="cpu", **options), plain)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[6]], ids=str)
def test_same_bits_on_any_number_of_threads(
    case: Case, capability: str, threads: Callable[[int], None]
) -> None:
    results = []
    for count in (1, 2, 3):
        threads(count)
        torch.manual_seed(0)
        results.append(mlp(case, "channels_last", backend="cpu"))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


native = pytest.mark.skipif(
    not C.cpu_multiplies_bf16(), reason="this CPU does not multiply bfloat16 natively"
)


PRODUCT: dict[str, Any] = {"product": torch.bfloat16}


def direct(keeps: bool) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of mlp_fwd and of mlp_bwd with products of bfloat16, all float32."""
    x, params, dz, options = arguments(Case((2, 9, 6, 5), drop=True, hidden=13), "nchw")
    factors = options["drop_path"], options["hidden_drop_path"]
    forward = (x, None, *params, *factors, "gelu", 1, 1e-5, False, keeps, "cpu")
    _, saved, _, hidden = torch.ops.poolformer_kernels.mlp_fwd(*forward, **PRODUCT)
    assert hidden.dtype == torch.bfloat16 and (hidden.numel() > 0) == keeps
    return forward, (dz, x, saved, hidden if keeps else None, *params, *factors, "gelu", "cpu")


@native
@pytest.mark.parametrize("keeps", [False, True])
def test_the_op_with_products_of_bfloat16(keeps: bool) -> None:
    forward, backward = direct(keeps)
    ops = torch.ops.poolformer_kernels
    torch.library.opcheck(ops.mlp_fwd.default, forward, PRODUCT)
    torch.library.opcheck(ops.mlp_bwd.default, backward, PRODUCT)
    if keeps:
        x, _, gamma, beta, fc1, fc1_bias = (t if t is None else t.double() for t in forward[:6])
        normed = torch.group_norm(x, 1, gamma, beta).permute(0, 2, 3, 1)
        exact = nn.functional.linear(normed, fc1, fc1_bias)
        torch.testing.assert_close(backward[3].double(), exact, rtol=0.02, atol=0.02)
    gradients = ops.mlp_bwd(*backward, **PRODUCT)
    assert all(g.dtype == torch.float32 for g in gradients)
    with pytest.raises(TypeError, match="hidden is Float and products are of BFloat16"):
        ops.mlp_bwd(*backward[:3], torch.ones(2, 6, 5, 13), *backward[4:], **PRODUCT)


def test_products_that_the_kernels_lack_are_refused(capability: str) -> None:
    x, params, _, _ = arguments(Case((2, 9, 6, 5), hidden=13), "nchw")
    op = torch.ops.poolformer_kernels.mlp_fwd
    rest = (None, None, "gelu", 1, 1e-5, False, False, "cpu")
    with pytest.raises(TypeError, match="product is Half and x is Float"):
        op(x, None, *params, *rest, product=torch.float16)
    if capability != "avx512_bf16":
        with pytest.raises(TypeError, match=rf"these kernels \({capability}\) do not multiply"):
            op(x, None, *params, *rest, **PRODUCT)


@native
def test_weights_gradients_are_not_rounded() -> None:
    x, params, dz, _ = arguments(Case((2, 40, 14, 14)), "channels_last")
    with torch.autocast("cpu", torch.bfloat16):
        _, _, _, _, dfc1, *_ = cases.run(pk.mlp, x, params, dz, backend="cpu")
    assert not torch.equal(dfc1, dfc1.bfloat16().float())


@native
def test_autocast_copies_no_weight() -> None:
    case = Case((1, 24, 5, 5))
    x = torch.randn(case.shape, requires_grad=True)
    parameters = [nn.Parameter(p) for p in cases.parameters("mlp", case, x.dtype) if p is not None]
    model = nn.ParameterList(parameters)
    with torch.autocast("cpu", torch.bfloat16), saved_storages(model) as saved:
        pk.mlp(x, *parameters, backend="cpu")
    assert sum(s.nbytes() for s in saved.values()) < x.nbytes + 100

    weight = nn.Parameter(torch.randn(16, 24, 3, 3))
    with (
        torch.autocast("cpu", torch.bfloat16),
        saved_storages(nn.ParameterList([weight])) as saved,
    ):
        pk.patch_embed(x, weight, stride=2, backend="cpu")
    assert [s.nbytes() for s in saved.values()] == [x.nbytes // 2]  # in bfloat16


def test_autocast_keeps_the_mixers_input_as_it_came() -> None:
    x, params = torch.randn(2, 24, 5, 5).bfloat16(), [torch.rand(24) for _ in range(3)]
    leaves = [x.float().requires_grad_(), x.clone().requires_grad_()]
    gradients = []
    for leaf in leaves:
        with torch.autocast("cpu", torch.bfloat16), saved_storages(nn.Module()) as saved:
            y = pk.pool_mixer(leaf, *params, backend="cpu")
        assert max(s.nbytes() for s in saved.values()) == leaf.nbytes
        gradients.append(torch.autograd.grad(y.sin().sum(), leaf)[0])
    assert gradients[1].dtype == torch.bfloat16
    assert torch.equal(gradients[0].bfloat16(), gradients[1])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_under_autocast(backend: str) -> None:
    x, params, _, options = arguments(Case((2, 9, 6, 5), drop=True, hidden=13), "channels_last")
    tensors = [x, *(p for p in params if p is not None)]
    for t in tensors:
        t.requires_grad_()

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return pk.mlp(x, *params, backend="cpu", **options)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        z = function(x)
        results.append([z, *torch.autograd.grad(z.sum(), tensors)])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    exact = reference.mlp(*(t.detach().double() for t in tensors), **options)
    torch.testing.assert_close(results[0][0].double(), exact, rtol=0.1, atol=0.1)

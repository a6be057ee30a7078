"""PoolFormerV2 of timm: StarReLU, norms without a bias, scaled residuals."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from typing import Any

import pytest
import torch
from accelerated import DEPTHS, given_in, loss_and_gradients, timm_v2
from cases import BACKENDS, KERNELS, ROUNDINGS
from torch import Tensor, nn

import poolformer_kernels as pk

metaformer = pytest.importorskip("timm.models.metaformer")
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@torch.no_grad()
def spread(module: nn.Module, residual: tuple[float, float] = (0.5, 1.5)) -> nn.Module:
    """Values far from the first ones: StarReLU's scalars and the residuals' scales too."""
    for name, p in module.named_parameters():
        if "res_scale" in name:
            p.uniform_(*residual)
        elif name.endswith("act.scale"):
            p.uniform_(0.5, 1.2)
        elif name.endswith("act.bias"):
            p.uniform_(-0.5, 0.5)
        elif p.dim() > 1:
            p.normal_(0, p[0].numel() ** -0.5)
        else:
            p.add_(0.3 * torch.randn_like(p))
    return module


def block(scaled: bool) -> Any:
    return metaformer.MetaFormerBlock(
        32,
        metaformer.Pooling,
        norm_layer=metaformer.GroupNorm1NoBias,
        res_scale_init_value=1.0 if scaled else None,
    )


def results(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output, and gradients of x and of every parameter."""
    x = x.detach().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["residual", "scaled residual"])
def test_a_block_is_as_exact_as_eager(
    scaled: bool, dtype: torch.dtype, layout: Any, backend: str
) -> None:
    """In the mean over several blocks: StarReLU has gradients of one number, whose errors vary."""
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for _ in range(6):
        stock = spread(block(scaled)).to(dtype)
        x, dy = (torch.randn(2, 32, 14, 9).to(dtype, memory_format=layout) for _ in range(2))
        exact = results(copy.deepcopy(stock).double(), x.double(), dy.double())
        eager, ours = results(stock, x, dy), results(pk.accelerate(stock, backend), x, dy)
        names = ["y", "dx", *(name for name, _ in stock.named_parameters())]
        for name, a, b, c in zip(names, ours, eager, exact, strict=True):
            assert (a.dtype == dtype and a.is_contiguous(memory_format=layout)) or a.dim() != 4
            for place, error in enumerate((a.double() - c, b.double() - c, c)):
                squares[name][place] += error.square().sum().item()
    for name, sums in squares.items():
        ours_off, eager_off, size = (value**0.5 for value in sums)
        allowed = 2 * eager_off + ROUNDINGS[dtype] * torch.finfo(dtype).eps * size
        assert ours_off <= allowed, f"{name}: error {ours_off:.3e}, allowed {allowed:.3e}"


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_residuals_scaled_far_from_one(scale: float) -> None:
    """y = x + branch takes x in, and (scale − 1)·x out: an error of some eps·|x|."""
    stock, x = spread(block(True), (scale, scale)), torch.randn(2, 32, 14, 9)
    exact = results(copy.deepcopy(stock).double(), x.double(), x.double())
    for a, b in zip(results(pk.accelerate(stock), x, x), exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-6 * b.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_a_model_in_float64(train: bool, backend: str) -> None:
    model, x = spread(timm_v2(drop_path=0.4)).double().train(train), torch.randn(3, 3, 64, 48)
    expected = loss_and_gradients(model, x.double())
    state = copy.deepcopy(model.state_dict())
    pk.accelerate(model, backend)
    assert len(pk.report(model).fused) == sum(DEPTHS) and not pk.report(model).left
    for a, b in zip(loss_and_gradients(model, x.double()), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert len(pk.report(other).fused) == sum(DEPTHS)
    for module in (model, other):
        again = loss_and_gradients(pk.restore(module), x.double())
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_dtypes_of_eager(dtype: torch.dtype, backend: str) -> None:
    model, x = spread(timm_v2()), torch.randn(4, 3, 32, 32)

    def stages(x: Tensor) -> list[Tensor]:
        features = [model.stem(x)]
        for stage in model.stages:
            features.append(stage(features[-1]))
        return [*features, model(x)]

    model.double()
    exact = stages(x.double())
    model.float()
    with torch.autocast("cpu", dtype):
        eager = stages(x)
        pk.accelerate(model, backend)
        ours = stages(x)
    assert [t.dtype for t in ours] == [t.dtype for t in eager]
    for a, b, truth in zip(ours, eager, exact, strict=True):
        assert (a.double() - truth).norm() <= 2 * (b.double() - truth).norm()


@pytest.mark.parametrize("backend", KERNELS)
def test_statistics_are_handed_on_where_no_residual_is_scaled(backend: str) -> None:
    model, x = pk.accelerate(timm_v2(), backend), torch.randn(1, 3, 32, 32)
    scaled = (False, False, True, True)
    handed = [
        place > 0 and not scale
        for depth, scale in zip(DEPTHS, scaled, strict=True)
        for place in range(depth)
    ]
    assert given_in(lambda: model(x)) == handed and any(handed)


def test_other_parts_are_left_as_they_are() -> None:
    for change, reason in [
        (lambda b: setattr(b.mlp.act, "relu", nn.GELU()), "no kernel for its activation StarReLU"),
        (lambda b: setattr(b, "res_scale1", nn.Dropout(0.5)), "res_scale1 is a Dropout"),
        (lambda b: b.mlp.act.relu.register_forward_hook(print), "forward hook on its mlp.act.relu"),
        (lambda b: b.res_scale2.register_forward_hook(print), "forward hook on its res_scale2"),
    ]:
        stock = block(True)
        change(stock)
        with pytest.warns(UserWarning, match=reason):
            pk.accelerate(stock)


def test_gpu_kernels_say_that_they_lack_the_activation() -> None:
    call = pk.backends.Call("mlp", "cuda", torch.float32, "relu2")
    reasons = pk.backends.explain(call)
    assert "no kernel for the activation 'relu2'" in pk.backends._kernel_limits(call, (call.dtype,))
    assert all(reasons[name] for name in ("cuda", "triton")) and reasons["torch"] is None

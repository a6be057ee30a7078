"""The ops under torch.library.opcheck, and accelerated models under torch.compile."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from cases import BACKENDS, DTYPES, KERNELS, Case
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import poolformer_kernels as pk
from poolformer_kernels import _extension

CASE = Case((2, 8, 6, 5), num_groups=2, drop=True, hidden=12)
needs_extension = pytest.mark.skipif(_extension.load() is None, reason=str(_extension.why_not()))


def arguments(
    op: str, direction: str, layout: str, dtype: torch.dtype, full: bool
) -> tuple[Any, ...]:
    """Arguments of torch.ops.poolformer_kernels.<op>_<direction>; not `full`: every None."""
    case = CASE if full else Case(CASE.shape, affine=False, hidden=12)
    x = cases.random_input(case, layout, dtype)
    params = cases.parameters(op, case, dtype)
    options = cases.options(op, case)
    stats = pk.reference.statistics(x, case.num_groups) if full else None
    groups, acc = case.num_groups, torch.float64 if dtype == torch.float64 else torch.float32
    tail: tuple[Any, ...]
    if op == "group_norm":
        tensors, tail = params, (groups, 1e-5, "cpu")
    elif op == "pool_mixer":
        tensors = [params[0], params[2], options.get("drop_path")]
        tail = (3, groups, 1e-5, full, "cpu")
    else:
        tensors = [*params, options.get("drop_path"), options.get("hidden_drop_path")]
        tail = ("gelu", groups, 1e-5, full, full, "cpu")
    if direction == "fwd":
        return x, stats, *tensors, *tail
    saved = torch.rand(case.shape[0], groups, 2, dtype=acc)
    dy = torch.randn(case.shape).to(dtype)
    if op == "group_norm":
        return dy, x, saved, tensors[0], "cpu"
    if op == "pool_mixer":
        return dy, x, saved, *tensors, 3, "cpu"
    return dy, x, saved, None, *tensors, "gelu", "cpu"


COMBINATIONS = [
    *((dtype, layout, True) for dtype in DTYPES for layout in ("nchw", "channels_last", "sliced")),
    *((torch.float32, layout, False) for layout in cases.LAYOUTS),
    (torch.float64, "channels_last", True),
]


@needs_extension
@pytest.mark.parametrize(("dtype", "layout", "full"), COMBINATIONS)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("op", ["pool_mixer", "mlp", "group_norm"])
def test_opcheck(op: str, direction: str, layout: str, dtype: torch.dtype, full: bool) -> None:
    torch.library.opcheck(
        getattr(torch.ops.poolformer_kernels, f"{op}_{direction}").default,
        arguments(op, direction, layout, dtype, full),
    )


def hugging_face() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.PoolFormerForImageClassification(transformers.PoolFormerConfig(**SMALL))


def own() -> torch.nn.Module:
    return pk.PoolFormerForImageClassification(pk.PoolFormerConfig(**SMALL))


SMALL = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1], "num_labels": 5}


@pytest.mark.slow
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("source", [hugging_face, own])
def test_compiled_model_equals_the_uncompiled_one(source: Any, train: bool, backend: str) -> None:
    model = pk.accelerate(source(), backend).train(train)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                parameter.uniform_(0.5, 1.0)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    x, labels = torch.randn(2, 3, 64, 48), torch.tensor([1, 3])
    before, after = (step(m, model, x, labels) for m in (model, compiled))
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * (1 + b.abs().max().item()))


@pytest.mark.slow
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("source", [hugging_face, own])
def test_all_other_batch_sizes_add_one_graph(source: Any, train: bool, backend: str) -> None:
    """As users compile: nothing is marked as dynamic."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = pk.accelerate(source(), backend).train(train)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (2, 3, 5, 8):
        x, labels = torch.randn(batch, 3, 64, 96), torch.arange(batch) % 5
        before, after = (step(m, model, x, labels) for m in (model, compiled))
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2, "the second batch size makes the batch dynamic"


def step(callable_: Any, model: torch.nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    if not model.training:
        with torch.no_grad():
            return [callable_(x).logits]
    result = callable_(x, labels=labels)
    gradients = torch.autograd.grad(result.loss, list(model.parameters()))
    return [result.loss.detach(), result.logits.detach(), *gradients]


@pytest.mark.parametrize("backend", BACKENDS)
def test_drop_path_is_traced_whole(backend: str) -> None:
    block = pk.PoolFormerBlock(8, drop_path=0.5, layer_scale_init_value=1.0, backend=backend)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8, 6, 5)
    torch.manual_seed(1)
    expected = block(x)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(x), expected)

"""Blocks without gradients run as one op on the CPU, with the bits of the ops one by one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from accelerated import DEPTHS, SOURCES, first_block, images, logits, make, own, timm_v2
from torch import Tensor, nn

import poolformer_kernels as pk
from poolformer_kernels import _extension, stages
from poolformer_kernels.ops import blocks as blocks_op

pytestmark = pytest.mark.skipif(_extension.load() is None, reason="no CPU kernels")
RUNS = [depth for depth in DEPTHS if depth > 1]


@contextmanager
def runs() -> Iterator[list[int]]:
    """How many blocks each call of the op has run."""
    counts: list[int] = []

    def count(x: Tensor, calls: Any) -> Tensor:
        counts.append(len(calls))
        return blocks_op.blocks(x, calls)

    with mock.patch.object(stages, "run_blocks", count):
        yield counts


def one_by_one(model: nn.Module, x: Tensor) -> Tensor:
    with mock.patch.object(stages, "takes", lambda x: False):
        return logits(model, x)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bits_are_those_of_the_ops(source: Any, channels_last: bool, dtype: torch.dtype) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = pk.accelerate(make(source), "cpu").to(dtype)
    x = images().to(dtype).to(memory_format=layout)
    with torch.no_grad(), runs() as counts:
        fused = logits(model, x)
        assert counts == RUNS
        assert torch.equal(fused, one_by_one(model, x))
    assert counts == RUNS


def test_stages_keep_shape_dtype_and_layout() -> None:
    model = pk.accelerate(make(own), "cpu")
    stage = list(model.poolformer.encoder.block[2])
    for x in (torch.randn(3, 24, 5, 7), torch.randn(0, 24, 5, 7)):
        for layout in (torch.contiguous_format, torch.channels_last):
            given = x.to(memory_format=layout)
            before = given.clone()
            with torch.no_grad(), runs() as counts:
                y = stages.links(nn.ModuleList(stage))[0](given)
            assert counts == [3] and torch.equal(given, before)
            assert y.shape == x.shape and y.dtype == x.dtype
            assert (y.stride() == given.stride() and y.data_ptr() != given.data_ptr()) or not len(x)


def test_results_outlive_later_calls_of_every_size() -> None:
    model = pk.accelerate(make(own), "cpu")
    sizes = [32, 96, 48, 64]
    with torch.no_grad():
        inputs = [torch.randn(1, 3, size, size) for size in sizes]
        results = [model.forward(x, output_hidden_states=True).hidden_states for x in inputs]
        for x, result in zip(inputs, results, strict=True):
            again = model.forward(x, output_hidden_states=True).hidden_states
            assert all(map(torch.equal, result, again))


def test_python_threads_do_not_share_memory() -> None:
    model = pk.accelerate(make(own), "cpu")
    inputs = [torch.randn(1, 3, 32 + 32 * (i % 2), 64) for i in range(4)]
    with torch.no_grad():
        expected = [logits(model, x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(logits(model, inputs[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def called(model: nn.Module, x: Tensor) -> list[int]:
    with runs() as counts:
        logits(model, x)
    return counts


@pytest.mark.parametrize("source", SOURCES)
def test_whatever_the_op_would_skip_keeps_the_ops(source: Any) -> None:
    model, x = pk.accelerate(make(source)), images()
    assert called(model, x) == []  # gradients
    with torch.no_grad():
        assert called(model, x) == RUNS
        assert source is own or called(make(source), x) == []
        with torch.autocast("cpu", torch.bfloat16):
            assert called(model, x) == []
        with pk.use_backend("torch"):
            assert called(model, x) == []
        pk.accelerate(model, "torch")
        assert called(model, x) == []
        pk.accelerate(model, "cpu")
        assert called(model.train(), x) == []
        assert called(model.eval(), x) == RUNS


@pytest.mark.parametrize("source", SOURCES[:3])
@pytest.mark.filterwarnings("ignore:a block runs its own forward")
def test_a_changed_block_sends_its_chain_to_the_ops(source: Any) -> None:
    model, x = pk.accelerate(make(source), "cpu"), images()
    block = first_block(model)  # of a stage of one block: leaves all chains
    seen: list[int] = []
    with torch.no_grad():
        handle = next(m for m in block.modules() if isinstance(m, nn.AvgPool2d))
        removable = handle.register_forward_hook(lambda *_: seen.append(1))
        assert called(model, x) == RUNS and seen == [1]
        removable.remove()
        pools = [m for m in model.modules() if isinstance(m, nn.AvgPool2d)]
        removable = pools[-1].register_forward_hook(lambda *_: seen.append(2))
        expected = one_by_one(model, x)
        seen.clear()
        with runs() as counts:
            assert torch.equal(logits(model, x), expected)
        assert counts == RUNS[:-1] and seen == [2]
        removable.remove()
        pools[-1].kernel_size, pools[-1].padding = 5, 2  # another window than its neighbour's
        with runs() as counts:
            assert torch.equal(logits(model, x), one_by_one(model, x))
        assert counts == RUNS[:-1]


def test_poolformer_v2_keeps_its_residual_scales() -> None:
    model, x = pk.accelerate(make(timm_v2), "cpu"), images()
    with torch.no_grad():
        assert called(model, x) != RUNS
        assert torch.equal(logits(model, x), one_by_one(model, x))


def test_vmap_runs_the_ops() -> None:
    model = pk.accelerate(make(own), "torch")
    x = torch.randn(2, 1, 3, 32, 32)
    with torch.no_grad():
        mapped = torch.func.vmap(lambda x: logits(model, x))(x)
        torch.testing.assert_close(mapped[1], logits(model, x[1]))
        assert called(pk.accelerate(model, "cpu"), x[0]) == RUNS


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("before_norm.weight", torch.ones(7), ValueError, "norm_weight has shape .*7.* needs"),
        ("layer_scale_2", torch.ones(24).half(), TypeError, "layer_scale is .*Half and x is"),
        ("output.conv2.weight", torch.ones(9, 96, 1, 1), ValueError, "fc2_weight has shape"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(
    name: str, value: Tensor, error: type[Exception], message: str
) -> None:
    model = make(own)
    block, leaf = model.poolformer.encoder.block[2][1], name.rpartition(".")
    setattr(block.get_submodule(leaf[0]), leaf[2], nn.Parameter(value))
    with torch.no_grad(), pytest.raises(error, match=message):
        logits(pk.accelerate(model, "cpu"), images())


def test_the_op_itself_refuses_what_is_no_block() -> None:
    op = torch.ops.poolformer_kernels.blocks_fwd.default
    x, settings = torch.randn(1, 8, 4, 4), (3, 1, 1e-5, "gelu", "cpu")
    with pytest.raises(ValueError, match="there are 3 parameters; each block has 10"):
        op(x, [None] * 3, *settings)
    with pytest.raises(ValueError, match="there are 0 parameters"):
        op(x, [], *settings)
    with pytest.raises(TypeError, match="fc1_weight and fc2_weight are needed"):
        op(x, [None] * 10, *settings)
    with pytest.raises(ValueError, match="backend is 'triton'"):
        op(x, [None] * 10, 3, 1, 1e-5, "gelu", "triton")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_opcheck(dtype: torch.dtype, layout: torch.memory_format) -> None:
    call = make(own).poolformer.encoder.block[2][0].to(dtype).call_in_chain()
    x = torch.randn(2, 24, 5, 4, dtype=dtype).to(memory_format=layout)
    parameters = [None if t is None else t.detach() for t in call.parameters]
    op = torch.ops.poolformer_kernels.blocks_fwd.default
    torch.library.opcheck(op, (x, parameters * 2, *call.settings, "cpu"))

"""What CUDA graphs need of the ops: that nothing waits, and that replays follow their input."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import poolformer_kernels as pk

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}
SMALL = {"hidden_sizes": [8, 16, 24, 32], "depths": [2, 1, 1, 1], "num_labels": 4}


def model(backend: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = pk.PoolFormerConfig(layer_scale_init_value=0.5, **SMALL)
    return pk.accelerate(pk.PoolFormerForImageClassification(config).cuda(), backend)


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32).cuda()


def infer(net: torch.nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        net.eval()(x)


def train(net: torch.nn.Module, x: Tensor) -> None:
    net.train()(x).logits.sum().backward()


class Operators(TorchDispatchMode):
    """Notes the name of every operator that runs in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(op.name().partition("::")[2].partition(".")[0])
        tensors = [t for t in args if isinstance(t, Tensor)]
        result = op(*args, **(kwargs or {}))
        if any(t.is_cuda for t in tensors) and isinstance(result, Tensor) and result.is_cpu:
            self.names.append("_local_scalar_dense")
        return result


@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("step", [infer, train])
def test_nothing_waits_for_the_gpu(
    step: Callable[[torch.nn.Module, Tensor], None], backend: str
) -> None:
    net, x = model(backend), images()
    with Operators() as operators:
        step(net, x)
    assert not WAITING & set(operators.names)
    with Operators() as operators:
        net(x).logits.sum().item()
    assert WAITING & set(operators.names)


@pytest.mark.skipif("simgpu" in sys.modules, reason="the simulated GPU has no graphs")
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_a_captured_graph_follows_its_input(backend: str) -> None:
    net, static = model(backend).eval(), images()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode():
        with torch.cuda.stream(stream):
            for _ in range(3):
                net(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = net(static).logits
        for _ in range(2):
            other = images()
            static.copy_(other)
            graph.replay()
            assert torch.equal(logits, net(other).logits)

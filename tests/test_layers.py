"""poolformer_kernels.layers with Hugging Face's `kernels`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import hf_model, tiny_config, transformers_or_skip
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels import fused, layers

kernels = pytest.importorskip("kernels")
transformers_or_skip()


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' class, extensible in this test."""
    from transformers.models.poolformer.modeling_poolformer import PoolFormerLayer

    for name in ("kernel_layer_name", "kernel_condition"):
        monkeypatch.setattr(PoolFormerLayer, name, None, raising=False)
    kernels.replace_kernel_forward_from_hub(PoolFormerLayer, "PoolFormerLayer", layers.fits)
    return PoolFormerLayer


def kernelized(model: nn.Module, mode: Any) -> nn.Module:
    with kernels.use_kernel_mapping(layers.MAPPING):
        return kernels.kernelize(model, mode=mode)


def test_kernelize_runs_the_fused_ops(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(fused, "mlp", lambda *a, **k: calls.append(1) or pk.mlp(*a, **k))
    model, x = hf_model(tiny_config()), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x).logits
        assert not calls
        kernelized(model, kernels.Mode.INFERENCE)
        torch.testing.assert_close(model(x).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == sum(model.config.depths)


def test_gradients_and_compilation(layer: Any) -> None:
    model, x = hf_model(tiny_config()).train(), torch.randn(2, 3, 64, 64)
    gradients = []
    for step in (model, None):
        if step is None:
            kernelized(model, kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE)
            step = torch.compile(model, backend="aot_eager", fullgraph=True)
        loss = step(x).logits.square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    largest = max(gradient.abs().max().item() for gradient in gradients[0])
    for eager, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-5 * largest)


def test_blocks_that_do_not_fit_are_left(layer: Any) -> None:
    model = hf_model(tiny_config())
    block = next(module for module in model.modules() if isinstance(module, layer))
    block.output.conv1.register_forward_hook(lambda *_: None)
    kernelized(model, kernels.Mode.INFERENCE)
    replaced = ["forward" in m.__dict__ for m in model.modules() if isinstance(m, layer)]
    assert replaced == [False] + [True] * (len(replaced) - 1)


def test_the_layer_keeps_to_the_rules_of_kernels() -> None:
    members = set(dir(layers.PoolFormerLayer)) - set(dir(nn.Module))
    assert members <= {"can_torch_compile", "has_backward"}
    assert layers.PoolFormerLayer.__init__ is nn.Module.__init__

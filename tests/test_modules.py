"""PoolMixer, Mlp, GroupNorm and PoolFormerBlock: names, drop path, statistics, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BACKENDS, KERNELS
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels import reference
from poolformer_kernels.drop_path import draw_drop_path


def test_parameter_names_are_those_of_checkpoints() -> None:
    assert dict(pk.PoolFormerBlock(4).named_parameters()).keys() == {
        "layer_scale_1",
        "layer_scale_2",
        "output.conv1.weight",
        "output.conv1.bias",
        "output.conv2.weight",
        "output.conv2.bias",
        "before_norm.weight",
        "before_norm.bias",
        "after_norm.weight",
        "after_norm.bias",
    }
    assert dict(pk.PoolMixer(4).named_parameters()).keys() == {
        "layer_scale",
        "norm.weight",
        "norm.bias",
    }
    without = dict(pk.PoolFormerBlock(4, use_layer_scale=False).named_parameters())
    assert "layer_scale_1" not in without


def test_parameters_have_the_order_of_hugging_face() -> None:
    modeling = pytest.importorskip("transformers.models.poolformer.modeling_poolformer")
    config = pytest.importorskip("transformers").PoolFormerConfig()
    theirs = modeling.PoolFormerLayer(config, 4, 3, 4, 16, 0.0)
    assert [n for n, _ in pk.PoolFormerBlock(4).named_parameters()] == [
        n for n, _ in theirs.named_parameters()
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_block_is_its_two_halves(backend: str) -> None:
    block = pk.PoolFormerBlock(6, 10, pool_size=5, layer_scale_init_value=1.0, backend=backend)
    mixer = pk.PoolMixer(6, pool_size=5, layer_scale_init_value=1.0, backend="torch")
    mlp = pk.Mlp(6, 10, layer_scale_init_value=1.0, backend="torch")
    with torch.no_grad():
        for p in block.parameters():
            p.normal_()
    mixer.norm, mixer.layer_scale = block.before_norm, block.layer_scale_1
    mlp.norm, mlp.layer_scale = block.after_norm, block.layer_scale_2
    mlp.fc1, mlp.fc2 = block.output.conv1, block.output.conv2
    x = torch.randn(2, 6, 5, 7)
    torch.testing.assert_close(block(x), mlp(mixer(x)), rtol=1e-4, atol=1e-5)
    z, stats = block(x, reference.statistics(x, 1), return_stats=True)
    torch.testing.assert_close(z, block(x))
    if backend == "torch":
        assert stats is None
    else:
        torch.testing.assert_close(stats, reference.statistics(z.detach(), 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_block_uses_the_statistics_it_is_given(backend: str) -> None:
    block = pk.PoolFormerBlock(6, layer_scale_init_value=1.0, backend=backend)
    x = torch.randn(2, 6, 5, 7)
    wrong = reference.statistics(x, 1) * torch.tensor([1.0, 1.0, 9.0])
    assert not torch.allclose(block(x, wrong), block(x), atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_group_norm_module(backend: str) -> None:
    ours, stock = pk.GroupNorm(2, 6), nn.GroupNorm(2, 6)
    ours.backend = backend
    with torch.no_grad():
        for p in stock.parameters():
            p.normal_()
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(3, 6, 4, 5)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-5, atol=1e-5)


def test_drop_path_keeps_the_expectation() -> None:
    factors = draw_drop_path(torch.empty(20000, 1, 1, 1), 0.3)
    assert set(factors.unique().tolist()) == {0.0, (torch.tensor(1.0) / 0.7).item()}
    assert abs(factors.mean() - 1) < 0.02


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_images_pass_unchanged(backend: str) -> None:
    block = pk.PoolFormerBlock(4, drop_path=0.5, layer_scale_init_value=1.0, backend=backend)
    x = torch.randn(64, 4, 3, 3)
    same = (block(x) == x).flatten(1).all(1)
    expected = 0.5 * (1 - 0.5 * 0.5)  # the mixer dropped, and the MLP at one of its two draws
    assert abs(same.float().mean() - expected) < 0.2
    assert not (block.eval()(x) == x).flatten(1).all(1).any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pool_size": 4}, ValueError, "pool_size is 4"),
        ({"hidden_act": "swish"}, ValueError, "act is 'swish'"),
        ({"drop_path": 1.0}, ValueError, r"drop_path is 1.0; it has to be in \[0, 1\)"),
    ],
)
def test_bad_block(arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        pk.PoolFormerBlock(4, **arguments)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_autocast_follows_eager(train: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.PoolFormerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], drop_path_rate=0.5
    )
    model = transformers.PoolFormerForImageClassification(config).train(train)
    x = torch.randn(4, 3, 32, 32)
    results = []
    for prepare in (lambda m: m, pk.accelerate):
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16):
            result = prepare(model)(x, output_hidden_states=True)
        result.logits.float().sum().backward()
        results.append([result.logits, *result.hidden_states])
    for ours, eager in zip(results[1], results[0], strict=True):
        assert ours.dtype == eager.dtype
        torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2)

"""The models against transformers and the original, with the same weights."""

from __future__ import annotations

import re

import pytest
import torch
from model_cases import (
    BACKENDS,
    Original,
    pair,
    randomize,
    relative_error,
    tiny_config,
)

from poolformer_kernels import use_backend
from poolformer_kernels.models.poolformer import (
    PoolFormerBackbone,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    convert_state_dict,
)

PARAMETERS = {"s12": 11.92, "s24": 21.39, "s36": 30.86, "m36": 56.17, "m48": 73.47}


@pytest.fixture(scope="module")
def pairs():
    """For a variant: transformers' model and ours, with the same weights. Only the last is kept."""
    kept = {}

    def pair_of(variant):
        if variant not in kept:
            kept.clear()
            kept[variant] = pair(PoolFormerConfig.from_variant(variant))
        return kept[variant]

    return pair_of


@torch.no_grad()
def compare(theirs, ours, x, backend):
    expected = theirs(x, output_hidden_states=True)
    with use_backend(backend):
        result = ours(x, output_hidden_states=True)
    assert len(result.hidden_states) == 4
    assert relative_error(result.logits, expected.logits) <= 1e-5
    for ours_i, theirs_i in zip(result.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(ours_i, theirs_i) <= 1e-5


SHAPES = {variant: [(1, 3, 224, 224)] for variant in PARAMETERS}
for odd in ("s12", "m36"):
    SHAPES[odd] += [(1, 3, 97, 161), (3, 3, 97, 161)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("variant", "shape"), [(variant, shape) for variant in SHAPES for shape in SHAPES[variant]]
)
def test_variants_equal_transformers(pairs, variant, shape, backend):
    compare(*pairs(variant), torch.randn(shape), backend)


@pytest.mark.parametrize("variant", PARAMETERS)
def test_number_of_parameters(variant):
    with torch.device("meta"):
        model = PoolFormerForImageClassification(PoolFormerConfig.from_variant(variant))
    assert round(model.num_parameters() / 1e6, 2) == PARAMETERS[variant]
    model.poolformer.requires_grad_(False)
    expected = model.norm.weight.numel() * 2 + model.classifier.weight.numel() + 1000
    assert model.num_parameters(only_trainable=True) == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "fields",
    [
        {"pool_size": 5, "hidden_act": "gelu_new", "mlp_ratio": 2.5},
        {"use_layer_scale": False, "hidden_act": "relu", "num_channels": 1},
        {"depths": [0, 1, 1, 3], "hidden_act": "silu", "strides": [2, 2, 1, 2]},
        {
            "num_encoder_blocks": 2,
            "depths": [1, 2],
            "hidden_sizes": [9, 7],
            "patch_sizes": [5, 2],
            "strides": [3, 2],
            "padding": [0, 1],
            "num_labels": 0,
        },
    ],
)
def test_unusual_configs_equal_transformers(fields, backend):
    config = tiny_config(**fields)
    theirs, ours = pair(config)
    x = torch.randn(2, config.num_channels, 45, 61)
    with torch.no_grad(), use_backend(backend):
        result, expected = ours(x), theirs(x)
    assert relative_error(result.logits, expected.logits) <= 1e-5


def training_step(model, x, labels, seed=3):
    model.train().zero_grad()
    torch.manual_seed(seed)
    loss = model(x, labels=labels).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(result, expected, tolerance=1e-4):
    assert result.keys() == expected.keys()
    for name, gradient in expected.items():
        assert result[name].shape == gradient.shape
        # The pool keeps constants, so the true gradient of this bias is 0 and theirs is rounding.
        of_scale = name.replace("before_norm.bias", "before_norm.weight")
        bound = tolerance * expected[of_scale].abs().max()
        assert (result[name] - gradient).abs().max() <= bound, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "config",
    [
        PoolFormerConfig.from_variant("s12", drop_path_rate=0.3),
        tiny_config(drop_path_rate=0.3, use_layer_scale=False),
        tiny_config(drop_path_rate=0.3, depths=[2, 2, 3, 2], pool_size=5, hidden_act="silu"),
    ],
    ids=["s12", "no layer scale", "pool 5, silu"],
)
def test_training_equals_transformers(config, backend):
    theirs, ours = pair(config)
    x = torch.randn(4, 3, 64, 96)
    labels = torch.randint(config.num_labels, (4,))
    expected_loss, expected = training_step(theirs, x, labels)
    with use_backend(backend):
        loss, gradients = training_step(ours, x, labels)
        other_loss, _ = training_step(ours, x, labels, seed=4)
    assert abs(loss - expected_loss) <= 1e-5 * expected_loss.abs()
    assert_same_gradients(gradients, expected)
    assert abs(other_loss - expected_loss) > 1e-4 * expected_loss.abs()  # other images dropped


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_checkpointing_changes_no_gradient(backend):
    model = randomize(PoolFormerForImageClassification(tiny_config(drop_path_rate=0.3)))
    x, labels = torch.randn(4, 3, 64, 64), torch.randint(5, (4,))
    calls = []
    model.poolformer.encoder.block[2][1].register_forward_pre_hook(lambda *_: calls.append(1))
    with use_backend(backend):
        expected_loss, expected = training_step(model, x, labels)
        assert len(calls) == 1
        model.gradient_checkpointing_enable()
        loss, gradients = training_step(model, x, labels)
        assert len(calls) == 3  # forward, and again in backward
        model.gradient_checkpointing_disable()
        training_step(model, x, labels)
    assert len(calls) == 4
    assert abs(loss - expected_loss) <= 1e-6 * expected_loss.abs()
    assert_same_gradients(gradients, expected, tolerance=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backbone_equals_the_original(backend):
    config = tiny_config()
    original = randomize(Original(config, fork_feat=True)).eval()
    backbone = PoolFormerBackbone(config).eval()
    backbone.load_state_dict(convert_state_dict(original.state_dict()))
    x = torch.randn(2, 3, 70, 66)
    with torch.no_grad(), use_backend(backend):
        result, expected = backbone(x), original(x)
        features = backbone.poolformer.forward_features(x)
    assert backbone.strides == (4, 8, 16, 32) and backbone.channels == (8, 12, 16, 20)
    for stage, (ours, theirs) in enumerate(zip(result, expected, strict=True)):
        assert relative_error(ours, theirs) <= 1e-5
        assert features[stage].shape == ours.shape
    some = PoolFormerBackbone(config, out_indices=(1, 3)).eval()
    some.load_state_dict(backbone.state_dict(), strict=False)
    with torch.no_grad(), use_backend(backend):
        maps = some(x)
    assert some.strides == (8, 32) and some.channels == (12, 20)
    assert torch.equal(maps[0], result[1]) and torch.equal(maps[1], result[3])


@pytest.mark.parametrize("out_indices", [(), (0, 4), (-1,), (2, 1), (1, 1)])
def test_backbone_refuses_stages_that_are_not_there(out_indices):
    words = re.escape(f"out_indices is {out_indices!r}; it has to be one or more of [0, 1, 2, 3]")
    with pytest.raises(ValueError, match=words):
        PoolFormerBackbone(tiny_config(), out_indices=out_indices)

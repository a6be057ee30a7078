"""What the models return, refuse, and let one reach."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from model_cases import (
    BACKENDS,
    pair,
    randomize,
    relative_error,
    tiny_config,
    transformers_or_skip,
)

from poolformer_kernels import PoolFormerBlock, use_backend
from poolformer_kernels.models.poolformer import (
    PoolFormerBackbone,
    PoolFormerForImageClassification,
    PoolFormerModel,
)


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({}, torch.tensor([3, 0, -100])),
        ({"problem_type": "single_label_classification"}, torch.tensor([1, 4, 2])),
        ({}, torch.rand(3, 5)),
        ({"problem_type": "multi_label_classification"}, torch.rand(3, 5)),
        ({"problem_type": "regression"}, torch.randn(3, 5)),
        ({"num_labels": 1}, torch.randn(3)),
        ({"num_labels": 1}, torch.randn(3, 1)),
    ],
)
def test_losses_equal_transformers(fields, labels):
    config = tiny_config(**fields)
    theirs, ours = pair(config)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        result, expected = ours(x, labels=labels), theirs(x, labels=labels)
    assert relative_error(result.loss, expected.loss) <= 1e-5
    assert list(result) == list(expected) == ["loss", "logits"]
    assert config.problem_type == fields.get("problem_type")


@pytest.mark.parametrize(
    ("fields", "labels", "error", "words"),
    [
        ({}, torch.zeros(2).long(), ValueError, r"labels have shape \(2,\); single_label"),
        ({}, torch.rand(3), ValueError, r"multi_label_classification needs \(3, 5\)"),
        ({"problem_type": "multi_label_classification"}, torch.ones(3, 5).long(), TypeError, None),
        ({"problem_type": "single_label_classification"}, torch.rand(3), TypeError, "needs ints"),
        ({"num_labels": 1}, torch.rand(4), ValueError, r"regression needs \(3,\)"),
        ({"num_labels": 0}, torch.zeros(3).long(), ValueError, "num_labels is 0.*reset_classifier"),
    ],
)
def test_bad_labels_are_refused(fields, labels, error, words):
    model = PoolFormerForImageClassification(tiny_config(**fields))
    with pytest.raises(error, match=words):
        model(torch.randn(3, 3, 32, 32), labels=labels)


def test_tuples_equal_those_of_transformers():
    config, x, labels = tiny_config(), torch.randn(1, 3, 32, 32), torch.tensor([1])
    theirs, ours = pair(config)
    for arguments in (
        {},
        {"labels": labels},
        {"output_hidden_states": True},
        {"labels": labels, "output_hidden_states": True},
    ):
        result = ours(x, return_dict=False, **arguments)
        expected = theirs(x, return_dict=False, **arguments)
        assert len(result) == len(expected)
        for value, other in zip(result, expected, strict=True):
            assert isinstance(value, tuple) == isinstance(other, tuple)
    base = ours.poolformer
    assert len(base(x, return_dict=False)) == len(theirs.poolformer(x, return_dict=False)) == 2
    last, none, hidden = base(x, output_hidden_states=True, return_dict=False)
    assert none is None and torch.equal(last, hidden[-1])
    ours.config.return_dict, ours.config.output_hidden_states = False, True
    assert isinstance(ours(x), tuple) and len(ours(x)) == 2
    assert list(ours(x, return_dict=True)) == ["logits", "hidden_states"]


def test_outputs_are_read_in_every_way():
    model = PoolFormerForImageClassification(tiny_config()).eval()
    output = model(torch.randn(2, 3, 32, 32), output_hidden_states=True)
    assert output.loss is None and "loss" not in output
    assert output.logits is output["logits"] is output[0] is output.to_tuple()[0]
    assert output[1:] == (output.hidden_states,) and list(output) == ["logits", "hidden_states"]
    assert isinstance(output, dict) and dict(**output).keys() == output.keys()
    leaves, structure = torch.utils._pytree.tree_flatten(output)
    assert len(leaves) == 5
    rebuilt = torch.utils._pytree.tree_unflatten([leaf + 1 for leaf in leaves], structure)
    assert type(rebuilt) is type(output) and torch.equal(rebuilt.logits, output.logits + 1)
    for twin in (
        copy.deepcopy(torch.utils._pytree.tree_map(torch.detach, output)),
        pickle.loads(pickle.dumps(torch.utils._pytree.tree_map(torch.detach, output))),
    ):
        assert type(twin) is type(output) and torch.equal(twin.logits, output.logits)
    gathered = type(output)((name, value) for name, value in output.items())  # as DataParallel does
    assert gathered.logits is output.logits
    output.loss = torch.tensor(1.0)
    assert output["loss"] == 1
    for wrong in ("losses", "attentions"):
        with pytest.raises(AttributeError, match=f"no attribute '{wrong}'"):
            getattr(output, wrong)
        with pytest.raises(AttributeError, match=wrong):
            setattr(output, wrong, None)
    with pytest.raises(TypeError, match="has no attentions"):
        type(output)(attentions=None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiles_in_one_graph(backend, training):
    """Tracing is what can break here, so the graph is run as it is (backend aot_eager)."""
    torch._dynamo.reset()
    config = tiny_config(drop_path_rate=0.3, depths=[2, 0, 0, 1])
    model = randomize(PoolFormerForImageClassification(config)).train(training)
    x, labels = torch.randn(2, 3, 40, 56), torch.tensor([0, 3])
    with use_backend(backend):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.manual_seed(5)
        result = compiled(x, labels=labels, output_hidden_states=True)
        torch.manual_seed(5)
        expected = model(x, labels=labels, output_hidden_states=True)
    assert type(result) is type(expected) and len(result.hidden_states) == 4
    assert relative_error(result.logits, expected.logits) <= 1e-5
    assert relative_error(result.loss, expected.loss) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_handed_on_change_nothing(backend):
    """Blocks that are called one by one, or hooked, see what they see in the chain."""
    model = randomize(PoolFormerModel(tiny_config(depths=[3, 1, 2, 2]))).eval()
    x, seen = torch.randn(2, 3, 64, 64), []
    with use_backend(backend), torch.no_grad():
        expected = model.forward_features(x)
        model.encoder.block[0][0].register_forward_hook(lambda *hooked: seen.append(hooked[2]))
        result = model.forward_features(x)
    assert len(seen) == 1 and isinstance(seen[0], torch.Tensor)
    for ours, other in zip(result, expected, strict=True):
        assert relative_error(ours, other) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_dtypes_and_sizes(backend):
    model = randomize(PoolFormerForImageClassification(tiny_config())).eval()
    x = torch.randn(2, 3, 64, 48)
    with use_backend(backend), torch.no_grad():
        expected = model(x).logits
        last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        assert relative_error(last.logits, expected) <= 1e-5
        assert model(x[:0]).logits.shape == (0, 5)
        assert model(torch.randn(1, 3, 3, 3)).logits.shape == (1, 5)  # the smallest image
        low = model.to(torch.bfloat16)(x.to(torch.bfloat16)).logits
        assert model.dtype == low.dtype == torch.bfloat16
    assert relative_error(low.float(), expected) <= 0.05


def test_autocast():
    model = randomize(PoolFormerForImageClassification(tiny_config())).eval()
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        expected = model(x).logits
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x).logits
    assert relative_error(logits.float(), expected) <= 0.05


@pytest.mark.parametrize(
    ("pixel_values", "error", "words"),
    [
        (None, ValueError, "You have to specify pixel_values"),
        ([[1.0]], TypeError, "pixel_values is a list; it has to be a torch.Tensor"),
        (torch.randn(3, 32, 32), ValueError, r"shape \(3, 32, 32\);.*\(B, 3, H, W\).*unsqueeze"),
        (torch.randn(1, 32, 32, 3), ValueError, r"shape \(1, 32, 32, 3\);.*permute"),
        (torch.randn(1, 4, 32, 32), ValueError, r"\(B, 3, H, W\)"),
        (torch.randn(1, 3, 2, 32), ValueError, "H and W have to be at least 3.*Enlarge"),
        (torch.randn(1, 3, 32, 0), ValueError, "H and W have to be at least 3"),
        (torch.zeros(1, 3, 32, 32).byte(), TypeError, "torch.uint8; it has to be floating point"),
        (torch.randn(1, 3, 32, 32).half(), TypeError, r"float16 and the model torch.float32.*to\("),
        (torch.randn(1, 3, 32, 32, device="meta"), ValueError, "on meta and the model on cpu"),
    ],
    ids=["none", "list", "rank", "layout", "channels", "small", "empty", "int", "half", "device"],
)
@pytest.mark.parametrize("kind", [PoolFormerForImageClassification, PoolFormerBackbone])
def test_bad_images_are_refused(kind, pixel_values, error, words):
    with pytest.raises(error, match=words):
        kind(tiny_config())(pixel_values)


def test_bad_configs_are_refused():
    with pytest.raises(TypeError, match="config is a dict; it has to be a PoolFormerConfig"):
        PoolFormerModel({})
    config = tiny_config()
    config.pool_size = 4
    with pytest.raises(ValueError, match="pool_size is 4; it has to be odd"):
        PoolFormerModel(config)


def test_first_values_are_those_of_transformers():
    config = tiny_config(
        hidden_sizes=[32, 64, 64, 128], initializer_range=0.05, layer_scale_init_value=1e-3
    )
    theirs = transformers_or_skip().PoolFormerConfig(**config.to_dict())
    theirs = transformers_or_skip().PoolFormerForImageClassification(theirs)
    ours = PoolFormerForImageClassification(config)
    for (name, ours_p), (other, theirs_p) in zip(
        sorted(ours.named_parameters()), sorted(theirs.named_parameters()), strict=True
    ):
        assert name == other and ours_p.shape == theirs_p.shape
        if ours_p.dim() > 1:
            assert abs(ours_p.std() / 0.05 - 1) < 0.15 and abs(ours_p.mean()) < 0.01, name
        else:
            assert torch.equal(ours_p, theirs_p), name


def test_access_to_parts():
    model = PoolFormerForImageClassification(tiny_config())
    stem = model.get_input_embeddings()
    assert stem is model.poolformer.encoder.patch_embeddings[0]
    model.set_input_embeddings(replacement := copy.deepcopy(stem))
    assert model.poolformer.get_input_embeddings() is replacement
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    model = model.double()
    model.reset_classifier(9)
    assert model.config.num_labels == 9 and len(model.config.label2id) == 9
    assert model(torch.randn(1, 3, 32, 32).double()).logits.shape == (1, 9)
    model.reset_classifier(0)
    features = model(torch.randn(1, 3, 32, 32).double()).logits
    assert features.shape == (1, 20) and features.dtype == torch.float64
    assert sum(isinstance(module, PoolFormerBlock) for module in model.modules()) == 6
    rates = [
        b.drop_path
        for b in PoolFormerModel(tiny_config(drop_path_rate=0.5)).modules()
        if isinstance(b, PoolFormerBlock)
    ]
    assert rates == torch.linspace(0, 0.5, 6).tolist()

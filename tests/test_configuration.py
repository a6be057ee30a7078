"""PoolFormerConfig: Hugging Face's fields and files, and clear refusals."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from model_cases import tiny_config, transformers_or_skip

from poolformer_kernels.models.poolformer import PoolFormerConfig

VARIANTS = {
    "s12": ([2, 2, 6, 2], [64, 128, 320, 512], 1e-5),
    "s24": ([4, 4, 12, 4], [64, 128, 320, 512], 1e-5),
    "s36": ([6, 6, 18, 6], [64, 128, 320, 512], 1e-6),
    "m36": ([6, 6, 18, 6], [96, 192, 384, 768], 1e-6),
    "m48": ([8, 8, 24, 8], [96, 192, 384, 768], 1e-6),
}
FIELDS = vars(PoolFormerConfig()).keys() - {"dtype", "architectures"} | {"num_labels"}


def plain(value):
    return list(value) if isinstance(value, tuple) else value


def test_defaults_are_those_of_transformers():
    theirs, ours = transformers_or_skip().PoolFormerConfig(), PoolFormerConfig()
    assert {f: plain(getattr(theirs, f)) for f in FIELDS} == {f: getattr(ours, f) for f in FIELDS}
    assert ours.model_type == theirs.model_type


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_by_name(name):
    config = PoolFormerConfig.from_variant(name)
    assert (config.depths, config.hidden_sizes, config.layer_scale_init_value) == VARIANTS[name]
    assert config.num_labels == 1000
    for other in (f"poolformer_{name}", f"sail/poolformer_{name}", f"PoolFormer-{name.upper()}"):
        assert PoolFormerConfig.from_variant(other) == config
    custom = PoolFormerConfig.from_variant(name, num_labels=3, drop_path_rate=0.1)
    assert (custom.num_labels, custom.drop_path_rate, custom.depths) == (3, 0.1, config.depths)


def test_labels_follow_one_another():
    config = PoolFormerConfig(id2label={"0": "cat", "1": "dog", "2": "fox"})
    assert config.num_labels == 3
    assert config.id2label == {0: "cat", 1: "dog", 2: "fox"}
    assert config.label2id == {"cat": 0, "dog": 1, "fox": 2}
    config.num_labels = 3
    assert config.id2label[0] == "cat"
    config.num_labels = 1
    assert config.id2label == {0: "LABEL_0"} and config.label2id == {"LABEL_0": 0}
    assert config.use_return_dict is config.return_dict is True


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_labels": 7, "drop_path_rate": 0.25, "hidden_act": "silu", "pool_size": 5},
        {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}, "problem_type": "regression"},
        {"use_layer_scale": False, "output_hidden_states": True, "num_labels": 0},
        {"dtype": torch.bfloat16, "architectures": ["PoolFormerModel"], "return_dict": False},
    ],
)
def test_files_are_read_by_both(fields, tmp_path):
    transformers = transformers_or_skip()
    ours, theirs = PoolFormerConfig(**fields), transformers.PoolFormerConfig(**fields)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    read_by_them = transformers.PoolFormerConfig.from_pretrained(tmp_path / "ours")
    read_by_us = PoolFormerConfig.from_pretrained(tmp_path / "theirs")
    for field in FIELDS:
        assert plain(getattr(read_by_them, field)) == plain(getattr(theirs, field)), field
        assert getattr(read_by_us, field) == getattr(ours, field), field
    assert read_by_them.dtype == theirs.dtype and read_by_us.dtype == ours.dtype
    assert read_by_them.architectures == theirs.architectures == ours.architectures


def test_own_files_round_trip(tmp_path):
    config = tiny_config(drop_path_rate=0.1, id2label={0: "ä", 1: "b"})
    config.save_pretrained(tmp_path / "new" / "folder")
    assert PoolFormerConfig.from_pretrained(tmp_path / "new" / "folder") == config
    assert PoolFormerConfig.from_pretrained(tmp_path / "new/folder/config.json") == config
    assert copy.deepcopy(config) == config != tiny_config()
    assert [entry.name for entry in (tmp_path / "new/folder").iterdir()] == ["config.json"]
    assert "hidden_sizes=[8, 12, 16, 20]" in repr(config)


def test_unknown_fields_are_kept():
    fields = tiny_config().to_dict() | {"transformers_version": "4.16.0", "my_note": {"a": [1]}}
    config = PoolFormerConfig.from_dict(fields)
    assert config.my_note == {"a": [1]} and config.to_dict() == fields
    older = {name: value for name, value in fields.items() if name != "dtype"}
    assert PoolFormerConfig.from_dict(older | {"torch_dtype": "float16"}).dtype == "float16"


def test_overrides_go_first():
    fields = tiny_config(id2label={0: "a", 1: "b", 2: "c"}).to_dict()
    assert PoolFormerConfig.from_dict(fields, num_labels=3).id2label[2] == "c"
    assert PoolFormerConfig.from_dict(fields, num_labels=9).id2label[8] == "LABEL_8"
    assert PoolFormerConfig.from_dict(fields, drop_path_rate=0.5).drop_path_rate == 0.5


def test_timm_config_is_understood():
    fields = {"architecture": "poolformer_m36", "num_classes": 10, "num_features": 768}
    config = PoolFormerConfig.from_dict(fields)
    assert (config.depths, config.hidden_sizes) == VARIANTS["m36"][:2] and config.num_labels == 10
    with pytest.raises(ValueError, match="no variant 'poolformerv2_s12'"):
        PoolFormerConfig.from_dict({"architecture": "poolformerv2_s12"})


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"pool_size": 2}, ValueError, "pool_size is 2; it has to be odd.*Use 1 or 3"),
        ({"pool_size": 0}, ValueError, "pool_size is 0; it has to be a positive int"),
        ({"depths": [2, 2, 6]}, ValueError, "depths 3, hidden_sizes 4.*have to be equal"),
        ({"num_encoder_blocks": 3}, ValueError, "num_encoder_blocks is 3.*one number a stage"),
        ({"hidden_sizes": [64, 128, 320, 0]}, ValueError, "hidden_sizes is .*at least 1"),
        ({"hidden_sizes": 64}, TypeError, "hidden_sizes is 64; it has to be a list of ints"),
        ({"strides": [4, 2, 2, 2.0]}, TypeError, "strides is .*a list of ints"),
        ({"hidden_act": "gellu"}, ValueError, "hidden_act is 'gellu'.*'gelu'.*or a callable"),
        ({"hidden_act": 3}, TypeError, "hidden_act is a int"),
        ({"drop_path_rate": 1.0}, ValueError, "drop_path_rate is 1.0; .*below 1"),
        ({"drop_path_rate": "0.1"}, TypeError, "drop_path_rate is '0.1'; it has to be a number"),
        ({"mlp_ratio": 0.0}, ValueError, "mlp_ratio 0.0 times hidden_sizes"),
        ({"num_channels": -3}, ValueError, "num_channels is -3"),
        ({"num_labels": -1}, ValueError, "num_labels is -1; .*0: no classifier"),
        ({"num_labels": 3, "id2label": {0: "a"}}, ValueError, "num_labels is 3, but id2label"),
        ({"problem_type": "ranking"}, ValueError, "problem_type is 'ranking'.*'regression'"),
        ({"dtype": "float33"}, ValueError, "dtype is 'float33'; torch has no such dtype"),
        ({"hidden_size": 64}, TypeError, "hidden_size"),
    ],
)
def test_bad_values_are_refused(fields, error, words):
    with pytest.raises(error, match=words):
        PoolFormerConfig(**fields)


def test_other_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"no variant 's13'; there are s12, s24, s36, m36, m48"):
        PoolFormerConfig.from_variant("s13")
    with pytest.raises(ValueError, match="type 'vit'; it has to be 'poolformer'"):
        PoolFormerConfig.from_dict({"model_type": "vit"})
    with pytest.raises(TypeError, match=r"hidden_act is a callable.*set a name: 'gelu'"):
        tiny_config(hidden_act=torch.nn.functional.gelu).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=r"has no config.json; it has: nothing"):
        PoolFormerConfig.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file or folder /no/such/folder"):
        PoolFormerConfig.from_pretrained("/no/such/folder")
    text = json.dumps(tiny_config().to_dict())
    (tmp_path / "config.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"config.json is not valid JSON \(corrupt or truncated"):
        PoolFormerConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a JSON list; needed is an object"):
        PoolFormerConfig.from_pretrained(tmp_path)

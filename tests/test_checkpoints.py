"""Checkpoints: the three formats both ways, files of transformers and ours."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from model_cases import (
    Original,
    assert_same_tensors,
    hf_model,
    pair,
    randomize,
    relative_error,
    tiny_config,
    transformers_or_skip,
)

from poolformer_kernels.models.poolformer import (
    PoolFormerBackbone,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerModel,
    convert_state_dict,
)

Classifier = PoolFormerForImageClassification


def real_timm(name="poolformer_s12", **options):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):  # no time for first values
        model = timm.create_model(name, **options)
    return randomize(model.to_empty(device="cpu")).eval()


@pytest.fixture
def saved(tmp_path):
    """A folder that save_pretrained wrote, and its model."""
    pytest.importorskip("safetensors")
    model = randomize(Classifier(tiny_config()))
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", model


class TestFormats:
    def test_original_both_ways(self):
        config = tiny_config()
        original, ours = randomize(Original(config)).eval(), Classifier(config).eval()
        ours.load_state_dict(convert_state_dict(original.state_dict()))
        back = convert_state_dict(ours.state_dict(), to="original")
        assert_same_tensors(back, original.state_dict())
        x = torch.randn(2, 3, 48, 64)
        with torch.no_grad():
            assert relative_error(ours(x).logits, original(x)) <= 1e-5

    def test_timm_both_ways(self):
        timm = real_timm("poolformer_s12", num_classes=7)
        ours = Classifier(PoolFormerConfig.from_variant("s12", num_labels=7)).eval()
        ours.load_state_dict(convert_state_dict(timm.state_dict()))
        assert_same_tensors(convert_state_dict(ours.state_dict(), to="timm"), timm.state_dict())
        x = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            features = ours.poolformer(x).last_hidden_state
            assert relative_error(features, timm.forward_features(x)) <= 1e-5

    def test_transformers_both_ways(self):
        theirs, ours = pair(tiny_config())
        assert_same_tensors(convert_state_dict(theirs.state_dict()), theirs.state_dict())
        assert_same_tensors(dict(ours.state_dict()), dict(theirs.state_dict()))
        headless = theirs.poolformer.state_dict()
        prefixed = {f"poolformer.{key}": tensor for key, tensor in headless.items()}
        assert_same_tensors(convert_state_dict(headless, to="hf"), prefixed)

    def test_all_pairs_and_no_copies(self):
        state = Classifier(tiny_config()).state_dict()
        formats = {name: convert_state_dict(state, to=name) for name in ("hf", "original", "timm")}
        for source, tensors in formats.items():
            for to, expected in formats.items():
                result = convert_state_dict(tensors, to=to)
                assert_same_tensors(result, expected)
                assert result.keys() == convert_state_dict(tensors, to, source=source).keys()
                assert all(result[key] is expected[key] for key in expected)

    def test_backbone_norms_have_places_in_the_original(self):
        state = Original(tiny_config(), fork_feat=True).state_dict()
        ours = convert_state_dict(state)
        assert ours["out_norms.3.weight"] is state["norm6.weight"]
        assert_same_tensors(convert_state_dict(ours, to="original"), state)
        with pytest.raises(ValueError, match=r"no name for out_norms.0.weight, out_norms.0.bias"):
            convert_state_dict(ours, to="timm")

    def test_refusals(self):
        state = Classifier(tiny_config()).state_dict()
        with pytest.raises(ValueError, match="no format 'jax'; there are hf, original, timm"):
            convert_state_dict(state, to="jax")
        with pytest.raises(ValueError, match=r"no PoolFormer's parameters: got conv1.weight"):
            convert_state_dict({"conv1.weight": torch.ones(1)})
        state |= {"classifier.weight_g": torch.ones(1), "teacher.bias": torch.ones(1)}
        with pytest.raises(ValueError, match=r"no name for classifier.weight_g, teacher.bias"):
            convert_state_dict(state, to="original")

    def test_poolformer_v2_is_named(self):
        state = real_timm("poolformerv2_s12").state_dict()
        with pytest.raises(ValueError, match="those of a PoolFormerV2 or another MetaFormer"):
            convert_state_dict(state)


class TestFolders:
    @pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
    def test_own_round_trip(self, tmp_path, safe):
        if safe:
            pytest.importorskip("safetensors")
        model = randomize(Classifier(tiny_config(id2label={0: "cat", 1: "dog"})))
        model = model.to(torch.bfloat16).to(memory_format=torch.channels_last).train()
        model.save_pretrained(tmp_path / "a" / "b", safe_serialization=safe)
        weights = "model.safetensors" if safe else "pytorch_model.bin"
        names = sorted(entry.name for entry in (tmp_path / "a/b").iterdir())
        assert names == sorted(["config.json", weights])
        read = Classifier.from_pretrained(tmp_path / "a" / "b")
        assert_same_tensors(dict(read.state_dict()), dict(model.state_dict()))
        assert read.config == model.config and read.config.id2label[1] == "dog"
        assert model.training and not any(module.training for module in read.modules())
        assert all(p.requires_grad and p.is_leaf for p in read.parameters())
        wide = Classifier.from_pretrained(str(tmp_path / "a" / "b"), dtype="float32")
        assert wide.dtype == torch.float32 and wide.config.dtype == "float32"
        assert torch.equal(wide.norm.weight, read.norm.weight.float())

    @pytest.mark.parametrize("name", ["PoolFormerForImageClassification", "PoolFormerModel"])
    def test_transformers_reads_ours(self, tmp_path, name):
        transformers = transformers_or_skip()
        kind = {"PoolFormerModel": PoolFormerModel}.get(name, Classifier)
        ours = randomize(kind(tiny_config())).eval()
        ours.save_pretrained(tmp_path)
        theirs, info = getattr(transformers, name).from_pretrained(
            tmp_path, output_loading_info=True
        )
        assert not any(info.values()), info
        assert_same_tensors(dict(theirs.state_dict()), dict(ours.state_dict()))
        assert theirs.config.architectures == [name]
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            assert relative_error(ours(x)[0], theirs(x)[0]) <= 1e-5

    @pytest.mark.parametrize("shards", [None, "20KB"], ids=["one file", "shards"])
    @pytest.mark.parametrize("name", ["PoolFormerForImageClassification", "PoolFormerModel"])
    def test_we_read_theirs(self, tmp_path, name, shards):
        theirs = hf_model(tiny_config(drop_path_rate=0.25), name)
        theirs.save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
        assert (tmp_path / "model.safetensors.index.json").exists() == bool(shards)
        kind = {"PoolFormerModel": PoolFormerModel}.get(name, Classifier)
        ours = kind.from_pretrained(tmp_path)
        assert_same_tensors(dict(ours.state_dict()), dict(theirs.state_dict()))
        assert ours.config.drop_path_rate == 0.25
        assert ours.config.num_labels == theirs.config.num_labels == 5

    def test_without_the_head(self, saved):
        folder, model = saved
        headless = PoolFormerModel.from_pretrained(folder)
        assert_same_tensors(dict(headless.state_dict()), dict(model.poolformer.state_dict()))
        backbone = PoolFormerBackbone.from_pretrained(folder, out_indices=(0, 2))
        assert_same_tensors(
            dict(backbone.poolformer.state_dict()), dict(model.poolformer.state_dict())
        )
        assert torch.equal(backbone.out_norms["2"].weight, torch.ones(16))
        with torch.no_grad():
            backbone.out_norms["2"].weight.fill_(0.5)
        backbone.save_pretrained(folder.parent / "backbone")
        again = PoolFormerBackbone.from_pretrained(folder.parent / "backbone")
        assert again.out_indices == (0, 2)
        assert_same_tensors(dict(again.state_dict()), dict(backbone.state_dict()))

    def test_the_other_file_is_not_shadowed(self, saved):
        folder, model = saved
        with pytest.raises(FileExistsError, match=r"holds model.safetensors, which would be"):
            model.save_pretrained(folder, safe_serialization=False)
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]

    def test_a_failed_save_leaves_what_was_there(self, saved, monkeypatch):
        folder, model = saved
        before = (folder / "model.safetensors").read_bytes()

        def fail(tensors, path, metadata):
            path.write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr("safetensors.torch.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            randomize(model, seed=2).save_pretrained(folder)
        assert (folder / "model.safetensors").read_bytes() == before
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]

    def test_a_folder_over_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(FileExistsError):
            Classifier(tiny_config()).save_pretrained(tmp_path / "file")


class TestFiles:
    """One weights file, whose architecture is read from the shapes."""

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_original(self, tmp_path, wrapped):
        original = randomize(Original(PoolFormerConfig.from_variant("s12", num_labels=6)))
        state = dict(original.state_dict())
        if wrapped:  # as training writes it
            state = {
                "epoch": 3,
                "args": argparse.Namespace(lr=0.1),
                "state_dict": {f"module.{key}": tensor for key, tensor in state.items()},
            }
        torch.save(state, tmp_path / "poolformer_s12.pth.tar")
        ours = Classifier.from_pretrained(tmp_path / "poolformer_s12.pth.tar")
        assert ours.config == PoolFormerConfig.from_variant("s12", num_labels=6, dtype="float32")
        back = convert_state_dict(ours.state_dict(), to="original")
        assert_same_tensors(back, dict(original.state_dict()))

    def test_timm_with_a_warning_about_its_head(self, tmp_path):
        safetensors = pytest.importorskip("safetensors.torch")
        timm = real_timm("poolformer_s36", num_classes=4)
        path = tmp_path / "model.safetensors"
        safetensors.save_file(timm.state_dict(), path)
        with pytest.warns(UserWarning, match="pools before it normalises"):
            ours = Classifier.from_pretrained(path)
        assert ours.config.layer_scale_init_value == 1e-6 and ours.config.num_labels == 4
        assert_same_tensors(convert_state_dict(ours.state_dict(), to="timm"), timm.state_dict())
        PoolFormerModel.from_pretrained(path)  # has no head, so there is nothing to warn of
        fields = {"architecture": "poolformer_s36", "num_classes": 4, "pretrained_cfg": {}}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        with pytest.warns(UserWarning, match="pools before it normalises"):
            assert Classifier.from_pretrained(tmp_path).config == ours.config

    def test_unpublished_shapes(self, tmp_path):
        config = tiny_config(mlp_ratio=3.0, use_layer_scale=False, num_channels=2)
        model = randomize(Classifier(config))
        torch.save(model.state_dict(), tmp_path / "model.pt")
        ours = Classifier.from_pretrained(tmp_path / "model.pt")
        assert_same_tensors(dict(ours.state_dict()), dict(model.state_dict()))
        assert ours.config.depths == [1, 2, 2, 1] and ours.config.mlp_ratio == 3.0

    def test_shapes_that_do_not_tell(self, tmp_path):
        config = tiny_config(patch_sizes=[5, 3, 3, 3], pool_size=5)
        torch.save(Classifier(config).state_dict(), tmp_path / "model.pt")
        with pytest.raises(ValueError, match=r"cannot be read from these shapes.*Pass config="):
            Classifier.from_pretrained(tmp_path / "model.pt")
        ours = Classifier.from_pretrained(tmp_path / "model.pt", config=config)
        assert ours.config.pool_size == 5 and ours.config is not config

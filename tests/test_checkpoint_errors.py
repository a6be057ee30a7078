"""Checkpoints that do not fit, are broken, or cannot be had: what is said of them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from model_cases import (
    assert_same_tensors,
    hf_model,
    randomize,
    tiny_config,
)

from poolformer_kernels.models.poolformer import (
    PoolFormerForImageClassification,
    PoolFormerModel,
)

Classifier = PoolFormerForImageClassification


@pytest.fixture
def saved(tmp_path):
    """A folder that save_pretrained wrote, and its model."""
    pytest.importorskip("safetensors")
    model = randomize(Classifier(tiny_config()))
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", model


class TestMisfits:
    def test_all_are_named(self, saved):
        folder, model = saved
        state = dict(model.state_dict())
        removed = ["norm.bias", "poolformer.encoder.block.1.1.output.conv1.weight"]
        for key in removed:
            del state[key]
        state["poolformer.encoder.block.9.0.layer_scale_1"] = torch.ones(3)
        state["ema.decay"] = torch.ones(1)
        wide = "poolformer.encoder.block.0.0.layer_scale_2"
        state[wide] = torch.ones(9)
        torch.save(state, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="does not fit") as error:
            Classifier.from_pretrained(folder)
        text = str(error.value)
        missing = text[text.index("missing") : text.index("unexpected")]
        assert all(key in missing for key in removed) and "layer_scale" not in missing
        assert "block.9.0.layer_scale_1, ema.decay" in text
        assert f"of another shape: {wide} ((9,) there, (8,) in the model)" in text
        assert "strict=False" in text and "ignore_mismatched_sizes=True" in text
        with pytest.raises(ValueError, match="of another shape"):
            Classifier.from_pretrained(folder, strict=False)
        with pytest.warns(UserWarning, match=r"New first values: norm.bias, ") as warned:
            ours = Classifier.from_pretrained(folder, strict=False, ignore_mismatched_sizes=True)
        assert "ema.decay" in str(warned[0].message)
        assert torch.equal(ours.norm.bias, torch.zeros(20))
        assert torch.equal(ours.get_parameter(wide), torch.full((8,), 1e-5))
        assert 0.015 < ours.get_parameter(removed[1]).std() < 0.025
        kept = {k: t for k, t in ours.state_dict().items() if k not in (*removed, wide)}
        assert_same_tensors(kept, {key: model.state_dict()[key] for key in kept})

    @pytest.mark.parametrize("num_labels", [3, 0])
    def test_another_number_of_labels(self, saved, num_labels):
        folder, model = saved
        with pytest.raises(ValueError, match=r"(?s)num_labels [03] .*ignore_mismatched_sizes=True"):
            Classifier.from_pretrained(folder, num_labels=num_labels)
        with pytest.warns(UserWarning, match=r"classifier.weight \(\(5, 20\) there"):
            ours = Classifier.from_pretrained(
                folder, num_labels=num_labels, ignore_mismatched_sizes=True
            )
        assert ours.config.num_labels == num_labels == len(ours.config.id2label)
        assert ours(torch.randn(1, 3, 32, 32)).logits.shape == (1, num_labels or 20)
        assert_same_tensors(dict(ours.norm.state_dict()), dict(model.norm.state_dict()))
        same = Classifier.from_pretrained(folder, num_labels=5)
        assert_same_tensors(dict(same.state_dict()), dict(model.state_dict()))

    def test_a_classifier_from_a_headless_checkpoint(self, tmp_path):
        randomize(PoolFormerModel(tiny_config())).save_pretrained(
            tmp_path, safe_serialization=False
        )
        with pytest.raises(ValueError, match=r"missing: norm.weight, norm.bias, classifier.weight"):
            Classifier.from_pretrained(tmp_path)
        with pytest.warns(UserWarning, match=r"New first values: classifier.bias"):
            Classifier.from_pretrained(tmp_path, strict=False)

    def test_dtypes(self, tmp_path):
        model = Classifier(tiny_config())
        model.norm.half()
        model.save_pretrained(tmp_path, safe_serialization=False)
        with pytest.raises(ValueError, match=r"mixes torch.float16, torch.float32; pass dtype="):
            Classifier.from_pretrained(tmp_path)
        ours = Classifier.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
        for wrong in ("float31", torch.int8):
            with pytest.raises(TypeError, match=r"it has to be a floating point torch.dtype"):
                Classifier.from_pretrained(tmp_path, dtype=wrong)


class TestBroken:
    @pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
    def test_truncated_safetensors(self, saved, keep):
        folder, _ = saved
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: int(len(content) * keep)])
        with pytest.raises(ValueError, match=r"model.safetensors .*corrupt or truncated"):
            Classifier.from_pretrained(folder)

    @pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_truncated_pickle(self, tmp_path, keep, zipped):
        path = tmp_path / "model.pth"
        state = Classifier(tiny_config()).state_dict()
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])
        with pytest.raises(ValueError, match=r"model.pth .*corrupt, truncated or holds"):
            Classifier.from_pretrained(path)

    def test_code_is_not_run(self, tmp_path):
        class Payload:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        torch.save({"norm.weight": Payload()}, tmp_path / "model.pth")
        with pytest.raises(ValueError, match=r"Python objects besides tensors"):
            Classifier.from_pretrained(tmp_path / "model.pth")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ([torch.ones(1)], "holds a list; needed is a state dict"),
            ({}, "holds an empty dict"),
            ({"norm.weight": torch.ones(1), "epoch": 3}, "entries that are no tensors: epoch"),
        ],
    )
    def test_no_state_dict(self, tmp_path, content, words):
        torch.save(content, tmp_path / "model.pth")
        with pytest.raises(ValueError, match=words):
            Classifier.from_pretrained(tmp_path / "model.pth")

    def test_git_lfs_pointer(self, saved):
        folder, _ = saved
        (folder / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 47\n"
        )
        with pytest.raises(ValueError, match=r"Git LFS pointer.*git lfs pull"):
            Classifier.from_pretrained(folder)

    def test_folders_that_lack_files(self, saved):
        folder, _ = saved
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
        with pytest.raises(FileNotFoundError, match=r"no model.safetensors or .*it has: config"):
            Classifier.from_pretrained(folder)
        (folder / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"no config.json; it has: weights.safe"):
            Classifier.from_pretrained(folder)
        Classifier.from_pretrained(folder / "weights.safetensors")

    def test_shards(self, tmp_path):
        theirs = hf_model(tiny_config())
        theirs.save_pretrained(tmp_path, max_shard_size="20KB")
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        shard = tmp_path / index["weight_map"]["norm.weight"]
        shutil.move(shard, tmp_path / "elsewhere")
        with pytest.raises(FileNotFoundError, match=f"has no {shard.name}"):
            Classifier.from_pretrained(tmp_path)
        shutil.move(tmp_path / "elsewhere", shard)
        for weight_map, words in (
            ({"norm.weight": "../secret.safetensors"}, "needed are names without folders"),
            ({"norm.wait": shard.name}, "do not hold norm.wait"),
            ({}, "has no weight_map"),
        ):
            (tmp_path / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": weight_map})
            )
            with pytest.raises(ValueError, match=words):
                Classifier.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        "name",
        ["/no/folder", "./no", "~/no/folder", "no/model.safetensors", "poolformer_s12.pth.tar"],
    )
    def test_paths_that_are_not_there(self, name):
        with pytest.raises(FileNotFoundError, match=r"There is no file or folder .*check the path"):
            Classifier.from_pretrained(name)

    @pytest.mark.parametrize("name", ["sail/poolformer_s12", "s12", "poolformer_s12.sail_in1k"])
    def test_hub_out_of_reach(self, tmp_path, name):
        pytest.importorskip("huggingface_hub")
        with pytest.raises(FileNotFoundError, match=r"hub is out of reach.*config.json.*pass the"):
            Classifier.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)

    @pytest.mark.parametrize("name", ["a/b/c", "what is this"])
    def test_names_that_no_repository_has(self, name):
        pytest.importorskip("huggingface_hub")
        with pytest.raises(FileNotFoundError, match="neither a local folder nor a name"):
            Classifier.from_pretrained(name, local_files_only=True)


class TestHub:
    def test_cached_snapshot(self, saved, tmp_path):
        """What the hub's cache holds is read without a network."""
        pytest.importorskip("huggingface_hub")
        folder, model = saved
        commit = "0123456789abcdef0123456789abcdef01234567"
        repository = tmp_path / "cache" / "models--sail--poolformer_s12"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        shutil.copy(folder / "config.json", snapshot)
        torch.save(model.state_dict(), snapshot / "pytorch_model.bin")
        for name in ("s12", "sail/poolformer_s12"):
            ours = Classifier.from_pretrained(
                name, cache_dir=tmp_path / "cache", local_files_only=True
            )
            assert_same_tensors(dict(ours.state_dict()), dict(model.state_dict()))
        with pytest.raises(FileNotFoundError, match="out of reach"):
            Classifier.from_pretrained(
                "s12", revision="other", cache_dir=tmp_path / "cache", local_files_only=True
            )

    def test_a_missing_package_is_named(self, saved, monkeypatch):
        import sys

        folder, _ = saved
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(ImportError, match="needs huggingface_hub: pip install huggingface_hub"):
            Classifier.from_pretrained("sail/poolformer_s12")
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(ImportError, match="needs safetensors: pip install safetensors"):
            Classifier.from_pretrained(folder)

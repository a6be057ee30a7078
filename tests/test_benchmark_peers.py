"""Other engines beside ours: their results, and why they are left out where they are."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import bench_model, bench_training, peers, training
from benchmarks.models import CONTENDERS, Setting, Unavailable, exact_logits
from benchmarks.report import read_csv

pytestmark = pytest.mark.usefixtures("threads")  # --threads sets them
SMALL = ["--image-size", "32", "--rounds", "1", "--threads", "1", "--no-memory"]


@pytest.fixture
def tiny(tiny_checkpoint: str) -> Setting:
    return Setting(checkpoint=tiny_checkpoint)


@pytest.mark.parametrize(
    ("name", "package", "dtype"),
    [
        ("OpenVINO", "openvino", "float32"),
        ("OpenVINO", "openvino", "bfloat16"),
        ("ONNX Runtime", "onnxruntime", "float32"),
    ],
)
def test_an_engine_computes_the_model_at_every_batch_size(tiny, name, package, dtype):
    pytest.importorskip(package)
    setting = replace(tiny, dtype=dtype)
    forward = CONTENDERS[name](setting)
    for batch in (1, 3, 1):
        pixels = torch.randn(batch, 3, 64, 64)
        exact = exact_logits(setting, pixels)
        error = (forward(setting.pixels(pixels)).double() - exact).abs().max()
        assert error <= 20 * torch.finfo(getattr(torch, dtype)).eps * exact.abs().max()


@pytest.mark.slow
def test_freezing_computes_the_model(tiny):
    setting = replace(tiny, layout="nhwc")
    pixels = torch.randn(2, 3, 64, 64)
    exact = exact_logits(setting, pixels)
    logits = CONTENDERS["torch.compile, freezing"](setting)(setting.pixels(pixels))
    assert (logits.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("OpenVINO", {"dtype": "float16"}, "entered for float32 and bfloat16, not float16"),
        ("ONNX Runtime", {"dtype": "bfloat16"}, "entered for float32, not bfloat16"),
        ("ONNX Runtime", {"layout": "nhwc"}, "entered once, for nchw"),
        ("OpenVINO", {"device": "cuda"}, "entered for CPUs"),
        ("torch.compile, freezing", {"device": "cuda"}, "for CPUs"),
    ],
)
def test_an_engine_says_why_it_is_not_entered(tiny, name, change, reason):
    with pytest.raises(Unavailable, match=reason):
        CONTENDERS[name](replace(tiny, **change))


@pytest.mark.parametrize(
    ("name", "package", "reason"),
    [
        ("OpenVINO", "openvino", "pip install openvino"),
        ("ONNX Runtime", "onnxruntime", "pip install onnxruntime"),
        ("zentorch", "zentorch", "zentorch does not load"),
    ],
)
def test_an_engine_that_is_not_installed(tiny, monkeypatch, name, package, reason):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Unavailable, match=reason):
        CONTENDERS[name](tiny)


def test_bench_model_enters_engines_once(tmp_path: Path, tiny, capsys, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr(bench_model, "PEERS", ("OpenVINO", "zentorch"))
    monkeypatch.setitem(sys.modules, "zentorch", None)
    arguments = [*SMALL, "--checkpoint", tiny.checkpoint, "--batches", "2", "--peers"]
    assert bench_model.main([*arguments, "--image-size", "64", "--out", str(tmp_path)]) == 0
    names = [row["contender"] for row in read_csv(tmp_path / "model.csv")]
    assert names.count("OpenVINO, nchw") == 1 and "OpenVINO, nhwc" not in names
    printed = capsys.readouterr().out
    assert "without zentorch: " in printed and "without OpenVINO" not in printed


def test_all_peers_are_contenders():
    assert set(peers.PEERS) <= CONTENDERS.keys()


TRAINING = [*SMALL, "--batches", "2", "--contenders", "eager", "accelerated"]


def test_bench_training(tmp_path: Path):
    assert bench_training.main([*TRAINING, "--out", str(tmp_path)]) == 0
    rows = read_csv(tmp_path / "training.csv")
    assert len(rows) == 2 * 2 * 2 and {row["dtype"] for row in rows} == set(training.MODES)
    assert all(0 < row["error"] < 0.1 and row["median_ms"] > 0 for row in rows)
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_wrong_gradients_are_not_timed(tmp_path: Path, capsys, monkeypatch):
    right = training.Trainer.check

    def wrong(self, batch):
        loss, gradient = right(self, batch)
        return [loss, gradient * 1.001]

    monkeypatch.setattr(training.Trainer, "check", wrong)
    assert bench_training.main([*TRAINING, "--modes", "float32", "--out", str(tmp_path)]) == 1
    assert "WRONG: eager, nchw, variant s12" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_step_trains():
    setting = Setting("s12")
    trainer = training.Trainer("own model", setting, "float32")
    batch = training.random_batch(2, 32, 1000, torch.Generator().manual_seed(0))
    losses = [trainer.step(batch).item() for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]

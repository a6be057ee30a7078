"""examples.train: its steps on one process and on two, kills and resumes, bad data, its demo."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import assert_same_tensors

pytest.importorskip("timm")
pytest.importorskip("tqdm")
if not torch.distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

import numpy as np
from PIL import Image
from safetensors.torch import load_file
from train_worker import PLAIN

from examples import train, trainer
from examples.logs import read_rows
from poolformer_kernels import PoolFormerConfig, PoolFormerForImageClassification, use_backend

WORKER = str(Path(__file__).with_name("train_worker.py"))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
IMAGES, CLASSES, BATCH = 10, ("cat", "dog"), 4  # of each class; five steps an epoch


def write_images(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("val", 3)):
        for label in CLASSES:
            (folder / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(0, 256, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{index}.png")
    return folder


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)  # as the processes of torchrun


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    PoolFormerConfig(
        depths=[1, 2, 1, 1],
        hidden_sizes=[8, 16, 8, 8],
        layer_scale_init_value=0.7,
        initializer_range=0.2,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(data: Path, config: Path) -> list[str]:
    """Two epochs of five steps, with all of the recipe, logged step by step."""
    return [
        *(str(data), "--model", str(config), "--image-size", "32", "--batch-size", str(BATCH)),
        *("--epochs", "2", "--warmup-epochs", "1", "--cooldown-epochs", "0", "--lr", "2"),
        *("--workers", "0", "--ema", "--ema-decay", "0.8", "--log-every", "1"),
        *("--checkpoint-every", "3"),
    ]


@pytest.fixture
def command(recipe: list[str], tmp_path: Path) -> list[str]:
    return [*recipe, "--out", str(tmp_path / "out")]


@pytest.fixture(scope="module")
def two_processes(
    recipe: list[str], tmp_path_factory: pytest.TempPathFactory, run_python: Callable[..., Any]
) -> Path:
    """The runs of train_worker.py, all in one pair of processes, and one that replaces it."""
    folder = tmp_path_factory.mktemp("two")
    program = (*TORCHRUN, "--max-restarts", "1", WORKER, str(folder), *recipe)
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    done = run_python(*program, **environment)
    assert done.returncode == 0, done.stderr
    return folder


def rows(folder: Path, name: str = "steps") -> list[dict[str, str]]:
    """What a run logged, but for what depends on the clock."""
    clock = {"images_per_s", "train_s"}
    found = read_rows(folder / f"{name}.csv")
    return [{key: row[key] for key in row.keys() - clock} for row in found]


def losses(folder: Path) -> list[float]:
    return [float(row["loss"]) for row in rows(folder)]


def run(command: list[str], *options: str) -> Path:
    """A run in this process that has to succeed; its folder."""
    command = [*command, *options]
    assert train.main(command) == 0
    return Path(command[len(command) - 1 - command[::-1].index("--out") + 1])


def test_two_processes_train_as_one(command: list[str], two_processes: Path) -> None:
    """The same images, augmented the same way, give the same losses and the same scores."""
    alone, two = run(command, *PLAIN), two_processes / "ddp"
    assert losses(two) == pytest.approx(losses(alone), rel=1e-4)
    for ours, expected in zip(rows(two, "epochs"), rows(alone, "epochs"), strict=True):
        for key, value in expected.items():
            assert float(ours[key]) == pytest.approx(float(value), rel=1e-4), key
    sharded = two_processes / "fsdp"
    assert losses(sharded) == pytest.approx(losses(alone), rel=3e-2)
    assert losses(sharded) != pytest.approx(losses(alone), rel=1e-4), "it is not in bfloat16"


def assert_same_run(out: Path, whole: Path) -> None:
    """Two epochs with the same bits in every number and weight."""
    assert rows(out) == rows(whole) and len(rows(out)) == 10
    assert rows(out, "epochs") == rows(whole, "epochs")
    for name in ("best", "last"):
        ours, expected = (load_file(folder / name / "model.safetensors") for folder in (out, whole))
        assert_same_tensors(ours, expected)


def test_torchrun_restarts_a_killed_run_as_if_it_had_not_been(two_processes: Path) -> None:
    """kill -9 of one of two processes in FSDP2, two steps after a checkpoint in mid-epoch."""
    left = two_processes / "left"
    assert 6 < len(rows(left)) < 9
    assert {path.name for path in (left / "checkpoints").iterdir()} == {"step-5", "step-6"}
    assert_same_run(two_processes / "killed", two_processes / "whole")


def test_restarts_that_would_meet_the_dead_are_refused(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert train.main(command) == 2
    assert "Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capfd.readouterr().err


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In DDP, in the second epoch, two steps after a checkpoint.

    Images are loaded by another process, for they would seed what the steps draw in this one.
    """
    command = [*command, "--workers", "1"]
    step = trainer.Trainer.train_step

    def until_interrupted(self: trainer.Trainer, batch: Any) -> torch.Tensor:
        if self.step == 8:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(trainer.Trainer, "train_step", until_interrupted)
        train.main(command)
    out = tmp_path / "out"
    assert [int(row["step"]) for row in rows(out)] == list(range(1, 9))
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-5", "step-6"}
    run(command, "--resume")
    assert_same_run(out, run(command, "--out", str(tmp_path / "whole")))


def test_fused_and_eager_train_alike(command: list[str], tmp_path: Path) -> None:
    fused = run(command, "--epochs", "1")
    eager = run(command, "--epochs", "1", "--no-fused", "--out", str(tmp_path / "eager"))
    assert losses(eager) == pytest.approx(losses(fused), rel=1e-4)
    assert losses(eager) != losses(fused), "one of them is the other"


@pytest.mark.parametrize("model", ["transformers:{}", "timm:poolformer_s12"])
def test_models_of_other_libraries(
    command: list[str], config: Path, tmp_path: Path, model: str
) -> None:
    if model.startswith("transformers"):
        pytest.importorskip("transformers")
    out = run(command, "--model", model.format(config), "--epochs", "1", "--batch-size", "20")
    assert len(losses(out)) == 1 and math.isfinite(losses(out)[0])
    assert (out / "last" / "model.safetensors").exists()


def test_its_models_load_with_their_classes(command: list[str], data: Path) -> None:
    out = run(command, "--epochs", "1", "--workers", "1", "--dtype", "float16")
    model = PoolFormerForImageClassification.from_pretrained(out / "last")
    assert model.config.id2label == dict(enumerate(CLASSES))
    again = run(
        command, "--weights", str(out / "last"), "--out", str(out / "again"), "--epochs", "1"
    )
    assert losses(again) != losses(out)
    with use_backend("torch"):
        assert model(torch.randn(1, 3, 32, 32)).logits.shape == (1, 2)


def test_corrupt_images_are_left_out_counted_and_named(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = write_images(tmp_path / "broken")
    whole = (broken / "train" / "cat" / "0.png").read_bytes()
    (broken / "train" / "cat" / "3.png").write_bytes(whole[:900])
    (broken / "train" / "dog" / "1.png").write_bytes(b"")
    (broken / "val" / "dog" / "2.png").write_text("no image")
    out = run([str(broken), *command[1:]])
    assert [row["corrupt"] for row in rows(out, "epochs")] == ["3", "3"]
    printed = capsys.readouterr().out
    assert (
        "3 images could not be read and were left out: cat/3.png, dog/1.png, dog/2.png" in printed
    )
    assert {float(row["top1"]) * 5 % 1 for row in rows(out, "epochs")} == {0.0}, "of five images"


def test_too_many_corrupt_images_stop_it(command: list[str], tmp_path: Path) -> None:
    broken = write_images(tmp_path / "broken")
    for path in broken.glob("train/*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(OSError, match=r"10 images in a row cannot be read, from .*\.png on"):
        train.main([str(broken), *command[1:]])


def remove(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.unlink()


BAD = [
    (lambda folder: folder.rename(folder.with_name("moved")), (), "is no folder. Images are"),
    (
        lambda folder: (folder / "val").rename(folder / "test"),
        (),
        "there is no folder .*holds test",
    ),
    (lambda folder: (folder / "val" / "cat").rename(folder / "val" / "cow"), (), "cat, cow"),
    (lambda folder: remove(folder / "val"), (), "holds folders, but no image"),
    (lambda folder: None, ("--batch-size", "64"), "has 20 training images, fewer than"),
    (lambda folder: None, ("--batch-size", "5"), "a positive multiple of 2"),
    (lambda folder: None, ("--model", "s13"), "there is no variant 's13'"),
    (lambda folder: None, ("--model", "timm:poolformer_s13"), "timm:poolformer_s13"),
    (lambda folder: None, ("--log-every", "0"), "--log-every is 0"),
]


@pytest.mark.parametrize(("spoil", "options", "message"), BAD)
def test_what_cannot_be_used_is_named(
    command: list[str], tmp_path: Path, capfd: Any, spoil: Any, options: Any, message: str
) -> None:
    spoil(write_images(tmp_path / "data"))
    assert train.main([str(tmp_path / "data"), *command[1:], *options]) == 2
    error = capfd.readouterr().err
    assert error.startswith("train: ") and re.search(message, error), error


def test_a_run_is_not_overwritten_nor_resumed_as_another(command: list[str], capfd: Any) -> None:
    run(command, "--epochs", "1")
    assert train.main(command) == 2
    assert "holds a run at step 5. --resume goes on with it" in capfd.readouterr().err
    assert train.main([*command, "--resume", "--seed", "7"]) == 2
    assert "--seed is 7, and the run in" in capfd.readouterr().err


def test_an_infinite_loss_stops_it(command: list[str]) -> None:
    with pytest.raises(FloatingPointError, match="Lower --lr"), warnings.catch_warnings():
        train.main([*command, "--lr", "1e30", "--warmup-epochs", "0"])


def test_a_data_set_of_hugging_face(command: list[str], data: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    out = run([f"hfds/{data}", *command[1:]], "--val-split", "validation", "--epochs", "1")
    assert losses(out) and rows(out, "epochs")[0]["corrupt"] == "0"


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    from examples import digits

    few = digits.load_digits()
    few.images, few.target = few.images[:400], few.target[:400]
    monkeypatch.setattr(digits, "load_digits", lambda: few)

    assert digits.main(["--epochs", "1", "--out", str(tmp_path)]) == 1  # far from 97 %
    with Image.open(tmp_path / "curves.png") as image:
        assert min(image.size) > 300
    fused, eager = (losses(tmp_path / name) for name in ("fused", "eager"))
    assert fused == pytest.approx(eager, rel=1e-3)

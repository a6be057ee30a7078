"""Accelerated models inside transformers' own parts: Auto classes, pipelines, Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BACKENDS
from model_cases import hf_model, randomize, tiny_config, transformers_or_skip
from torch import Tensor
from torch.utils.data import Dataset

import poolformer_kernels as pk

transformers = transformers_or_skip()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and its image processor, as a user has downloaded it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    hf_model(tiny_config()).save_pretrained(folder)
    size = {"shortest_edge": 32}
    processor = transformers.PoolFormerImageProcessor(
        size=size, crop_size={"height": 32, "width": 32}
    )
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pipeline_of_an_auto_model(checkpoint: Path, backend: str) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = torch.randint(256, (40, 52, 3), dtype=torch.uint8).numpy()
    pictures = [image.fromarray(pixels), image.fromarray(pixels[::-1].copy())]
    stock = transformers.pipeline("image-classification", model=str(checkpoint))
    model = transformers.AutoModelForImageClassification.from_pretrained(checkpoint)
    processor = transformers.AutoImageProcessor.from_pretrained(checkpoint)
    fused = transformers.pipeline(
        "image-classification", model=pk.accelerate(model, backend), image_processor=processor
    )
    assert len(pk.report(fused.model).fused) == 6
    for ours, theirs in zip(fused(pictures), stock(pictures), strict=True):
        assert [answer["label"] for answer in ours] == [answer["label"] for answer in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert a["score"] == pytest.approx(b["score"], rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_auto_classes_load_what_our_models_save(backend: str, tmp_path: Path) -> None:
    """Under model_type "poolformer" the Auto classes have transformers' own model, as a rule."""
    ours = randomize(pk.PoolFormerForImageClassification(tiny_config())).eval()
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(theirs) is transformers.PoolFormerForImageClassification
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = pk.accelerate(theirs, backend)(pixels).logits
        torch.testing.assert_close(ours(pixels).logits, expected, rtol=1e-4, atol=1e-4)


class Images(Dataset[dict[str, Tensor]]):
    """A few images of noise with their labels."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.pixels = torch.randn(12, 3, 32, 32, generator=generator)
        self.labels = torch.randint(5, (12,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def trainer(model: Any, folder: Path, **options: Any) -> Any:
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=3,
        learning_rate=1e-3,
        logging_steps=1,
        seed=7,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"max_steps": 4, "save_strategy": "no"} | options,
    )
    return transformers.Trainer(model, arguments, train_dataset=Images(), eval_dataset=Images())


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def small_model(drop_path: float = 0.2) -> Any:
    return randomize(hf_model(tiny_config(drop_path_rate=drop_path)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_trainer_has_the_losses_of_eager(
    backend: str, options: dict[str, Any], tmp_path: Path
) -> None:
    results = []
    for name in (None, backend):
        model = small_model()
        run = trainer(model if name is None else pk.accelerate(model, name), tmp_path, **options)
        run.train()
        results.append([*losses(run), run.evaluate()["eval_loss"]])
    assert len(results[0]) == 5
    assert results[1] == pytest.approx(results[0], rel=2e-2 if options else 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_trainer_resumes_from_its_checkpoint(backend: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(pk.accelerate(small_model(), backend), tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(pk.accelerate(small_model(), backend), tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)
    last = tmp_path / "again" / "checkpoint-4"
    stock = transformers.AutoModelForImageClassification.from_pretrained(last).eval()
    pixels = Images().pixels
    with torch.inference_mode():
        expected = resumed.model.eval()(pixels).logits
        torch.testing.assert_close(stock(pixels).logits, expected, rtol=1e-4, atol=1e-4)
        own = pk.PoolFormerForImageClassification.from_pretrained(last).eval()
        torch.testing.assert_close(own(pixels).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_is_refused_as_by_the_stock_model() -> None:
    for model in (small_model(), pk.accelerate(small_model())):
        with pytest.raises(ValueError, match=r"not support (gradient|activation) check"):
            model.gradient_checkpointing_enable()

"""Models as contenders. To add one, write a function below `contender("its name")`.

The function gets a Setting and returns the forward, logits of (B, 3, H, W); it raises Unavailable
where it cannot run. `setting.eager()` is a fresh model to start from: transformers' where it is
installed, else ours in plain PyTorch, in the setting's dtype, layout and device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import poolformer_kernels
from poolformer_kernels import PoolFormerConfig, PoolFormerForImageClassification, backends

from .op_cases import DTYPES, LAYOUTS

try:
    import transformers
    from transformers import PoolFormerConfig as TheirConfig
    from transformers import PoolFormerForImageClassification as TheirModel
except ImportError:
    transformers = None  # type: ignore[assignment]

Forward = Callable[[Tensor], Tensor]
EAGER_SOURCE = (
    "PoolFormer in plain PyTorch (transformers is not installed)"
    if transformers is None
    else f"transformers {transformers.__version__}"
)


class Unavailable(RuntimeError):
    """A contender cannot run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What every contender of a comparison has in common, and its layout."""

    variant: str = "s12"
    dtype: str = "float32"
    layout: str = "nchw"
    device: str = "cpu"
    checkpoint: str | None = None

    def eager(self) -> nn.Module:
        """A fresh model of the baseline's kind, in eval mode."""
        return self.place(as_eager(weights(self.variant, self.checkpoint)))

    def own(self) -> nn.Module:
        """A fresh PoolFormerForImageClassification of this package."""
        model = weights(self.variant, self.checkpoint)
        return self.place(copy_of(model))

    def place(self, model: nn.Module) -> nn.Module:
        model = model.to(self.device, DTYPES[self.dtype]).eval()
        return model.to(memory_format=LAYOUTS[self.layout])

    def pixels(self, values: Tensor) -> Tensor:
        """(B, 3, H, W) in the setting's dtype, device and layout."""
        return values.to(self.device, DTYPES[self.dtype]).contiguous(
            memory_format=LAYOUTS[self.layout]
        )


CONTENDERS: dict[str, Callable[[Setting], Forward]] = {}


def contender(name: str) -> Callable[[Callable[[Setting], Forward]], Callable[[Setting], Forward]]:
    def enter(build: Callable[[Setting], Forward]) -> Callable[[Setting], Forward]:
        CONTENDERS[name] = build
        return build

    return enter


@contender("eager")
def eager(setting: Setting) -> Forward:
    return logits_of(setting.eager())


@contender("accelerated")
def accelerated(setting: Setting) -> Forward:
    return logits_of(poolformer_kernels.accelerate(setting.eager()))


@contender("own model")
def own_model(setting: Setting) -> Forward:
    return logits_of(setting.own())


@contender("torch.compile")
def compiled(setting: Setting) -> Forward:
    return logits_of(torch.compile(setting.eager()))


@contender("accelerated, torch.compile")
def accelerated_and_compiled(setting: Setting) -> Forward:
    return logits_of(torch.compile(poolformer_kernels.accelerate(setting.eager())))


def _accelerated_with(backend: str) -> None:
    @contender(f"accelerated ({backend})")
    def build(setting: Setting) -> Forward:
        try:
            return logits_of(poolformer_kernels.accelerate(setting.eager(), backend))
        except backends.BackendUnavailable as error:
            raise Unavailable(str(error)) from error


for _backend in backends.PREFERENCE:
    _accelerated_with(_backend)

DEFAULT = ("eager", "accelerated", "own model")


def logits_of(model: Callable[..., Any]) -> Forward:
    return torch.inference_mode()(lambda pixels: model(pixels).logits)


def exact_logits(setting: Setting, pixels: Tensor) -> Tensor:
    """float64 logits of the baseline's model, with parameters and pixels rounded to the dtype."""
    model = setting.eager().cpu().double().to(memory_format=torch.contiguous_format)
    return logits_of(model)(setting.pixels(pixels).cpu().double().contiguous())


@functools.lru_cache(maxsize=2)
def weights(variant: str, checkpoint: str | None = None) -> PoolFormerForImageClassification:
    """The checkpoint's model, or `variant` with seeded weights. Not to be changed."""
    if checkpoint is not None:
        return PoolFormerForImageClassification.from_pretrained(checkpoint, dtype=torch.float32)
    return seed(PoolFormerForImageClassification(PoolFormerConfig.from_variant(variant))).eval()


@torch.no_grad()
def seed(model: PoolFormerForImageClassification) -> PoolFormerForImageClassification:
    """Gives `model` random parameters, always the same, that keep activations at a scale of 1."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if "layer_scale" in name:  # the size that training gives them
            parameter.uniform_(0.1, 0.5, generator=generator)
        elif parameter.dim() > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:  # norms' scales around 1, biases around 0
            parameter.normal_(0, 0.1, generator=generator)
            parameter.add_(float("norm" in name and name.endswith("weight")))
    return model


def copy_of(model: PoolFormerForImageClassification) -> PoolFormerForImageClassification:
    fresh = PoolFormerForImageClassification(model.config)
    fresh.load_state_dict(model.state_dict())
    return fresh


def as_eager(model: PoolFormerForImageClassification) -> nn.Module:
    """transformers' model with these weights, or ours pinned to plain PyTorch."""
    if transformers is None:
        return poolformer_kernels.accelerate(copy_of(model), backend="torch")
    fresh = TheirModel(TheirConfig.from_dict(model.config.to_dict()))
    fresh.load_state_dict(model.state_dict())
    return fresh


def build_run(
    name: str, threads: int, image_size: int = 224, **setting: Any
) -> Callable[[int], Tensor]:
    """For benchmarks.memory: a function of the batch size that runs contender `name`."""
    torch.set_num_threads(threads)
    chosen = Setting(**setting)
    forward = CONTENDERS[name](chosen)
    weights.cache_clear()  # what was copied is not the contender's memory
    return lambda batch: forward(chosen.pixels(torch.zeros(batch, 3, image_size, image_size)))

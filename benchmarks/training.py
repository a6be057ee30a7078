"""Training steps as contenders: forward, loss, backward and AdamW, in float32 or under autocast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import poolformer_kernels

from .models import Setting, weights

MODES = ("float32", "bfloat16 autocast")
Build = Callable[[Setting], nn.Module]
CONTENDERS: dict[str, Build] = {
    "eager": Setting.eager,
    "torch.compile": lambda setting: _compiled(setting.eager()),
    "accelerated": lambda setting: poolformer_kernels.accelerate(setting.eager()),
    "accelerated, torch.compile": lambda setting: _compiled(
        poolformer_kernels.accelerate(setting.eager())
    ),
    "own model": Setting.own,
}
DEFAULT = ("eager", "torch.compile", "accelerated")


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]


@dataclass(frozen=True)
class Batch:
    """pixels: (B, 3, H, W) float32; labels: (B,) int64."""

    pixels: Tensor
    labels: Tensor

    def placed(self, setting: Setting) -> Batch:
        return Batch(setting.pixels(self.pixels), self.labels.to(setting.device))


def random_batch(size: int, edge: int, classes: int, generator: torch.Generator) -> Batch:
    pixels = torch.randn(size, 3, edge, edge, generator=generator)
    return Batch(pixels, torch.randint(classes, (size,), generator=generator))


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch.pixels).logits, batch.labels)


def gradient(model: nn.Module) -> Tensor:
    """Of all parameters as one vector in float64, by their names; and none is kept."""
    grads = [p.grad for _, p in sorted(model.named_parameters())]
    flat = torch.cat([g.detach().double().cpu().contiguous().flatten() for g in grads])
    model.zero_grad(set_to_none=True)
    return flat


class Trainer:
    """A contender's model in training. mode: of MODES."""

    def __init__(self, name: str, setting: Setting, mode: str):
        self.model = CONTENDERS[name](setting).train()
        self.autocast = torch.autocast(
            torch.device(setting.device).type, torch.bfloat16, enabled=mode != "float32"
        )
        fused = torch.device(setting.device).type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=fused)

    def backward(self, batch: Batch) -> Tensor:
        with self.autocast:
            loss = loss_of(self.model, batch)
        loss.backward()
        return loss.detach()

    def check(self, batch: Batch) -> list[Tensor]:
        """[loss, gradient], which `exact` has in float64; the model stays as it is."""
        loss = self.backward(batch)
        inner = getattr(self.model, "_orig_mod", self.model)
        return [loss.float(), gradient(inner)]

    def step(self, batch: Batch) -> Tensor:
        """One step of training; the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.backward(batch)
        self.optimizer.step()
        return loss


def exact(setting: Setting, batch: Batch) -> list[Tensor]:
    """[loss, gradient] of eager in float64 on the CPU, contiguous."""
    model = setting.eager().cpu().double().to(memory_format=torch.contiguous_format).train()
    with torch.enable_grad():
        loss = loss_of(model, Batch(batch.pixels.double(), batch.labels))
        loss.backward()
    return [loss.detach(), gradient(model)]


def build_step(
    name: str, mode: str, threads: int, image_size: int, variant: str, layout: str, device: str
) -> Callable[[int], Tensor]:
    """For benchmarks.memory: a function of the batch size that trains contender `name` one step."""
    torch.set_num_threads(threads)
    setting = Setting(variant, "float32", layout, device)
    trainer = Trainer(name, setting, mode)
    weights.cache_clear()
    generator = torch.Generator().manual_seed(0)
    classes = 1000

    def run(size: int) -> Tensor:
        return trainer.step(random_batch(size, image_size, classes, generator).placed(setting))

    return run

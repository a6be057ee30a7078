"""Runs under torchrun: trains accelerated models in DDP and FSDP2, and writes what it saw as JSON.

torchrun --nproc-per-node 2 distributed_worker.py FOLDER
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerated
import feature_matrix
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import poolformer_kernels as pk
from poolformer_kernels import _extension

STEPS, BATCH = 2, 4
Batches = list[tuple[Tensor, Tensor]]


def sources() -> dict[str, Callable[..., nn.Module]]:
    """Those of the matrix whose library is there."""
    absent = [n for n in ("transformers", "timm") if importlib.util.find_spec(n) is None]
    return {
        name: getattr(accelerated, function)
        for name, function in feature_matrix.SOURCES.items()
        if name.split(",")[0] not in absent
    }


def loss_of(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(accelerated.logits(model, pixels).float(), labels)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def mean_of(loss: Tensor) -> float:
    """Over all processes."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches
) -> tuple[list[float], list[Tensor | None]]:
    """The loss of each step, meant over all processes, and the first step's gradients."""
    losses, first = [], []
    for step, (pixels, labels) in enumerate(batches):
        loss = loss_of(model, pixels, labels)
        loss.backward()
        if step == 0:
            first = [whole(p.grad) for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_of(loss))
    return losses, first


def whole(gradient: Tensor | None) -> Tensor | None:
    """A copy, gathered from all processes if it is sharded."""
    return gradient.full_tensor() if isinstance(gradient, DTensor) else copy.deepcopy(gradient)


def error_of(ours: Tensor | None, expected: Tensor, largest: float) -> float:
    """The largest error, in units of the largest value, or of a thousandth of the model's."""
    if ours is None:
        return math.inf
    scale = max(expected.abs().max().item(), 1e-3 * largest)
    return (ours - expected).abs().max().item() / scale


def sharded(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """`model`, sharded block by block; its forward in `dtype`, its logits in float32."""
    inside = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for name in pk.report(model).fused:
        fully_shard(model.get_submodule(name), mp_policy=inside)
    return fully_shard(model, mp_policy=replace(inside, output_dtype=torch.float32))


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "FSDP2": sharded,
    "FSDP2 bfloat16": lambda model: sharded(model, torch.bfloat16),
}


def compare(source: Callable[..., nn.Module], batches: Batches, mine: Batches) -> dict[str, Any]:
    """One process on whole batches, and all of them on their parts of them.

    Losses; the error of each parameter's first gradient; the blocks that run fused.
    """
    model = pk.accelerate(accelerated.make_again(source), "cpu").train()
    names = [name for name, _ in model.named_parameters()]
    alone = copy.deepcopy(model)
    losses, expected = train(alone, optimizer_of(alone), batches)
    largest = max(gradient.abs().max().item() for gradient in expected)
    result: dict[str, Any] = {"one": losses}
    for way, wrap in WAYS.items():
        wrapped = wrap(copy.deepcopy(model))
        losses, gradients = train(wrapped, optimizer_of(wrapped), mine)
        pairs = zip(names, gradients, expected, strict=True)
        errors = {name: error_of(ours, theirs, largest) for name, ours, theirs in pairs}
        fused = len(pk.report(wrapped).fused)
        result[way] = {"losses": losses, "errors": errors, "fused": fused}
    return result


def resume(folder: Path, mine: Batches) -> dict[str, Any]:
    """Losses after a checkpoint of a sharded run, without and with a way through the checkpoint."""

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = sharded(pk.accelerate(accelerated.make_again(accelerated.own)).train())
        return model, optimizer_of(model)

    model, optimizer = start()
    train(model, optimizer, mine[:1])
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=folder)
    expected, _ = train(model, optimizer, mine[1:] * 2)
    model, optimizer = start()
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return {"expected": expected, "resumed": train(model, optimizer, mine[1:] * 2)[0]}


def change(mine: Batches) -> dict[str, Any]:
    """Accelerated, and put on another backend, and restored, while sharded."""
    model = accelerated.make_again(accelerated.own)
    foreign = accelerated.make_again(accelerated.SOURCES[2])
    result: dict[str, Any] = {}
    for name, one in (("own", model), ("original", foreign)):
        alone = copy.deepcopy(one)
        pk.accelerate(one)
        split = sharded(one)
        block = accelerated.first_block(split)
        losses, classes = [], []
        for change in (lambda m: m, lambda m: pk.accelerate(m, "torch"), pk.restore, pk.accelerate):
            change(split)
            classes.append(isinstance(block, torch.distributed.fsdp.FSDPModule))
            losses.append(loss_of(split, *mine[0]).item())
        expected = loss_of(alone, *mine[0]).item()
        result[name] = {"losses": losses, "expected": expected, "classes": classes}
    return result


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, part = dist.get_rank(), BATCH // dist.get_world_size()
    generator = torch.Generator().manual_seed(5)
    batches = [
        (
            torch.randn(BATCH, 3, 64, 48, generator=generator),
            torch.randint(5, (BATCH,), generator=generator),
        )
        for _ in range(STEPS)
    ]
    mine = [(p[rank * part :][:part], y[rank * part :][:part]) for p, y in batches]
    result: dict[str, Any] = {}
    if _extension.load() is not None:
        result = {name: compare(source, batches, mine) for name, source in sources().items()}
    result["resume"] = resume(folder / "checkpoint", mine)
    result["change"] = change(mine)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

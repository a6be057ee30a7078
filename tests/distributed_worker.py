"""Runs under torchrun: trains accelerated models in DDP and FSDP2, and writes what it saw as JSON.

torchrun --nproc-per-node 2 distributed_worker.py FOLDER
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerated
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import poolformer_kernels as pk

STEPS, BATCH = 4, 4
SOURCES: dict[str, Callable[..., nn.Module]] = {"own": accelerated.own}


def add_sources() -> None:
    for name, source in (("transformers", accelerated.hugging_face), ("timm", accelerated.timm)):
        try:
            __import__(name)
        except ImportError:
            continue
        SOURCES[name] = source


def loss_of(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(accelerated.logits(model, pixels).float(), labels)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[tuple[Tensor, Tensor]],
    result: dict[str, Any] | None = None,
) -> list[float]:
    """The mean loss of each step over all processes; every parameter has to get a gradient."""
    losses = []
    for pixels, labels in batches:
        loss = loss_of(model, pixels, labels)
        loss.backward()
        if result is not None:
            result["without"] = [n for n, p in model.named_parameters() if p.grad is None]
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if result is not None:
            dist.all_reduce(total)
            total /= dist.get_world_size()
        losses.append(total.item())
    return losses


def sharded(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """`model`, sharded block by block; its forward in `dtype`, its logits in float32."""
    inside = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for name in pk.report(model).fused:
        fully_shard(model.get_submodule(name), mp_policy=inside)
    return fully_shard(model, mp_policy=replace(inside, output_dtype=torch.float32))


def compare(source: Callable[..., nn.Module], batches: Any, mine: Any) -> dict[str, Any]:
    """Losses of one process on whole batches, and of all of them on their parts."""
    torch.manual_seed(0)
    model = pk.accelerate(accelerated.make(source)).train()
    alone = copy.deepcopy(model)
    result: dict[str, Any] = {"one": train(alone, optimizer_of(alone), batches)}
    replicated = DistributedDataParallel(copy.deepcopy(model))
    result["ddp"] = train(replicated, optimizer_of(replicated), mine, result)
    for name, dtype in (("fsdp", None), ("fsdp bfloat16", torch.bfloat16)):
        split = sharded(copy.deepcopy(model), dtype)
        result[name] = train(split, optimizer_of(split), mine, result)
        result["fused"] = len(pk.report(split).fused)
    return result


def resume(folder: Path, mine: Any) -> dict[str, Any]:
    """Losses after a checkpoint of a sharded run, without and with a way through the checkpoint."""

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = sharded(pk.accelerate(accelerated.make_again(accelerated.own)).train())
        return model, optimizer_of(model)

    model, optimizer = start()
    train(model, optimizer, mine[:2])
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=folder)
    expected = train(model, optimizer, mine[2:])
    model, optimizer = start()
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return {"expected": expected, "resumed": train(model, optimizer, mine[2:])}


def change(mine: Any) -> dict[str, Any]:
    """Accelerated, and put on another backend, and restored, while sharded."""
    model = accelerated.make_again(accelerated.own)
    foreign = accelerated.make_again(accelerated.SOURCES[2])
    result: dict[str, Any] = {}
    for name, one in (("own", model), ("original", foreign)):
        whole = copy.deepcopy(one)
        pk.accelerate(one)
        split = sharded(one)
        block = accelerated.first_block(split)
        losses, classes = [], []
        for change in (lambda m: m, lambda m: pk.accelerate(m, "torch"), pk.restore, pk.accelerate):
            change(split)
            classes.append(isinstance(block, torch.distributed.fsdp.FSDPModule))
            losses.append(loss_of(split, *mine[0]).item())
        expected = loss_of(whole, *mine[0]).item()
        result[name] = {"losses": losses, "expected": expected, "classes": classes}
    return result


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    add_sources()
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
    result: dict[str, Any] = {n: compare(source, batches, mine) for n, source in SOURCES.items()}
    result["resume"] = resume(folder / "checkpoint", mine)
    result["change"] = change(mine)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

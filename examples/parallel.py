"""The processes that torchrun started, or one alone; DDP and FSDP2 around a model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import poolformer_kernels as pk


@dataclass(frozen=True)
class Place:
    """This process among all of them."""

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes what only one may write."""
        return self.rank == 0

    def wait(self) -> None:
        """For all processes."""
        dist.barrier()

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes."""
        dist.all_reduce(values)
        return values

    def union(self, value: set[str]) -> set[str]:
        """The union of a set over all processes."""
        parts: list[set[str]] = [set() for _ in range(self.world)]
        dist.all_gather_object(parts, value)
        return set().union(*parts)


@contextmanager
def process_group(device: str | None) -> Iterator[Place]:
    """Join the group that torchrun's environment describes, or be a group of one."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backend = "cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo"
    if kind.type == "cuda":
        kind = torch.device("cuda", kind.index or int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(kind)
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), kind)
    finally:
        dist.destroy_process_group()


def check_restarts() -> None:
    """Refuse to be started by a torchrun whose restarts may hang.

    It keeps the addresses of a group that was killed, and the next group may wait at those.

    Source: https://github.com/pytorch/pytorch/issues/135712.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise ValueError(
            "after a restart by torchrun, processes may wait for ever for those that were killed. "
            "Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, or leave out --max-restarts."
        )


def replicate(model: nn.Module, place: Place) -> nn.Module:
    """`model` in DDP."""
    devices = [place.device] if place.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def shard(model: nn.Module, place: Place, dtype: torch.dtype) -> nn.Module:
    """Shard the parameters of `model` in place, block by block; `dtype` is the forward's.

    Parameters stay in float32, and so do sums of gradients.
    """
    mesh = init_device_mesh(place.device.type, (place.world,))
    inside = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    whole = replace(inside, output_dtype=torch.float32)
    blocks = pk.report(model)
    for name in (*blocks.fused, *blocks.left):
        fully_shard(model.get_submodule(name), mesh=mesh, mp_policy=inside)
    return fully_shard(model, mesh=mesh, mp_policy=whole)

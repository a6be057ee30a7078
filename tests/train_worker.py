"""Runs under torchrun: examples.train in DDP, in FSDP2, and in FSDP2 with a process killed in it.

torchrun --nproc-per-node 2 --max-restarts 1 train_worker.py FOLDER OPTIONS...

FOLDER gets ddp, fsdp, whole, killed, and in `left` what the killed run had left at its restart.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from examples import train, trainer

PLAIN = ("--mixup", "0", "--cutmix", "0", "--drop-path", "0")
SHARDED = ("--fsdp", "--dtype", "bfloat16")
step = trainer.Trainer.train_step


def until_killed(self: trainer.Trainer, batch: Any) -> Tensor:
    """A step, but for the ninth: two steps after a checkpoint, in the second epoch."""
    if self.step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch)


def main(folder: Path, options: list[str]) -> None:
    store, rank, world = next(rendezvous("env://"))
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    init = dist.init_process_group

    def run(name: str, *more: str) -> None:
        place = {"store": dist.PrefixStore(name, store), "rank": rank, "world_size": world}
        with mock.patch.object(dist, "init_process_group", partial(init, **place)):
            assert train.main([*options, *more, "--out", str(folder / name)]) == 0

    if first:
        run("ddp", *PLAIN)
        run("fsdp", *PLAIN, *SHARDED)
        run("whole", *SHARDED)
        if rank == 1:
            trainer.Trainer.train_step = until_killed
    elif rank == 0:
        shutil.copytree(folder / "killed", folder / "left")
        time.sleep(1)  # the other would meet here what the killed group has left
    run("killed", *SHARDED, "--resume")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

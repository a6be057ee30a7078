"""Checkpoints of a run, sharded or not, in the format of torch.distributed.checkpoint.

A checkpoint is a folder step-N. It is written under another name and renamed when it is whole, so
that a kill leaves the last one and never half of one. It can be read by another number of processes
than wrote it, and by DDP where FSDP wrote it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from .parallel import Place


class Checkpoints:
    """The checkpoints in a folder; the newest `keep` of them stay.

    Args:
        model: in DDP, sharded, or neither.
        average: the module of averaged weights, or None.
        scaler: its state is saved only while it is enabled.
    """

    def __init__(
        self,
        folder: Path,
        place: Place,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: nn.Module | None,
        scaler: torch.amp.GradScaler,
        keep: int = 2,
    ) -> None:
        self.folder, self.place, self.keep = folder, place, keep
        self.model, self.optimizer = model, optimizer
        self.average, self.scaler = average, scaler

    def steps(self) -> list[int]:
        """The steps after which there is a checkpoint, the oldest first."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("step-*[0-9]"))

    def save(self, step: int, progress: dict[str, Any]) -> None:
        """Write the state after `step` steps, with `progress`, which JSON can hold."""
        whole, part = self.folder / f"step-{step}", self.folder / f"step-{step}.part"
        if whole.exists():
            return
        if self.place.leads:
            shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
            self.folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        dcp.save(self._state() | {"progress": json.dumps(progress)}, checkpoint_id=part)
        if self.place.leads:
            os.rename(part, whole)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.folder / f"step-{old}")
        dist.barrier()

    def progress(self) -> dict[str, Any] | None:
        """What was saved beside the newest checkpoint's tensors; None if there is none."""
        if not self.steps():
            return None
        state = {"progress": ""}
        dcp.load(state, checkpoint_id=self._newest())
        return json.loads(state["progress"])

    def load(self) -> None:
        """Put the newest checkpoint into the model, the average, the optimizer and the scaler."""
        state = self._state()
        dcp.load(state, checkpoint_id=self._newest())
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])

    def _newest(self) -> Path:
        return self.folder / f"step-{self.steps()[-1]}"

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if self.average is not None:
            state["average"] = get_model_state_dict(self.average)
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return state

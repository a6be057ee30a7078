"""The training loop: steps, validation, checkpoints, and the way back from one."""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from . import images, networks, parallel, seeding
from .checkpoints import Checkpoints
from .logs import Logs, read_rows
from .options import DTYPES
from .splits import open_splits
from .validation import validate


class Trainer:
    """A run of training, as `options` (of `options.parse`) describe it, in one of its processes.

    Attributes:
        step: how many steps have been done.
        model: in DDP or sharded; `bare` is the same without DDP, `average` the averaged one or
            None.
        corrupt: names of the images that could not be read.

    Raises:
        FileNotFoundError, ModuleNotFoundError: data, weights or a package are not there.
        FileExistsError: --out holds a run, and --resume was not given.
        ValueError: options that contradict one another, torchrun's, the data or the checkpoint.
    """

    def __init__(self, options: argparse.Namespace, place: parallel.Place) -> None:
        self.options, self.place = options, place
        parallel.check_restarts()
        _check(options, place.world)
        self._open_data()
        self._make_model()
        self._make_optimizer()
        self.checkpoints = Checkpoints(
            options.out / "checkpoints",
            place,
            self.model,
            self.optimizer,
            self.average,
            self.scaler,
        )
        self.step, self.corrupt = 0, set[str]()
        self._resume()
        total = self.epochs * self.steps_per_epoch
        self.logs = Logs(options.out, self.step, total) if place.leads else None

    def _open_data(self) -> None:
        options, place = self.options, self.place
        self.train, self.val = open_splits(options, networks.crop_pct(options))
        self.classes = list(self.train.reader.class_to_idx)
        self.batches = images.TrainBatches(
            len(self.train), options.batch_size, place.rank, place.world, options.seed
        )
        self.steps_per_epoch = self.batches.steps
        validation = images.validation_batches(
            len(self.val), options.batch_size, place.rank, place.world
        )
        cuda = place.device.type == "cuda"
        self.train_loader = images.make_loader(self.train, self.batches, options.workers, cuda)
        self.val_loader = images.make_loader(self.val, validation, options.workers, cuda)
        self.mixup = None
        if options.mixup > 0 or options.cutmix > 0:
            self.mixup = Mixup(
                options.mixup,
                options.cutmix,
                label_smoothing=options.smoothing,
                num_classes=len(self.classes),
            )

    def _make_model(self) -> None:
        options, device, dtype = self.options, self.place.device, DTYPES[self.options.dtype]
        seeding.seed_generators(options.seed)
        model = networks.build(options, self.classes).to(device).train()
        self.bare = networks.choose_ops(model, options)
        self.ema = ModelEmaV3(self.bare, options.ema_decay) if options.ema else None
        self.average = None if self.ema is None else self.ema.module
        if options.fsdp:
            self.model = parallel.shard(self.bare, self.place, dtype)
            if self.average is not None:
                parallel.shard(self.average, self.place, dtype)
        else:
            self.model = parallel.replicate(self.bare, self.place)
        casts = dtype != torch.float32 and not options.fsdp  # FSDP2 casts by its own policy
        self.autocast = torch.autocast(device.type, dtype, enabled=casts)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def _make_optimizer(self) -> None:
        options, scale = self.options, self.options.batch_size / 1024
        self.optimizer = create_optimizer_v2(
            self.bare,
            opt="adamw",
            lr=options.lr * scale,
            weight_decay=options.weight_decay,
            fused=self.place.device.type in ("cpu", "cuda"),
        )
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer,
            num_epochs=options.epochs,
            warmup_epochs=options.warmup_epochs,
            cooldown_epochs=options.cooldown_epochs,
            min_lr=options.min_lr * scale,
            warmup_lr=options.warmup_lr * scale,
            step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch,
        )

    def _fixed(self) -> dict[str, Any]:
        """What a resumed run must not change, or its steps would not be those of the first."""
        names = ("model", "batch_size", "seed", "ema", "dtype")
        fixed = {f"--{name.replace('_', '-')}": getattr(self.options, name) for name in names}
        return fixed | {"the number of training images": len(self.train)}

    def _resume(self) -> None:
        progress = self.checkpoints.progress()
        if progress is None:
            return
        folder = self.checkpoints.folder
        if not self.options.resume:
            raise FileExistsError(
                f"{folder} holds a run at step {progress['step']}. --resume goes on with it; "
                "another --out keeps it and starts anew."
            )
        for name, value in self._fixed().items():
            if progress["fixed"][name] != value:
                raise ValueError(
                    f"--resume: {name} is {value}, and the run in {folder} was started with "
                    f"{progress['fixed'][name]}. Give that again, or another --out."
                )
        self.checkpoints.load()
        self.step, self.corrupt = progress["step"], set(progress["corrupt"])

    def _save(self) -> None:
        self.corrupt = self.place.union(self.corrupt)
        progress = {"step": self.step, "corrupt": sorted(self.corrupt), "fixed": self._fixed()}
        self.checkpoints.save(self.step, progress)

    def fit(self) -> None:
        """Train to the last epoch; the folders `best` and `last` then hold models to load."""
        try:
            for epoch in range(self.step // self.steps_per_epoch, self.epochs):
                start = time.perf_counter()
                self._train_epoch(epoch)
                self._finish_epoch(epoch, time.perf_counter() - start)
                self._save()
        finally:
            if self.logs is not None:
                self.logs.close()

    def _train_epoch(self, epoch: int) -> None:
        """The steps of an epoch that have not been done yet."""
        end = (epoch + 1) * self.steps_per_epoch
        self.model.train()
        self.batches.epoch = epoch
        self.batches.first = self.step - epoch * self.steps_per_epoch
        self._begin_row()
        for batch in self.train_loader:
            self.loss_sum += self.train_step(batch)
            save = self.step % self.options.checkpoint_every == 0 and self.step < end
            if save or self.step == end or self.step % self.options.log_every == 0:
                self._log_steps(epoch)
            if save:
                self._save()

    def train_step(self, batch: images.Sample) -> Tensor:
        """One step of the optimizer, the schedule and the average; the loss before it."""
        seeding.seed_generators(self.options.seed, seeding.STEPS, self.step, self.place.rank)
        if self.place.device.type == "cuda":
            torch.cuda.manual_seed(torch.initial_seed())
        self._note_corrupt(self.train, batch.corrupt_indices())
        pixels, labels = batch.placed(self.place.device)
        smoothing = self.options.smoothing
        if self.mixup is not None:
            pixels, labels = self.mixup(pixels, labels)  # labels are distributions then, smoothed
            smoothing = 0.0
        self.scheduler.step_update(self.step)
        with self.autocast:
            logits = networks.logits_of(self.model, pixels)
            loss = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.bare)
        return loss.detach()

    def _note_corrupt(self, split: images.Images, indices: set[int]) -> None:
        self.corrupt |= {split.name(index) for index in indices}

    def _begin_row(self) -> None:
        self.row_step, self.row_time = self.step, time.perf_counter()
        self.loss_sum = torch.zeros((), device=self.place.device)

    def _log_steps(self, epoch: int) -> None:
        """A row with the mean loss of the steps since the last row, over all processes."""
        steps = self.step - self.row_step
        loss = self.place.total(self.loss_sum).item() / (steps * self.place.world)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {self.step}. Lower --lr, or use --dtype bfloat16 or "
                "float32, and go on from the last checkpoint with --resume."
            )
        if self.logs is not None:
            seconds = time.perf_counter() - self.row_time
            self.logs.add_step(
                {
                    "step": self.step,
                    "epoch": epoch,
                    "lr": self.optimizer.param_groups[0]["lr"],
                    "loss": loss,
                    "images_per_s": round(steps * self.options.batch_size / seconds, 1),
                }
            )
        self._begin_row()

    def _finish_epoch(self, epoch: int, train_s: float) -> None:
        """Validate, log, and write the models."""
        scores, corrupt = validate(self.bare, self.val_loader, self.place, self.autocast)
        self._note_corrupt(self.val, corrupt)
        candidates = {scores["top1"]: self.bare}
        if self.average is not None:
            averaged, _ = validate(self.average, self.val_loader, self.place, self.autocast)
            scores |= {f"ema_{name}": value for name, value in averaged.items()}
            candidates[averaged["top1"]] = self.average
        self.corrupt = self.place.union(self.corrupt)
        best = max(candidates)
        rows = read_rows(self.options.out / "epochs.csv")
        earlier = [float(row[name]) for row in rows for name in ("top1", "ema_top1") if row[name]]
        self.place.wait()  # for everyone to have read the rows
        if self.logs is not None:
            place = {"step": self.step, "epoch": epoch, "train_s": round(train_s, 3)}
            self.logs.add_epoch(place | scores, sorted(self.corrupt))
        if best > max(earlier, default=-1.0):
            self._export("best", candidates[best])
        if epoch + 1 == self.epochs:
            self._export("last", self.average or self.bare)

    def _export(self, name: str, model: nn.Module) -> None:
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=whole)
        if self.place.leads:
            networks.save(self.options.out / name, state, self.options, self.classes)


def _check(options: argparse.Namespace, world: int) -> None:
    """Refuse options that cannot work together, before anything is read or made."""
    mixes = options.mixup > 0 or options.cutmix > 0
    unit = world * (2 if mixes else 1)
    if options.batch_size < 1 or options.batch_size % unit:
        pairs = ", each with an even number of images, for --mixup and --cutmix mix pairs"
        raise ValueError(
            f"--batch-size is {options.batch_size}; it has to be a positive multiple of {unit}: it "
            f"is shared by {world} processes{pairs if mixes else ''}."
        )
    for name in ("log_every", "checkpoint_every", "epochs", "image_size"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; it has to be positive."
            )

"""What a run tells while it trains: CSV files, TensorBoard's if it is installed, a progress bar."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

SHOWN = 5  # corrupt images that are named
STEP_COLUMNS = ("step", "epoch", "lr", "loss", "images_per_s")
EPOCH_COLUMNS = (
    *("step", "epoch", "loss", "top1", "top5"),
    *("ema_loss", "ema_top1", "ema_top5", "corrupt", "train_s"),
)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Table:
    """A CSV file that grows by rows. Rows after `last_step`, void since a kill, are dropped."""

    def __init__(self, path: Path, columns: tuple[str, ...], last_step: int) -> None:
        kept = [row for row in read_rows(path) if int(row["step"]) <= last_step]
        part = path.with_suffix(".part")
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(kept)
        os.replace(part, path)
        self.file = path.open("a", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, columns, restval="")

    def add(self, row: dict[str, Any]) -> None:
        self.writer.writerow(row)
        self.file.flush()


class Logs:
    """steps.csv, epochs.csv and TensorBoard's files in a folder, and a bar; for one process."""

    def __init__(self, folder: Path, step: int, total: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.steps = Table(folder / "steps.csv", STEP_COLUMNS, step)
        self.epochs = Table(folder / "epochs.csv", EPOCH_COLUMNS, step)
        self.board = _tensorboard(folder, step)
        self.bar = tqdm(total=total, initial=step, unit=" steps", disable=None)

    def add_step(self, row: dict[str, Any]) -> None:
        self.steps.add(row)
        self._to_board("train", row)
        self.bar.update(row["step"] - self.bar.n)
        self.bar.set_postfix_str(f"epoch {row['epoch']}, loss {row['loss']:.3f}")

    def add_epoch(self, row: dict[str, Any], corrupt: list[str]) -> None:
        """`corrupt`: the images that could not be read, of the whole run."""
        row = row | {"corrupt": len(corrupt)}
        self.epochs.add(row)
        self._to_board("validation", row)
        averaged = f", averaged weights {row['ema_top1']:.2%}" if "ema_top1" in row else ""
        tqdm.write(
            f"epoch {row['epoch']}: loss {row['loss']:.4f}, top-1 {row['top1']:.2%}, "
            f"top-5 {row['top5']:.2%}{averaged}"
        )
        if corrupt:
            named = ", ".join(corrupt[:SHOWN]) + (", …" if len(corrupt) > SHOWN else "")
            tqdm.write(f"{len(corrupt)} images could not be read and were left out: {named}")

    def _to_board(self, group: str, row: dict[str, Any]) -> None:
        if self.board is not None:
            for name in row.keys() - {"step", "epoch"}:
                self.board.add_scalar(f"{group}/{name}", row[name], row["step"])

    def close(self) -> None:
        self.steps.file.close()
        self.epochs.file.close()
        self.bar.close()
        if self.board is not None:
            self.board.close()


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

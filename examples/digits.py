"""Trains a small PoolFormer on handwritten digits twice: on fused ops, and in eager PyTorch.

    make train-demo
    python -m examples.digits --epochs 30

The images are scikit-learn's 1797 digits, every fifth of them held out; the loop is that of
examples.train, with the same seed for both. A table and a chart show accuracy and time. Eager is
PoolFormer of transformers if that is installed. The exit code is 0 only if the fused run gets at
least 97 % of the digits that were held out right.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from PIL import Image
from sklearn.datasets import load_digits

from poolformer_kernels import PoolFormerConfig

from . import train
from .logs import read_rows

OUT = Path(__file__).parent / "out"
REQUIRED = 0.97
COLOURS = {"fused": "#0072B2", "eager": "#8C8C8C"}
RECIPE = (
    *("--image-size", "8", "--batch-size", "64", "--lr", "0.15", "--warmup-epochs", "2"),
    *("--cooldown-epochs", "0", "--mixup", "0", "--cutmix", "0", "--auto-augment", ""),
    *("--color-jitter", "0", "--random-erasing", "0", "--hflip", "0", "--scale", "0.7", "1"),
    *("--crop-pct", "1", "--drop-path", "0.05", "--log-every", "1", "--workers", "1"),
)


def write_images(folder: Path) -> None:
    """The digits as DATA/train/CLASS/*.png and DATA/val/CLASS/*.png."""
    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / ("val" if index % 5 == 4 else "train") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(place / f"{index:04}.png")


def write_config(folder: Path) -> None:
    """A PoolFormer of three stages for images of 8×8."""
    PoolFormerConfig(
        depths=[2, 2, 2],
        hidden_sizes=[32, 64, 96],
        patch_sizes=[3, 3, 3],
        strides=[1, 2, 2],
        padding=[1, 1, 1],
        num_encoder_blocks=3,
        layer_scale_init_value=1.0,  # few blocks need no small one
        initializer_range=0.1,
    ).save_pretrained(folder)


def plot(runs: dict[str, Path], path: Path) -> Path:
    """Training loss (its moving mean) and held-out accuracy of each run, by step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, folder in runs.items():
        steps, epochs = read_rows(folder / "steps.csv"), read_rows(folder / "epochs.csv")
        style = {
            "color": COLOURS[name],
            "label": name,
            "linestyle": "-" if name == "fused" else "--",
        }
        losses = torch.tensor([float(row["loss"]) for row in steps])
        width = min(20, len(losses))
        left.plot(range(width, len(losses) + 1), losses.unfold(0, width, 1).mean(-1), **style)
        right.plot(
            [int(row["step"]) for row in epochs],
            [100 * float(row["top1"]) for row in epochs],
            **style,
        )
    left.set(title="training loss, mean of 20 steps", xlabel="step", yscale="log")
    right.set(title="held-out digits that are right (%)", xlabel="step")
    right.axhline(100 * REQUIRED, color="black", linewidth=0.6)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def summary(folder: Path) -> dict[str, Any]:
    """What a run came to: final loss and accuracy, and seconds of training."""
    epochs = read_rows(folder / "epochs.csv")
    seconds = sum(float(row["train_s"]) for row in epochs)
    last = epochs[-1]
    steps = int(last["step"])
    return {
        "accuracy": float(last["top1"]),
        "loss": float(last["loss"]),
        "seconds": seconds,
        "ms_per_step": 1000 * seconds / steps,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT / "digits", help="folder, made anew")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a small model; the other core loads images
    shutil.rmtree(options.out, ignore_errors=True)
    data, config = options.out / "images", options.out / "config"
    write_images(data)
    write_config(config)
    try:
        import transformers  # noqa: F401

        model = f"transformers:{config}"
    except ImportError:
        model = str(config)
    recipe = [str(data), "--model", model, *RECIPE]
    recipe += ["--epochs", str(options.epochs), "--seed", str(options.seed)]
    runs = {name: options.out / name for name in ("fused", "eager")}
    for name, folder in runs.items():
        print(f"\n{name}:")
        extra = ["--no-fused"] if name == "eager" else []
        if code := train.main([*recipe, "--out", str(folder), *extra]):
            return code
    print(f"\n{'':<8}{'held out right':>16}{'loss':>10}{'training':>12}{'a step':>12}")
    results = {name: summary(folder) for name, folder in runs.items()}
    for name, result in results.items():
        print(
            f"{name:<8}{result['accuracy']:>16.2%}{result['loss']:>10.4f}"
            f"{result['seconds']:>10.1f} s{result['ms_per_step']:>9.1f} ms"
        )
    print(f"wrote {plot(runs, options.out / 'curves.png')}")
    if results["fused"]["accuracy"] < REQUIRED:
        print(f"the fused run is below {REQUIRED:.0%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The options of examples.train. Their defaults are the recipe that PoolFormer was trained with.

Source: sail-sg/poolformer, README.md and train.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from poolformer_kernels import backends

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line, that of this process if None."""
    parser = argparse.ArgumentParser(
        prog="examples.train",
        description="Trains a PoolFormer on fused ops; start it with torchrun or python -m.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    _add_data(parser.add_argument_group("data"))
    _add_model(parser.add_argument_group("model"))
    _add_recipe(parser.add_argument_group("recipe"))
    _add_augmentation(parser.add_argument_group("augmentation"))
    _add_run(parser.add_argument_group("run"))
    return parser.parse_args(arguments)


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "data",
        help="a folder with one folder for each split, with one folder of images for each class; "
        "or hfds/NAME, a data set of the Hugging Face hub (needs the package datasets)",
    )
    group.add_argument("--train-split", default="train", metavar="NAME")
    group.add_argument("--val-split", default="val", metavar="NAME")
    group.add_argument("--image-key", default="image", help="column of a Hugging Face data set")
    group.add_argument("--label-key", default="label", help="column of a Hugging Face data set")
    group.add_argument("--image-size", type=int, default=224, help="edge in pixels")
    group.add_argument("--workers", type=int, default=4, help="that load images, per process")


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        default="s12",
        help="s12, s24, s36, m36, m48, or a folder with a config.json: our own model; the same "
        "after transformers: for theirs; or timm:NAME",
    )
    group.add_argument("--weights", help="start from this checkpoint (folder, file or hub name)")
    group.add_argument(
        "--backend", default="auto", choices=("auto", *backends.BACKENDS), help="of the ops"
    )
    group.add_argument("--no-fused", action="store_true", help="train in plain PyTorch instead")
    group.add_argument("--drop-path", type=float, help="default: the original's for the variant")


def _add_recipe(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=int, default=300, help="of the cosine, warmup included")
    group.add_argument("--warmup-epochs", type=int, default=5)
    group.add_argument("--cooldown-epochs", type=int, default=10, help="at the least rate, after")
    group.add_argument("--batch-size", type=int, default=1024, help="of all processes together")
    group.add_argument("--lr", type=float, default=1e-3, help="for 1024 images a step")
    group.add_argument("--warmup-lr", type=float, default=1e-6, help="first, for 1024 images")
    group.add_argument("--min-lr", type=float, default=1e-5, help="last, for 1024 images")
    group.add_argument("--weight-decay", type=float, default=0.05, help="not of vectors")
    group.add_argument("--smoothing", type=float, default=0.1, help="of labels")
    group.add_argument("--ema", action="store_true", help="keep an average of the weights too")
    group.add_argument("--ema-decay", type=float, default=0.9998, help="per step")
    group.add_argument("--dtype", default="float32", choices=DTYPES, help="of mixed precision")
    group.add_argument("--seed", type=int, default=42)


def _add_augmentation(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--mixup", type=float, default=0.8, help="alpha; 0: none")
    group.add_argument("--cutmix", type=float, default=1.0, help="alpha; 0: none")
    group.add_argument("--auto-augment", default="rand-m9-mstd0.5-inc1", help="'': none")
    group.add_argument("--color-jitter", type=float, default=0.4, help="where auto-augment is none")
    group.add_argument("--random-erasing", type=float, default=0.25, help="probability")
    group.add_argument("--scale", type=float, nargs=2, default=(0.08, 1.0), help="area of crops")
    group.add_argument("--hflip", type=float, default=0.5, help="probability")
    group.add_argument("--crop-pct", type=float, help="in validation; default: the variant's")


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out", type=Path, default=Path("train-out"), help="logs, checkpoints, models"
    )
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint there")
    group.add_argument("--checkpoint-every", type=int, default=1000, help="steps; and each epoch")
    group.add_argument("--log-every", type=int, default=50, help="steps")
    group.add_argument("--fsdp", action="store_true", help="shard by FSDP2 instead of DDP")
    group.add_argument("--device", help="default: cuda if there is one, else cpu")

"""The splits of a data set, of folders or of the Hugging Face hub, read and augmented by timm."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from timm.data.readers import create_reader

from .images import Images


def open_splits(options: argparse.Namespace, crop_pct: float) -> tuple[Images, Images]:
    """The training and the validation images.

    Raises:
        FileNotFoundError: no such folder, split or image in it.
        ValueError: splits of different classes, fewer images than a batch, no class names.
        ModuleNotFoundError: a Hugging Face data set without the package datasets.
    """
    readers = [_reader(options, split) for split in (options.train_split, options.val_split)]
    size = options.image_size
    augment = create_transform(
        size,
        is_training=True,
        scale=tuple(options.scale),
        hflip=options.hflip,
        color_jitter=options.color_jitter,
        auto_augment=options.auto_augment or None,
        interpolation="random",
        re_prob=options.random_erasing,
        re_mode="pixel",
    )
    for part in augment.transforms:
        if isinstance(part, RandAugment):
            _keep_a_bit(part)
    plain = create_transform(size, interpolation="bicubic", crop_pct=crop_pct)
    train = Images(readers[0], augment, size, options.seed, train=True)
    if len(train) < options.batch_size:
        raise ValueError(
            f"{options.data} has {len(train)} training images, fewer than --batch-size "
            f"{options.batch_size}, and an epoch would have no step. Use a smaller batch."
        )
    return train, Images(readers[1], plain, size, options.seed, train=False)


def _keep_a_bit(augment: RandAugment) -> None:
    """Pillow 13 refuses to posterize to no bit at all, which timm's strongest level asks for."""
    for operation in augment.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return ImageOps.posterize(image, max(1, min(bits, 8)))


def _reader(options: argparse.Namespace, split: str) -> Any:
    if options.data.startswith("hfds/"):
        return _hugging_face_reader(options, split)
    root = Path(options.data).expanduser()
    classes = _class_folders(root, options.train_split)
    if found := set(_class_folders(root, split)) ^ set(classes):
        listed = ", ".join(sorted(found)[:5])
        raise ValueError(
            f"{root / options.train_split} and {root / split} have to hold the same classes, and "
            f"{len(found)} of them are in one only: {listed}."
        )
    try:
        return create_reader("", str(root / split), class_map={n: i for i, n in enumerate(classes)})
    except RuntimeError as error:
        raise FileNotFoundError(f"{root / split} holds folders, but no image: {error}.") from None


def _class_folders(root: Path, split: str) -> list[str]:
    folder = root / split
    if not folder.is_dir():
        there = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
        state = f"holds {', '.join(there[:8]) or 'nothing'}" if root.is_dir() else "is no folder"
        raise FileNotFoundError(
            f"there is no folder {folder}; {root} {state}. Images are expected as "
            f"DATA/{split}/CLASS/*.jpg; --train-split and --val-split give the names of splits. A "
            "data set of the Hugging Face hub is written hfds/NAME."
        )
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if len(classes) < 2:
        raise FileNotFoundError(
            f"{folder} has {len(classes)} folders; it needs two or more, one for each class."
        )
    return classes


def _hugging_face_reader(options: argparse.Namespace, split: str) -> Any:
    try:
        reader = create_reader(
            options.data, split=split, input_key=options.image_key, target_key=options.label_key
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{options.data} needs the package {error.name}: pip install datasets"
        ) from None
    if not reader.class_to_idx:
        raise ValueError(
            f"the column {options.label_key!r} of {options.data} has no class names; "
            "--label-key names a column of type ClassLabel."
        )
    return reader

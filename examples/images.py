"""Images of a split, in an order that a resumed run can enter anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from . import seeding

NO_IMAGE = -1
TRIES = 10  # images in a row that may be corrupt before training stops

Key = tuple[int, int]  # (epoch, index of an image, or NO_IMAGE)


class Sample(NamedTuple):
    """An image, or a batch of them once collated."""

    pixels: Tensor  # (3, size, size) float32; (B, 3, size, size)
    label: int | Tensor  # int64 (B); NO_IMAGE: do not count this image
    corrupt: int | Tensor  # the index of an image that could not be read, or NO_IMAGE

    def placed(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A batch's pixels, in channels_last, where every backend is fastest, and its labels."""
        pixels, labels = torch.as_tensor(self.pixels), torch.as_tensor(self.label)
        return (
            pixels.to(device, memory_format=torch.channels_last, non_blocking=True),
            labels.to(device, non_blocking=True),
        )

    def corrupt_indices(self) -> set[int]:
        """Of a batch."""
        return set(torch.as_tensor(self.corrupt).tolist()) - {NO_IMAGE}


class Images(Dataset[Sample]):
    """The images of one split.

    An image that cannot be read is replaced by the next one in training, so that batches keep their
    size, and is not counted in validation; both say which one it was.

    Args:
        reader: one of timm's: reader[i] is (file, label), reader.class_to_idx names the labels.
        transform: PIL image → (3, size, size).
        size: edge of the transform's result.
        seed: of the run; each image of each epoch draws from a seed made of it.
        train: whether corrupt images are replaced.
    """

    def __init__(self, reader: Any, transform: Any, size: int, seed: int, train: bool) -> None:
        self.reader, self.transform, self.size = reader, transform, size
        self.seed, self.train = seed, train

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, key: Key) -> Sample:
        epoch, index = key
        corrupt = NO_IMAGE
        for place in range(index, index + (TRIES if self.train else 1)):
            if index == NO_IMAGE:
                break
            try:
                image, label = self._read(place % len(self))
            except Exception as error:  # decoders raise whatever they like
                if corrupt == NO_IMAGE:
                    corrupt, reason = index, error
                continue
            seeding.seed_generators(self.seed, seeding.IMAGES, epoch, index)
            return Sample(self.transform(image), label, corrupt)
        if self.train:
            raise OSError(
                f"{TRIES} images in a row cannot be read, from {self.name(index)} on ({reason}). "
                "Look whether the data is there, whole and readable."
            )
        return Sample(torch.zeros(3, self.size, self.size), NO_IMAGE, corrupt)

    def _read(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.reader[index]
        with file, Image.open(file) as image:
            return image.convert("RGB"), label

    def name(self, index: int) -> str:
        """The file of an image, or its number where it has none."""
        try:
            return str(self.reader.filename(index))
        except NotImplementedError:
            return f"image {index}"


class TrainBatches(Sampler[list[Key]]):
    """The batches of one process in one epoch.

    The global batch of a step, of which every process takes its part, is the same for any number
    of processes. Set `epoch` and `first` (the batch to begin with) before iterating.
    """

    def __init__(self, images: int, batch_size: int, rank: int, world: int, seed: int) -> None:
        self.batch_size, self.steps = batch_size // world, images // batch_size
        self.order = DistributedSampler(
            range(images),
            world,
            rank,
            shuffle=True,
            seed=seed,
            drop_last=True,  # type: ignore[arg-type]
        )
        self.epoch = self.first = 0

    def __len__(self) -> int:
        return self.steps - self.first

    def __iter__(self) -> Iterator[list[Key]]:
        self.order.set_epoch(self.epoch)
        order = iter(self.order)
        for step in range(self.steps):
            batch = [(self.epoch, index) for index in itertools.islice(order, self.batch_size)]
            if step >= self.first:
                yield batch


def validation_batches(images: int, batch_size: int, rank: int, world: int) -> list[list[Key]]:
    """Every image once. All processes get as many batches (FSDP needs it), filled by NO_IMAGE."""
    mine = [(0, index) for index in range(rank, images, world)]
    mine += [(0, NO_IMAGE)] * (-(-images // world) - len(mine))
    size = max(1, batch_size // world)
    return [mine[start : start + size] for start in range(0, len(mine), size)]


def make_loader(images: Images, batches: Any, workers: int, cuda: bool) -> DataLoader:
    return DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=cuda,
        generator=torch.Generator(),  # of seeds that nothing here uses
    )

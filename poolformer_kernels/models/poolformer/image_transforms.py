"""The options of the image processor and what they do to one image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from PIL import Image


@dataclass
class Options:
    do_resize: bool = True
    size: Any = field(default_factory=lambda: {"shortest_edge": 224})
    crop_pct: float | None = 0.9
    resample: int = int(Image.Resampling.BICUBIC)
    do_center_crop: bool = True
    crop_size: Any = field(default_factory=lambda: {"height": 224, "width": 224})
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: Any = (0.485, 0.456, 0.406)
    image_std: Any = (0.229, 0.224, 0.225)
    do_convert_rgb: bool | None = None

    def __post_init__(self) -> None:
        self.size = _size_dict("size", self.size, square=False)
        self.crop_size = _size_dict("crop_size", self.crop_size, square=True)
        self.image_mean = _per_channel("image_mean", self.image_mean)
        self.image_std = _per_channel("image_std", self.image_std)
        if 0 in np.atleast_1d(self.image_std):
            raise ValueError(f"image_std is {self.image_std}; it divides, so no entry may be 0")
        if self.crop_pct is not None and not (_is_number(self.crop_pct) and self.crop_pct > 0):
            raise ValueError(
                f"crop_pct is {self.crop_pct!r}; pass a number > 0 (0.9: the crop is 90 % of the "
                "resized edge), or None to resize to `size` itself"
            )
        if not _is_number(self.rescale_factor):
            raise ValueError(f"rescale_factor is {self.rescale_factor!r}; pass a number like 1/255")
        try:
            self.resample = int(Image.Resampling(self.resample))
        except ValueError:
            choices = ", ".join(f"{int(r)} ({r.name})" for r in Image.Resampling)
            raise ValueError(f"resample is {self.resample!r}; pass one of {choices}") from None


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float, np.number))
        and not isinstance(value, bool)
        and math.isfinite(value)
    )


def _size_dict(name: str, size: Any, square: bool) -> dict[str, int]:
    if isinstance(size, (int, np.integer)) and not isinstance(size, bool):
        result = {"height": size, "width": size} if square else {"shortest_edge": size}
    elif isinstance(size, Mapping):
        result = {key: value for key, value in size.items() if value is not None}
    elif isinstance(size, (tuple, list)) and len(size) == 2:
        result = {"height": size[0], "width": size[1]}
    else:
        result = {}
    allowed = [{"height", "width"}] + ([] if square else [{"shortest_edge"}])
    if set(result) not in allowed:
        edge = "" if square else '{"shortest_edge": n} or '
        raise ValueError(
            f'{name} is {size!r}; pass an int, (height, width), {edge}{{"height": h, "width": w}}'
        )
    for value in result.values():
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {size!r}; every length must be an integer >= 1")
    return {key: int(value) for key, value in result.items()}


def _per_channel(name: str, values: Any) -> float | list[float]:
    if _is_number(values):
        return float(values)
    if (
        isinstance(values, (list, tuple, np.ndarray))
        and len(values)
        and all(map(_is_number, values))
    ):
        return [float(value) for value in values]
    raise ValueError(f"{name} is {values!r}; pass a number, or one number per channel")


OPTION_NAMES = {option.name for option in fields(Options)}


def without_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Drops the None that mean "as otherwise set"; crop_pct's None has a meaning of its own."""
    return {
        name: value for name, value in options.items() if value is not None or name == "crop_pct"
    }


def in_unit_range(image: np.ndarray) -> bool:
    return (
        image.dtype != np.uint8
        and image.min() >= 0
        and image.max() <= 1
        and not np.allclose(image, np.trunc(image))
    )


def transform(image: np.ndarray, options: Options, layout: str) -> np.ndarray:
    """(H, W, C) to one image of pixel_values in `layout`."""
    if options.do_resize:
        image = _resize(image, options)
    if options.do_center_crop:
        image = _center_crop(image, options.crop_size)
    if options.do_rescale:
        image = (image.astype(np.float64) * options.rescale_factor).astype(np.float32)
    if options.do_normalize:
        mean, std = (
            np.array(values, dtype=np.float32) for values in (options.image_mean, options.image_std)
        )
        for name, values in (("image_mean", mean), ("image_std", std)):
            if values.ndim and len(values) != image.shape[-1]:
                raise ValueError(
                    f"{name} has {len(values)} entries, the image has {image.shape[-1]} channels; "
                    "pass one entry per channel, or leave do_convert_rgb at None"
                )
        image = (image.astype(np.float32) - mean) / std
    if layout == "channels_first":
        image = np.moveaxis(image, -1, 0)
    return np.ascontiguousarray(image, np.uint8 if image.dtype == np.uint8 else np.float32)


def resized_shape(
    height: int, width: int, size: dict[str, int], crop_pct: float | None
) -> tuple[int, int]:
    scale = 1 if crop_pct is None else crop_pct
    edge = size.get("shortest_edge")
    if edge is None:
        if crop_pct is None or size["height"] != size["width"]:
            return int(size["height"] / scale), int(size["width"] / scale)
        edge = size["height"]
    edge = int(edge / scale)
    longer = int(edge * max(height, width) / min(height, width))
    return (longer, edge) if width <= height else (edge, longer)


def _resize(image: np.ndarray, options: Options) -> np.ndarray:
    """With Pillow, in 8 bits: a floating image is quantised to 0..255, as transformers does."""
    height, width = image.shape[:2]
    shape = resized_shape(height, width, options.size, options.crop_pct)
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 62)
    if min(shape) < 1 or shape[0] * shape[1] > limit:
        raise ValueError(
            f"an image of {height} x {width} pixels would be resized to "
            f"{shape[0]} x {shape[1]}; crop it first, or change size or crop_pct"
        )
    factor = _quantisation_factor(image)
    if factor is not None:
        image = (image.astype(np.float64) * factor).astype(np.float32).astype(np.uint8)
    flat = image[..., 0] if image.shape[-1] == 1 else image
    picture = Image.fromarray(np.ascontiguousarray(flat))
    resized = np.asarray(picture.resize(shape[::-1], options.resample))
    resized = resized.reshape(*shape, image.shape[-1])
    if factor == 255:
        return (resized.astype(np.float64) * (1 / 255)).astype(np.float32)
    return resized


def _quantisation_factor(image: np.ndarray) -> int | None:
    """To 0..255: 1 for floating whole numbers, 255 for floats in [0, 1], None for uint8."""
    if image.dtype == np.uint8:
        return None
    low, high = image.min(), image.max()
    if low >= 0 and high <= 255 and np.allclose(image, np.trunc(image)):
        return 1
    if low >= 0 and high <= 1:
        return 255
    raise ValueError(
        f"the floating image has values in [{low}, {high}]; resizing needs whole numbers in 0..255 "
        "or values in [0, 1]: scale it, or pass do_resize=False"
    )


def _center_crop(image: np.ndarray, size: dict[str, int]) -> np.ndarray:
    """The middle `size` of (H, W, C); zeros where the image is smaller."""
    output = np.zeros((size["height"], size["width"], image.shape[-1]), image.dtype)
    source, target = [], []
    for have, need in zip(image.shape[:2], output.shape[:2], strict=True):
        start = (have - need) // 2  # < 0 where the image is padded
        source.append(slice(max(start, 0), max(start, 0) + min(have, need)))
        target.append(slice(max(-start, 0), max(-start, 0) + min(have, need)))
    output[tuple(target)] = image[tuple(source)]
    return output

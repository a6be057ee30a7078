"""What counts as an image, and how each kind becomes an (H, W, C) array of 8-bit or float pixels.

Taken: PIL images of every mode, numpy arrays, CPU torch tensors, encoded bytes, paths of image
files, and lists of them, nested or not; 4-D arrays and tensors are batches.

    kind                                     becomes
    PIL 1, L, P, CMYK, YCbCr, HSV, LAB       RGB as Pillow converts it
    PIL or array with alpha                  RGB composited onto white
    PIL I;16*, I and uint16 arrays           16-bit: round(value / 257), so that 65535 is 255
    bool arrays                              0 and 255
    other integer arrays                     8-bit, and values outside 0..255 are an error
    grey arrays (H, W), one channel          RGB, the channel repeated
    floating arrays                          unchanged, in float32 or float64
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

_CHANNEL_COUNTS = (1, 3, 4)
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_KINDS = "a PIL image, a numpy array, a torch tensor, encoded bytes, a path, or a list of them"


def load_images(
    images: Any, input_data_format: str | None = None, convert_rgb: bool = True
) -> list[np.ndarray]:
    """Every image in `images`, flattened, as (H, W, C) arrays: all uint8, or all floating.

    `input_data_format` ("channels_first", "channels_last", "none" for grey without a channel axis)
    settles the layout of arrays and tensors; without it, the axis with 1, 3 or 4 entries is the
    channels, the first one if both could be. With `convert_rgb` C is 3 (2 is accepted, as grey and
    alpha, only under an explicit format).

    Raises TypeError for what is no image, ValueError for an image that cannot be used.
    """
    layout = getattr(input_data_format, "value", input_data_format)
    if layout not in (None, "channels_first", "channels_last", "none"):
        raise ValueError(
            f"input_data_format is {input_data_format!r}; "
            'pass "channels_first", "channels_last", "none" (grey, no channel axis) or None'
        )
    arrays = [_to_array(image, layout, convert_rgb) for image in _flatten(images, "images")]
    if not arrays:
        raise ValueError("images is empty; pass at least one image")
    if len({array.dtype == np.uint8 for array in arrays}) > 1:
        raise ValueError(
            f"the batch mixes integer and floating images (dtypes "
            f"{sorted({str(array.dtype) for array in arrays})}), and one rescale_factor cannot fit "
            "both; convert them to one kind or process them in two calls"
        )
    return arrays


def _flatten(images: Any, name: str) -> Iterator[Any]:
    if isinstance(images, (list, tuple)):
        nested = [isinstance(image, (list, tuple)) for image in images]
        if any(nested) and not all(nested):
            raise ValueError(
                f"{name} mixes images and lists of images; pass either a list of images or a list "
                "of lists"
            )
        for index, image in enumerate(images):
            yield from _flatten(image, f"{name}[{index}]")
    elif isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        yield from images
    elif isinstance(images, (Image.Image, np.ndarray, torch.Tensor, bytes, str, os.PathLike)):
        yield images
    else:
        raise TypeError(f"{name} is no image: got {type(images).__name__}; pass {_KINDS}")


def _to_array(image: Any, layout: str | None, convert_rgb: bool) -> np.ndarray:
    if isinstance(image, (bytes, str, os.PathLike)):
        image = _decode(image)
    if isinstance(image, Image.Image):
        image, layout = _from_pil(image, convert_rgb), "channels_last"
    elif isinstance(image, torch.Tensor):
        image = _from_torch(image)
    if 0 in image.shape:
        raise ValueError(f"the image is empty: got shape {image.shape}; every side must be >= 1")
    array = _channels_last(_to_pixels(image), layout)
    return _array_to_rgb(array) if convert_rgb else array


def _decode(source: bytes | str | os.PathLike) -> Image.Image:
    name = f"{len(source)} bytes" if isinstance(source, bytes) else f"{os.fspath(source)!r}"
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ValueError(f"{name} is an address; download it first and pass the file or its bytes")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise type(error)(f"no image file at {name}; pass the path of an image") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name} cannot be decoded as an image ({error}); "
            "pass a complete file of a format that Pillow reads (JPEG, PNG, WebP, ...)"
        ) from error


def _from_pil(image: Image.Image, convert_rgb: bool) -> np.ndarray:
    """(H, W) or (H, W, C): RGB if `convert_rgb` and the mode is an 8-bit one."""
    if 0 in image.size:
        raise ValueError(f"the image is empty: got {image.size[0]} x {image.size[1]} pixels")
    try:
        image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"the {image.format or 'PIL'} image cannot be decoded ({error}); pass a complete image"
        ) from error
    if image.mode == "I":  # how older Pillow opens 16-bit PNG files
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(
                f'a PIL image of mode "I" is read as 16-bit, but its values span '
                f"[{pixels.min()}, {pixels.max()}]; scale them to 0..65535 or convert the image"
            )
        return pixels.astype(np.uint16)
    if image.mode == "F" or image.mode.startswith("I;16"):
        return np.asarray(image)
    if image.mode == "La":
        image = image.convert("LA")
    if not convert_rgb:
        modes = {"1": "L", "P": image.palette.mode if image.palette else "RGB", "PA": "RGBA"}
        return np.asarray(image.convert(modes.get(image.mode, image.mode)))
    # Not `"A" in image.getbands()`: that is the colour axis of LAB too.
    palette_alpha = image.mode == "P" and image.palette and image.palette.mode == "RGBA"
    if image.mode in _ALPHA_MODES or palette_alpha or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _from_torch(image: torch.Tensor) -> np.ndarray:
    if image.device.type != "cpu":
        raise ValueError(f"the image tensor is on {image.device}; pass image.cpu()")
    if image.requires_grad:
        raise ValueError("the image tensor requires grad, which is lost; pass image.detach()")
    return (image.float() if image.dtype == torch.bfloat16 else image).numpy()


def _to_pixels(image: np.ndarray) -> np.ndarray:
    """The same values as uint8, float32 or float64."""
    if image.dtype == np.uint8:
        return image
    if image.dtype == np.bool_:
        return image.astype(np.uint8) * np.uint8(255)
    if image.dtype.kind == "u" and image.dtype.itemsize == 2:
        return ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if image.dtype.kind in "iu":
        if image.min() < 0 or image.max() > 255:
            raise ValueError(
                f"the {image.dtype} image has values in [{image.min()}, {image.max()}]; "
                "integer images need 0..255 (uint16: 0..65535)"
            )
        return image.astype(np.uint8)
    if image.dtype.kind == "f":
        return image.astype(np.float64 if image.dtype.itemsize >= 8 else np.float32)
    raise TypeError(f"the image has dtype {image.dtype}; pass integers, booleans or floats")


def _channels_last(image: np.ndarray, layout: str | None) -> np.ndarray:
    if image.ndim == 2 and layout in (None, "none", "channels_last"):
        return image[:, :, None]
    if image.ndim != 3 or layout == "none":
        raise ValueError(
            f"the image has shape {image.shape}"
            + (f" under input_data_format={layout!r}" if layout else "")
            + "; pass (H, W), (H, W, C) or (C, H, W), or a batch with one axis more"
        )
    first, last = image.shape[0], image.shape[2]
    if layout is None:
        if first not in _CHANNEL_COUNTS and last not in _CHANNEL_COUNTS:
            raise ValueError(
                f"neither end of the shape {image.shape} is a channel count (1, 3 or 4); "
                "pass an image with that many channels, or input_data_format"
            )
        if first in _CHANNEL_COUNTS and last in _CHANNEL_COUNTS:
            warnings.warn(
                f"both ends of the shape {image.shape} could be the channels; the first is taken: "
                "pass input_data_format to choose",
                stacklevel=5,
            )
        layout = "channels_first" if first in _CHANNEL_COUNTS else "channels_last"
    channels = first if layout == "channels_first" else last
    if channels not in (*_CHANNEL_COUNTS, 2):
        raise ValueError(
            f"the image has {channels} channels (shape {image.shape}, {layout}); "
            "pass 1, 3 or 4, or 2 for grey and alpha"
        )
    return np.moveaxis(image, 0, -1) if layout == "channels_first" else image


def _array_to_rgb(image: np.ndarray) -> np.ndarray:
    """(H, W, 1 to 4) to (H, W, 3): grey repeated, alpha composited onto white."""
    channels = image.shape[-1]
    if channels == 3:
        return image
    color = image[..., :-1] if channels in (2, 4) else image
    if channels in (2, 4):
        white = 255 if image.dtype == np.uint8 else 1.0
        if white == 1.0 and (image.min() < 0 or image.max() > 1):
            raise ValueError(
                f"the floating image with alpha has values in [{image.min()}, {image.max()}]; "
                "scale it to [0, 1], or drop the alpha channel"
            )
        alpha = image[..., -1:] / white
        color = color * alpha + (1 - alpha) * white
        color = (np.round(color) if white == 255 else color).astype(image.dtype)
    return np.repeat(color, 3, axis=-1) if color.shape[-1] == 1 else color

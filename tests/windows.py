"""Convolutions that the tests of patch_embed run: channels, geometry, images and their tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from poolformer_kernels import _extension

CPU = pytest.mark.skipif(_extension.load() is None, reason=str(_extension.why_not()))
LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [*cases.DTYPES, torch.float64]


@dataclass(frozen=True)
class Window:
    """Channels and geometry of a convolution, and the (B, H, W) that it is given."""

    channels: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    images: tuple[int, int, int]

    @property
    def geometry(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding}


WINDOWS = {
    "stem": Window((3, 64), (7, 7), (4, 4), (2, 2), (2, 33, 50)),
    "downsample": Window((20, 24), (3, 3), (2, 2), (1, 1), (3, 14, 14)),
    "wide": Window((64, 40), (3, 3), (2, 2), (1, 1), (2, 9, 37)),
    "deep": Window((300, 13), (3, 3), (2, 2), (1, 1), (1, 6, 5)),
    "patches": Window((5, 7), (2, 2), (2, 2), (0, 0), (1, 8, 9)),
    "padded": Window((8, 8), (3, 3), (1, 1), (2, 2), (2, 5, 4)),
    "channels": Window((12, 110), (3, 3), (2, 2), (1, 1), (1, 7, 7)),
    "one pixel": Window((16, 8), (3, 3), (2, 2), (1, 1), (9, 1, 1)),
    "gaps": Window((4, 6), (1, 1), (3, 3), (0, 0), (1, 10, 10)),
    "oblong": Window((4, 6), (3, 1), (2, 3), (0, 2), (2, 10, 10)),
    "dense": Window((64, 47), (3, 3), (2, 2), (1, 1), (1, 9, 9)),
    "dense groups": Window((320, 40), (3, 3), (2, 2), (1, 1), (1, 6, 6)),
    "many pixels": Window((6, 8), (3, 3), (2, 2), (1, 1), (4, 72, 80)),
    "many channels": Window((8, 200), (3, 3), (2, 2), (1, 1), (2, 12, 12)),
    "no image": Window((4, 6), (3, 3), (2, 2), (1, 1), (0, 8, 8)),
}


def tensors(
    window: Window, dtype: torch.dtype, x_format: torch.memory_format, w_format: torch.memory_format
) -> list[Tensor]:
    """x, weight and bias."""
    (inputs, outputs), (batch, height, width) = window.channels, window.images
    x = torch.randn(batch, inputs, height, width, dtype=torch.float64)
    depth = inputs * window.kernel[0] * window.kernel[1]
    weight = torch.randn(outputs, inputs, *window.kernel, dtype=torch.float64) / depth**0.5
    bias = torch.randn(outputs, dtype=torch.float64).to(dtype)
    return [
        x.to(dtype).contiguous(memory_format=x_format),
        weight.to(dtype).contiguous(memory_format=w_format),
        bias,
    ]

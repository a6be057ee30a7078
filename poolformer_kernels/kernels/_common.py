"""What the Triton kernels share: layouts, limits, and (count, mean, M2) statistics."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VECTOR_BYTES = 16  # the widest access of one thread
INDEX_LIMIT = 2**30  # offsets inside an image are 32-bit (a tile may look past its end)
MERGED_AT_ONCE = 64  # partial statistics that `merge_partials` loads at a time
REDUCING_PROGRAMS = 1024  # enough to fill a GPU; more would only write more partial sums
SUMMED_ROWS, SUMMED_CHANNELS = 64, 32  # of partial sums at once: pieces of 128 bytes


def check(op: str, x: Tensor) -> None:
    """Refuse an x that no Triton kernel of this package can work with."""
    if x.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(
            f"{op}: x is {x.dtype}; the Triton kernels take {names}. Convert x, or use "
            "backend='torch'."
        )
    elements = x.shape[1] * x.shape[2] * x.shape[3]
    if elements >= INDEX_LIMIT:
        raise ValueError(
            f"{op}: one image of x has {elements} elements; the Triton kernels index fewer than "
            f"{INDEX_LIMIT} in an image. Use smaller images, or backend='torch'."
        )


def dense(x: Tensor) -> tuple[Tensor, bool]:
    """x, copied only if it has gaps, in the memory format it suggests; and: is it channels_last."""
    memory_format = suggest_memory_format(x)
    return x.contiguous(memory_format=memory_format), memory_format == torch.channels_last


def empty_result(x: Tensor) -> Tensor:
    """What an op returns for x: dense, in the memory format that x suggests."""
    return torch.empty_like(x, memory_format=suggest_memory_format(x))


def dense_like(dy: Tensor, x: Tensor) -> Tensor:
    """dy in the dtype and the memory format of x, which is dense."""
    return dy.to(x.dtype).contiguous(memory_format=suggest_memory_format(x))


def dense_parameter(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device; this makes it that of x."""
    return torch.cuda.device_of(x)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@triton.jit
def sum_of_products(a, b):
    """Σ a·b, the products rounded before they are added.

    Fused into the sum's first addition they would not be, and threads that hold copies of the same
    element would disagree in the last bit: which of them wins would be chance.
    """
    return tl.sum(tl.fma(a, b, tl.zeros(a.shape, tl.float32)))


@triton.jit
def merge_partials(stats, image_group, partials, eps, BLOCK: tl.constexpr):
    """(mean, 1/std) of one image and group from its `partials` rows of (count, mean, M2).

    image_group: int64. The order of the sums is fixed. Means are taken relative to the first.
    """
    base = stats + image_group * partials * 3
    first_mean = tl.load(base + 1)
    count = tl.zeros((BLOCK,), tl.float32)
    shift = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, partials, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < partials
        part = tl.load(base + index * 3, mask=mask, other=0.0)
        mean = tl.load(base + index * 3 + 1, mask=mask, other=0.0)
        count += part
        shift += part * tl.where(mask, mean - first_mean, 0.0)
    total = tl.sum(count)
    mean_of_all = first_mean + tl.sum(shift) / total
    m2 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, partials, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < partials
        part = tl.load(base + index * 3, mask=mask, other=0.0)
        mean = tl.load(base + index * 3 + 1, mask=mask, other=0.0)
        distance = tl.where(mask, mean - mean_of_all, 0.0)
        m2 += tl.load(base + index * 3 + 2, mask=mask, other=0.0) + part * distance * distance
    return mean_of_all, tl.div_rn(1.0, tl.sqrt_rn(tl.sum(m2) / total + eps))


@triton.jit
def per_channel(vector, channels, mask):
    """A parameter's values in float32; 1 where there is none."""
    if vector is None:
        return tl.full(channels.shape, 1.0, tl.float32)
    else:
        return tl.load(vector + channels, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def per_image(factor, image):
    """An image's factor in float32; 1 where there is none."""
    if factor is None:
        return 1.0
    else:
        return tl.load(factor + image).to(tl.float32)


@triton.jit
def store_partial(stats, index, count, mean, m2):
    """Row `index` (int64) of partial statistics (count, mean, M2)."""
    tl.store(stats + index * 3, count)
    tl.store(stats + index * 3 + 1, mean)
    tl.store(stats + index * 3 + 2, m2)


@triton.jit
def sum_of_rows(matrix, rows, stride, columns, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Σ over `rows` rows of some columns of a float32 matrix, in a fixed order: (COLUMNS)."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        pointers = matrix + row.to(tl.int64)[:, None] * stride + columns[None, :]
        total += tl.load(pointers, mask=(row < rows)[:, None] & mask[None, :], other=0.0)
    return tl.sum(total, axis=0)

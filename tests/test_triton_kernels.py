"""The Triton kernels of pool_mixer and group_norm: interpreted, and what they index."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import torch
from cases import Case

pytest.importorskip("triton")

import triton
import triton.language as tl
from kernel_checks import Kernels

from benchmarks import ahead_of_time
from poolformer_kernels.kernels import _pooling, pool_mixer

BF16 = torch.bfloat16
OPS = ["pool_mixer", "group_norm"]


@pytest.mark.parametrize("op", OPS)
def test_in_the_interpreter(op: str, run_python) -> None:
    program = Path(__file__).with_name("kernel_checks.py")
    done = run_python(str(program), op, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("checked 8"), done.stdout


def recorded(op: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> list:
    """The launches of a forward without statistics and of a backward."""
    case, kernels = Case(shape), Kernels(op, "triton")
    x = torch.empty(shape, dtype=dtype, device="meta")
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    params = [torch.empty(shape[1], dtype=dtype, device="meta")] * (3 if op == "pool_mixer" else 2)
    with ahead_of_time.recorded() as launches:
        _, saved, *_ = kernels.forward(case, x, params, return_stats=True)
        kernels.backward(case, torch.empty_like(x), x, saved, params)
    return launches


@pytest.mark.parametrize("op", OPS)
def test_offsets_of_tensors_beyond_2_to_the_31_are_64_bit(op: str) -> None:
    for layout in ("nchw", "channels_last"):
        launches = recorded(op, (4096, 64, 112, 112), layout, BF16)
        assert len(launches) == 5
        for launch in launches:
            names = {"x", "y", "dy", "dx"} & dict(launch.signature).keys()
            code = ahead_of_time.compiled(launch, "sm_80")
            if names:
                types = ahead_of_time.offsets_of(code, tuple(sorted(names)))
                assert types == {"i64"}, f"{launch.name}: {types}"


@pytest.mark.parametrize("op", OPS)
def test_what_the_kernels_cannot_do_is_refused(op: str) -> None:
    case, kernels = Case((1, 2, 3, 4)), Kernels(op, "triton")
    params = [torch.empty(2)] * (3 if op == "pool_mixer" else 2)
    with pytest.raises(TypeError, match="float64"):
        kernels.forward(case, torch.empty(case.shape, dtype=torch.float64), params)
    with pytest.raises(ValueError, match="elements"):
        kernels.forward(case, torch.empty((1, 2, 2**15, 2**15), device="meta"), params)


@triton.jit
def offsets_kernel(out, image, channels, height, width, CHANNELS_LAST: tl.constexpr):
    offset, _, _, view = _pooling.view_of(
        tl.cast(image, tl.int64), 4, 8, channels, channels, height, width, 1, CHANNELS_LAST, 4, 8
    )
    offsets, _ = _pooling.row_of(view, 2)
    index = tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + index, offset + offsets)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_offsets_of_an_image_beyond_2_to_the_31_elements(channels_last: bool) -> None:
    image, channels, height, width = 4095, 64, 112, 112
    out = torch.empty((4, 8), dtype=torch.int64, device="cuda")
    offsets_kernel[(1,)](out, image, channels, height, width, channels_last)
    row, column, channel = 2, 4 + torch.arange(4)[:, None], 8 + torch.arange(8)[None, :]
    if channels_last:
        expected = ((image * height + row) * width + column) * channels + channel
    else:
        expected = ((image * channels + channel) * height + row) * width + column
    assert expected.min() > 2**31 and torch.equal(out.cpu(), expected)


def test_large_images_have_few_partial_statistics() -> None:
    for channels_last in (False, True):
        for dtype in cases.DTYPES:
            for height in (1, 7, 56, 333, 2048):
                parts = pool_mixer.stats_partials((1, 64, height, height), 1, channels_last, dtype)
                assert 1 <= parts <= 2 * pool_mixer.MOST_PARTIALS

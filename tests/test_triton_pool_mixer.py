"""The Triton kernels of pool_mixer: interpreted, on a GPU, and compiled for other GPUs."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import torch
from cases import CASES, LAYOUTS, Case

from poolformer_kernels import reference

pytest.importorskip("triton")

import triton
import triton.language as tl
import triton_checks as checks

from benchmarks import ahead_of_time
from poolformer_kernels.kernels import _pooling, pool_mixer

OP = "pool_mixer"
BF16 = torch.bfloat16
# Every case in every layout; the other dtypes where they take other paths.
GRID = [(case, layout, BF16) for case in CASES for layout in LAYOUTS] + [
    (case, layout, dtype)
    for case in CASES[:3]
    for layout in ("nchw", "channels_last")
    for dtype in (torch.float32, torch.float16)
]


def test_in_the_interpreter(run_python) -> None:
    program = Path(__file__).with_name("triton_checks.py")
    done = run_python(str(program), OP, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("checked 8"), done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "layout", "dtype"), GRID, ids=str)
def test_forward_and_gradients(case: Case, layout: str, dtype: torch.dtype) -> None:
    checks.assert_right(OP, case, layout, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 2, 100])
def test_given_statistics_are_used_and_merged(parts: int) -> None:
    case = Case((2, 4, 20, 20), num_groups=2, mean=5.0)
    x, params = cases.random_input(case, "nchw", torch.float32), cases.parameters(OP, case, BF16)
    params = [p.float() for p in params]
    pixels = x.flatten(2).unflatten(2, (parts, -1)).unsqueeze(-1)
    stats = torch.cat([reference.statistics(pixels[:, :, i], 2) for i in range(parts)], 2).cuda()
    x = x.cuda()
    whole, parted, wrong = (
        checks.forward(OP, case, x, params, {}, s)[0]
        for s in (None, stats, stats * torch.tensor([1.0, 1.0, 4.0], device="cuda"))
    )
    torch.testing.assert_close(parted, whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wrong, whole, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_same_bits_on_every_run(layout: str) -> None:
    case = Case((2, 24, 9, 7))
    x, params = cases.random_input(case, layout, torch.float32), cases.parameters(OP, case, BF16)
    x, params = x.cuda(), [p.float() for p in params]
    dy = torch.randn(case.shape).cuda()
    runs = []
    for _ in range(2):
        y, saved, *_ = checks.forward(OP, case, x, params, {})
        runs.append([y, saved, *checks.backward(OP, case, dy, x, saved, params, {})])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
def test_a_gradient_that_repeats_one_number() -> None:
    case = Case((2, 8, 5, 4))
    x, params = cases.random_input(case, "channels_last", BF16), cases.parameters(OP, case, BF16)
    _, saved, *_ = checks.forward(OP, case, x.cuda(), params, {})
    one = torch.ones((), dtype=BF16, device="cuda")
    ours, expected = (
        checks.backward(OP, case, dy, x.cuda(), saved, params, {})
        for dy in (one.expand(case.shape), one.expand(case.shape).contiguous())
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 64, 28, 28), (3, 96, 14, 14), (2, 512, 7, 7)], ids=str)
def test_bytes_and_launches(shape: tuple[int, int, int, int]) -> None:
    pytest.importorskip("simgpu", reason="only a simulated GPU counts bytes")
    case = Case(shape)
    x, params = cases.random_input(case, "channels_last", BF16), cases.parameters(OP, case, BF16)
    x, dy = x.cuda(), torch.randn_like(x).cuda()
    params = [p.cuda() for p in params]
    stats = reference.statistics(x, 1)
    with checks.counted() as launches:
        _, saved, *_ = checks.forward(OP, case, x, params, {}, stats, True)
    assert len(launches) == 1 and 2 <= checks.passes(launches, x) <= 2.1
    with checks.counted() as launches:
        checks.backward(OP, case, dy, x, saved, params, {})
    assert len(launches) == 3 and 5 <= checks.passes(launches, x) <= 5.2


def recorded(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> list:
    """The launches of a forward without statistics and of a backward."""
    case = Case(shape)
    x = torch.empty(shape, dtype=dtype, device="meta")
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    params = [torch.empty(shape[1], dtype=dtype, device="meta")] * 3
    with ahead_of_time.recorded() as launches:
        _, saved, *_ = checks.forward(OP, case, x, params, {}, None, True)
        checks.backward(OP, case, torch.empty_like(x), x, saved, params, {})
    return launches


def test_offsets_of_tensors_beyond_2_to_the_31_are_64_bit() -> None:
    for layout in ("nchw", "channels_last"):
        launches = recorded((4096, 64, 112, 112), layout, BF16)
        assert len(launches) == 5
        for launch in launches:
            names = {"x", "y", "dy", "dx"} & dict(launch.signature).keys()
            code = ahead_of_time.compiled(launch, "sm_80")
            if names:
                types = ahead_of_time.offsets_of(code, tuple(sorted(names)))
                assert types == {"i64"}, f"{launch.name}: {types}"


def test_what_the_kernels_cannot_do_is_refused() -> None:
    case = Case((1, 2, 3, 4))
    params = [torch.empty(2)] * 3
    with pytest.raises(TypeError, match="float64"):
        checks.forward(OP, case, torch.empty(case.shape, dtype=torch.float64), params, {})
    with pytest.raises(ValueError, match="elements"):
        checks.forward(OP, case, torch.empty((1, 2, 2**15, 2**15), device="meta"), params, {})


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_returned_statistics_are_those_of_the_result(dtype: torch.dtype, layout: str) -> None:
    for case in (CASES[0], CASES[2], Case((2, 8, 12, 10), mean=100.0)):
        x, params = cases.random_input(case, layout, dtype), cases.parameters(OP, case, dtype)
        options = cases.options(OP, case)
        y, _, stats = checks.forward(OP, case, x.cuda(), params, options, return_stats=True)
        parts = pool_mixer.stats_partials(
            case.shape, case.num_groups, layout == "channels_last", dtype
        )
        assert stats.shape == (case.shape[0], case.num_groups, parts, 3)
        exact = reference.statistics(y.cpu().double(), case.num_groups)[:, :, 0]
        count, mean, m2 = stats.cpu().double().unbind(-1)
        total = count.sum(-1)
        center = (count * mean).sum(-1) / total
        m2 = (m2 + count * (mean - center[..., None]) ** 2).sum(-1)
        assert torch.equal(total, exact[..., 0])
        torch.testing.assert_close(center, exact[..., 1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(m2, exact[..., 2], rtol=1e-5, atol=1e-6)


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


@pytest.mark.gpu
def test_a_dropped_image_is_passed_on_bit_by_bit() -> None:
    case = Case((2, 16, 6, 5), drop=True)
    x, params = cases.random_input(case, "channels_last", BF16), cases.parameters(OP, case, BF16)
    y = checks.forward(OP, case, x.cuda(), params, cases.options(OP, case))[0].cpu()
    assert torch.equal(y[0], x[0]) and not torch.equal(y[1], x[1])


def test_large_images_have_few_partial_statistics() -> None:
    for channels_last in (False, True):
        for dtype in cases.DTYPES:
            for height in (1, 7, 56, 333, 2048):
                parts = pool_mixer.stats_partials((1, 64, height, height), 1, channels_last, dtype)
                assert 1 <= parts <= 2 * pool_mixer.MOST_PARTIALS

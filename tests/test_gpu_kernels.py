"""The GPU launchers of pool_mixer and group_norm against float64, and what they move."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from cases import CASES, LAYOUTS, Case
from kernel_checks import BACKENDS, Kernels, on

import poolformer_kernels as pk
from poolformer_kernels import reference
from poolformer_kernels.ops import _common

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", BACKENDS)]
BOTH = pytest.mark.parametrize("op", ["pool_mixer", "group_norm"])
BF16 = torch.bfloat16
WIDER = [
    Case((2, 8, 5, 6), pool_size=1),
    Case((1, 16, 9, 13), pool_size=7, drop=True),
    Case((7, 40, 4, 3), num_groups=5, drop=True),
    Case((1, 24, 3, 70), num_groups=3),
]
# Every case in every layout; the other dtypes where they take other paths.
GRID = [(case, layout, BF16) for case in CASES + WIDER for layout in LAYOUTS] + [
    (case, layout, dtype)
    for case in CASES[:4] + WIDER
    for layout in ("nchw", "channels_last")
    for dtype in (torch.float32, torch.float16)
]


@BOTH
@pytest.mark.parametrize(("case", "layout", "dtype"), GRID, ids=str)
def test_forward_and_gradients(
    op: str, backend: str, case: Case, layout: str, dtype: torch.dtype
) -> None:
    Kernels(op, backend).assert_right(case, layout, dtype)


@BOTH
@pytest.mark.parametrize("parts", [1, 2, 100])
def test_given_statistics_are_used_and_merged(op: str, backend: str, parts: int) -> None:
    case = Case((2, 4, 20, 20), num_groups=2, mean=5.0)
    x, params = cases.random_input(case, "nchw", torch.float32), cases.parameters(op, case, BF16)
    params = [p.float() for p in params]
    pixels = x.flatten(2).unflatten(2, (parts, -1)).unsqueeze(-1)
    stats = torch.cat([reference.statistics(pixels[:, :, i], 2) for i in range(parts)], 2).cuda()
    whole, parted, wrong = (
        Kernels(op, backend).forward(case, x.cuda(), params, stats=s)[0]
        for s in (None, stats, stats * torch.tensor([1.0, 1.0, 4.0], device="cuda"))
    )
    torch.testing.assert_close(parted, whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wrong, whole, atol=1e-2)


@BOTH
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_statistics_survive_a_mean_far_from_zero(op: str, backend: str, layout: str) -> None:
    case = Case((2, 16, 40, 33), num_groups=2, mean=1000.0)
    x, params = cases.random_input(case, layout, torch.float32), cases.parameters(op, case, BF16)
    _, saved, *_ = Kernels(op, backend).forward(case, x.cuda(), [p.float() for p in params])
    exact = x.double().unflatten(1, (2, -1)).flatten(2)
    rstd = 1 / (exact.var(-1, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(saved[..., 0].cpu().double(), exact.mean(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(saved[..., 1].cpu().double(), rstd, rtol=3e-6, atol=0)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("pool_size", [3, 5])
def test_pooling_moves_no_image_to_one_side(pool_size: int, layout: str, backend: str) -> None:
    """A rounded 1/9 errs in the same direction everywhere, and layers would add that up."""
    torch.manual_seed(0)
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    means = torch.linspace(-3, 3, 16).view(1, -1, 1, 1)
    x, dy = ((means + torch.randn(1, 16, 20, 20)).contiguous(memory_format=memory) for _ in "xy")
    results = []
    for dtype, device, name in ((torch.float32, "cuda", backend), (torch.float64, "cpu", "torch")):
        leaf = x.to(device, dtype).requires_grad_()
        y = pk.pool_mixer(leaf, None, None, pool_size=pool_size, backend=name)
        results.append(on("cpu", y.detach(), torch.autograd.grad(y, leaf, dy.to(y))[0]))
    for ours, exact in zip(*results, strict=True):
        assert (ours.double() - exact).mean((2, 3)).square().mean().sqrt() < 2e-8


@BOTH
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_same_bits_on_every_run(op: str, backend: str, layout: str) -> None:
    case, kernels = Case((2, 24, 9, 7)), Kernels(op, backend)
    x, params = cases.random_input(case, layout, torch.float32), cases.parameters(op, case, BF16)
    x, params = x.cuda(), [p.float() for p in params]
    dy = torch.randn(case.shape).cuda()
    runs = []
    for _ in range(2):
        y, saved, *stats = kernels.forward(case, x, params, return_stats=True)
        runs.append([y, saved, *stats, *kernels.backward(case, dy, x, saved, params)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@BOTH
def test_a_gradient_that_repeats_one_number(op: str, backend: str) -> None:
    case, kernels = Case((2, 8, 5, 4)), Kernels(op, backend)
    x, params = cases.random_input(case, "channels_last", BF16), cases.parameters(op, case, BF16)
    _, saved, *_ = kernels.forward(case, x.cuda(), params)
    one = torch.ones((), dtype=BF16, device="cuda")
    ours, expected = (
        kernels.backward(case, dy, x.cuda(), saved, params)
        for dy in (one.expand(case.shape), one.expand(case.shape).contiguous())
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_returned_statistics_are_those_of_the_result(
    backend: str, dtype: torch.dtype, layout: str
) -> None:
    op = "pool_mixer"
    for case in (CASES[0], CASES[2], Case((2, 8, 12, 10), mean=100.0)):
        x, params = cases.random_input(case, layout, dtype), cases.parameters(op, case, dtype)
        options, x = cases.options(op, case), x.cuda()
        y, _, stats = Kernels(op, backend).forward(case, x, params, options, return_stats=True)
        fake = _common.fake_stats(op, x, case.num_groups, True, backend)
        assert stats.shape == fake.shape and stats.dtype == fake.dtype
        exact = reference.statistics(y.cpu().double(), case.num_groups)[:, :, 0]
        count, mean, m2 = stats.cpu().double().unbind(-1)
        total = count.sum(-1)
        center = (count * mean).sum(-1) / total
        m2 = (m2 + count * (mean - center[..., None]) ** 2).sum(-1)
        assert torch.equal(total, exact[..., 0])
        torch.testing.assert_close(center, exact[..., 1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(m2, exact[..., 2], rtol=1e-5, atol=1e-6)


def test_a_dropped_image_is_passed_on_bit_by_bit(backend: str) -> None:
    op, case = "pool_mixer", Case((2, 16, 6, 5), drop=True)
    x, params = cases.random_input(case, "channels_last", BF16), cases.parameters(op, case, BF16)
    y = Kernels(op, backend).forward(case, x.cuda(), params, cases.options(op, case))[0].cpu()
    assert torch.equal(y[0], x[0]) and not torch.equal(y[1], x[1])


def passes(launches: list[dict[str, Any]], tensor_bytes: int) -> float:
    """Distinct bytes of each launch, summed, in units of the bytes of x."""
    moved = sum(n["unique_load_bytes"] + n["unique_store_bytes"] for n in launches)
    return moved / tensor_bytes


@BOTH
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(layout, dtype) for layout in ("channels_last", "nchw") for dtype in ("bfloat16", "float32")],
)
def test_bytes_and_launches(
    op: str, backend: str, layout: str, dtype: str, run_python: Any, tmp_path: Path
) -> None:
    """PoolFormer-S12's stages, and 96 channels. S: one pass over x."""
    pytest.importorskip("simgpu", reason="only a simulated GPU counts bytes")
    if backend == "triton" and (layout, dtype) != ("channels_last", "bfloat16"):
        pytest.skip("Triton's are counted in the layout and dtype that it is meant for")
    shapes = ["1x64x56x56", "1x128x28x28", "1x320x14x14", "1x512x7x7", "1x96x28x28"]
    if op == "group_norm" or backend == "triton":  # partial sums of several images: two a channel
        shapes[3] = "2x512x7x7" if op == "pool_mixer" else "4x512x7x7"
    program = Path(__file__).with_name("count_traffic.py")
    trace = str(tmp_path / "trace")
    done = run_python(str(program), op, backend, layout, dtype, *shapes, SIMGPU_TRACE=trace)
    assert done.returncode == 0, done.stderr
    most = {"forward, statistics given": (1, 2.1), "forward": (2, 3.1), "backward": (3, 5.2)}
    for shape, calls in json.loads(done.stdout).items():
        itemsize = getattr(torch, dtype).itemsize
        tensor_bytes = itemsize * torch.Size(int(n) for n in shape.split("x")).numel()
        for call, (count, limit) in most.items():
            moved = passes(calls[call], tensor_bytes)
            # One image whose sums are those of one part needs no launch that adds them up.
            fewest = count - (backend == "cuda" and call == "backward" and shape.startswith("1x"))
            assert fewest <= len(calls[call]) <= count, (shape, call)
            assert limit - 0.2 < moved <= limit, (shape, call, moved)
            if backend == "cuda":
                for n in calls[call]:
                    fetched = 32 * (n["load_sectors"] + n["store_sectors"])
                    asked = n["load_bytes"] + n["store_bytes"]
                    small = asked < tensor_bytes / 4  # the sum of parameters' gradients
                    assert small or fetched <= 1.05 * asked, (shape, n["kernel"], fetched / asked)
                    if layout == "nchw":  # what windows share is read once
                        least = n["unique_load_bytes"] + n["unique_store_bytes"]
                        assert small or fetched <= 1.25 * least, (shape, n["kernel"], fetched)

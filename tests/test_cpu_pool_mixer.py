"""The C++ mixer on every instruction set this machine runs: windows, borders, statistics."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import Case

import poolformer_kernels as pk
from poolformer_kernels import _extension, reference

if _extension.load() is None:
    pytest.skip(str(_extension.why_not()), allow_module_level=True)

OP = "pool_mixer"


@pytest.mark.parametrize("pool_size", [3, 5])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_pooling_moves_no_image_to_one_side(layout: str, pool_size: int, capability: str) -> None:
    """A rounded 1/9 errs in the same direction everywhere, and layers would add that up."""
    torch.manual_seed(0)
    size, mean = (1, 32, 40, 40), 3.0
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, dy = ((mean + torch.randn(size)).contiguous(memory_format=memory) for _ in range(2))
    results = []
    for dtype, backend in ((torch.float32, "cpu"), (torch.float64, "torch")):
        leaf = x.to(dtype).requires_grad_()
        y = pk.pool_mixer(leaf, None, None, pool_size=pool_size, backend=backend)
        results.append((y.detach(), torch.autograd.grad(y, leaf, dy.to(dtype))[0]))
    for ours, exact in zip(*results, strict=True):
        assert (ours.double() - exact).mean().abs() < 5e-9 * mean


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("height", [1, 2, 3, 5])
def test_windows_of_images_of_any_width(
    height: int, layout: str, dtype: torch.dtype, capability: str
) -> None:
    """Rows of one to five vectors of any capability, whole and not, and of blocks of channels."""
    for width in (*range(1, 10), 15, 16, 17, 24, 31, 33, 40, 47, 48, 49, 63, 64, 65, 80):
        case = Case((2, 51, height, width))
        x, params = cases.random_input(case, layout, dtype), cases.parameters(OP, case, dtype)
        dy = cases.layout_of(torch.randn_like(x), layout)
        ours, exact = (
            cases.run(
                op, x.to(kind), [None if p is None else p.to(kind) for p in params], dy.to(kind)
            )
            for op, kind in ((pk.pool_mixer, dtype), (reference.pool_mixer, torch.float64))
        )
        tolerance = 1e-12 if dtype == torch.float64 else 2e-5
        for a, b in zip(ours, exact, strict=True):
            error = (a.double() - b).abs().max()
            assert error <= tolerance * (1 + b.abs().max()), f"{error} at a width of {width}"


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_statistics_of_an_output_with_another_mean_than_the_input(
    layout: str, capability: str
) -> None:
    """x + 6/7 (P x - x) of x = (0, 1, 0) is 3/7 everywhere: far from x's mean, by its deviation."""
    x = torch.tensor([0.0, 1.0, 0.0]).expand(1, 32, 1, 3) + 1e-4 * torch.randn(1, 32, 1, 3)
    weight = (6 / 7 * (x.double().var(correction=0) + 1e-5).sqrt()).float().expand(32)
    leaf = cases.layout_of(x, layout)
    y, stats = pk.pool_mixer(leaf, weight, None, return_stats=True, backend="cpu")
    exact = reference.statistics(y.double(), 1)
    assert exact[..., 2] / exact[..., 0] < 1e-6
    torch.testing.assert_close(stats.double(), exact, rtol=1e-4, atol=0)

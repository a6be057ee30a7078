"""The CUDA kernels of mlp against float64, on a GPU or the simulated one; and what they count."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import cases
import mlp_checks as checks
import pytest
import torch
from cases import DTYPES, Case
from mlp_checks import SHAPES, arguments, launch
from torch import Tensor

from poolformer_kernels import _extension

_C = _extension.load()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hasattr(_C, "cuda_mlp_forward"), reason="built without CUDA"),
]
forward = getattr(_C, "cuda_mlp_forward", None)


def partials(case: Case, z: Tensor) -> int:
    return _C.cuda_stats_partials("mlp", *case.shape[1:], case.num_groups, True, z.element_size())


@pytest.fixture
def tf32() -> Iterator[None]:
    """Products of float32 may be rounded."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_forward(case: Case, layout: str, dtype: torch.dtype) -> None:
    checks.assert_forward(forward, partials, case, layout, dtype)


@pytest.mark.parametrize("layout", ["sliced", "permuted", "expanded"])
@pytest.mark.parametrize("index", [0, 2])
def test_layouts_that_are_copied(index: int, layout: str) -> None:
    checks.assert_forward(forward, partials, SHAPES[index], layout, torch.float16)


@pytest.mark.parametrize("products", DTYPES[1:], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", [SHAPES[i] for i in (0, 3, 8, 11)], ids=str)
def test_float32_around_16_bit_products(case: Case, layout: str, products: torch.dtype) -> None:
    checks.assert_mixed(forward, case, layout, products)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [SHAPES[i] for i in (0, 2, 3, 4, 9, 11)], ids=str)
def test_the_hidden_is_kept(case: Case, dtype: torch.dtype) -> None:
    checks.assert_hidden(forward, case, dtype)


@pytest.mark.parametrize("shape", [(2, 12, 6, 8), (1, 200, 6, 3)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_given_statistics(shape: tuple[int, int, int, int], groups: int) -> None:
    checks.assert_given_statistics(forward, Case(shape, num_groups=groups, mean=5.0, hidden=24))


@pytest.mark.parametrize("case", [Case((3, 16, 20, 7)), Case((2, 200, 3, 3), hidden=40)], ids=str)
def test_same_bits_on_every_run(case: Case) -> None:
    x, params, options = arguments(case, torch.float16)
    first, second = (launch(forward, x.cuda(), params, options, None, True, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_view_that_does_not_start_on_16_bytes() -> None:
    case = Case((1, 16, 4, 4))
    x, params, options = arguments(case, torch.bfloat16)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape).copy_(x)
    z, *_ = launch(forward, shifted, params, options)
    assert torch.equal(z, launch(forward, x.cuda(), params, options)[0])


def test_float32_products_round_only_where_pytorch_may(tf32: None) -> None:
    x, params, options = arguments(Case((1, 40, 4, 4), hidden=72), torch.float32)
    exact = cases.oracle("mlp", x, params, **options)[0]

    def error() -> float:
        z = launch(forward, x.cuda(), params, options)[0].cpu().double()
        return ((z - exact).norm() / exact.norm()).item()

    rounded = error()
    torch.backends.cuda.matmul.allow_tf32 = False
    assert error() < 3e-7 and 1e-5 < rounded < 2e-3


def test_what_no_kernel_takes_is_refused_before_a_launch() -> None:
    x, params, options = arguments(SHAPES[0], torch.float64)
    with pytest.raises(TypeError, match=r"x is Double; .* take .* backend='torch'"):
        launch(forward, x.cuda(), params, options)
    x, params, options = arguments(Case((1, 2056, 1, 1), hidden=1), torch.float32)
    with pytest.raises(ValueError, match=r"2056 channels; .* at most 2048.*backend='triton'"):
        launch(forward, x.cuda(), params, options)
    x, params, options = arguments(SHAPES[0], torch.float16)
    with pytest.raises(ValueError, match=r"norm_weight has shape \[3\]; it needs \(64\)"):
        launch(forward, x.cuda(), [params[0][:3], *params[1:]], options)
    with pytest.raises(TypeError, match=r"x is Half, fc1_weight Float"):
        weights = [p.float() if i in (2, 4) else p for i, p in enumerate(params)]
        launch(forward, x.cuda(), weights, options)


COUNTED = """
import sys
import torch, cases
from cases import Case
from mlp_checks import arguments, launch
from poolformer_kernels import _extension, reference

torch.backends.cuda.matmul.allow_tf32 = True
dtype = getattr(torch, sys.argv[1])
x, params, options = arguments(Case(tuple(map(int, sys.argv[2:]))), dtype)
stats = reference.statistics(x, 1).float().cuda()
x = x.cuda().contiguous(memory_format=torch.channels_last)
params = [p.cuda() for p in params]
launch(_extension.load().cuda_mlp_forward, x, params, options, stats, return_stats=True)
print(sum(p.numel() * p.element_size() for p in params))
"""


@pytest.mark.parametrize(
    ("shape", "dtype", "passes", "launches"),
    [
        ("1 64 32 16", "bfloat16", 2.2, 1),
        ("1 96 16 16", "bfloat16", 2.2, 1),
        ("1 128 16 16", "bfloat16", 2.2, 1),
        ("1 192 16 16", "bfloat16", 2.2, 1),
        ("1 256 16 8", "bfloat16", 11.3, 2),
        ("1 320 14 14", "bfloat16", 11.3, 2),
        ("1 64 16 8", "float32", 11.3, 2),
    ],
)
def test_what_a_forward_moves(
    shape: str,
    dtype: str,
    passes: float,
    launches: int,
    run_python: Callable[..., CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    """Distinct bytes but for parameters, in passes over x; matrix instructions; bank conflicts."""
    pytest.importorskip("simgpu", reason="only the simulated GPU counts")
    program, trace = tmp_path / "program.py", tmp_path / "trace"
    program.write_text(COUNTED)
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    folders.append(os.environ.get("PYTHONPATH", ""))
    done = run_python(
        str(program),
        dtype,
        *shape.split(),
        SIMGPU_TRACE=str(trace),
        PYTHONPATH=os.pathsep.join(filter(None, folders)),
    )
    assert done.returncode == 0, done.stderr
    counts = [n for n in map(json.loads, trace.read_text().splitlines()) if n["kind"] == "cuda"]
    moved = sum(n["unique_load_bytes"] + n["unique_store_bytes"] for n in counts)
    size = torch.Size(map(int, shape.split())).numel() * getattr(torch, dtype).itemsize
    assert len(counts) == launches
    assert (moved - int(done.stdout)) / size <= passes
    for n in counts:
        assert n["mma"] > 0
        assert n["bank_conflicts"] <= 0.1 * n["shared_requests"], n["kernel"]

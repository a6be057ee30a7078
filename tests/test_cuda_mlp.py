"""The CUDA kernels of mlp against float64, on a GPU or the simulated one; and what they count."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import cases
import pytest
import torch
from cases import DTYPES, Case
from mlp_checks import FAR_FROM_ZERO, SHAPES, Launchers, setup

from poolformer_kernels import _extension

_C = _extension.load()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hasattr(_C, "cuda_mlp_forward"), reason="built without CUDA"),
]


def partials(
    shape: torch.Size, groups: int, channels_last: bool, products: torch.dtype, dtype: torch.dtype
) -> int:
    return _C.cuda_stats_partials("mlp", *shape[1:], groups, channels_last, products.itemsize)


MLP = Launchers(
    getattr(_C, "cuda_mlp_forward", None),
    getattr(_C, "cuda_mlp_backward", None),
    partials,
    statistics_rtol=2e-5,  # a thread's mean has few digits left: 1.05e-5 has been seen
)
ONE_OF_EACH = [  # fused, two products of small tiles and of large, groups, an odd width
    *(SHAPES[i] for i in (0, 2, 3, 8, 11, 12)),
    Case((3, 256, 9, 8), hidden=256, drop=True),
]


@pytest.fixture
def tf32() -> Iterator[None]:
    """Products of float32 may be rounded."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", [*SHAPES, ONE_OF_EACH[-1]], ids=str)
def test_forward_and_gradients(case: Case, layout: str, dtype: torch.dtype) -> None:
    MLP.assert_right(case, layout, dtype)


@pytest.mark.parametrize("layout", ["sliced", "permuted", "expanded"])
@pytest.mark.parametrize("index", [0, 2])
def test_layouts_that_are_copied(index: int, layout: str) -> None:
    MLP.assert_right(SHAPES[index], layout, torch.float16)


@pytest.mark.parametrize("products", DTYPES[1:], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", [*ONE_OF_EACH, *FAR_FROM_ZERO], ids=str)
def test_float32_around_16_bit_products(case: Case, layout: str, products: torch.dtype) -> None:
    MLP.assert_right(case, layout, torch.float32, products)


@pytest.mark.parametrize("shape", [(2, 12, 6, 8), (1, 200, 6, 3)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_given_statistics(shape: tuple[int, int, int, int], groups: int) -> None:
    case = Case(shape, num_groups=groups, mean=5.0, hidden=24)
    MLP.assert_given_statistics(case, torch.float16)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_same_bits_on_every_run(case: Case) -> None:
    MLP.assert_same_bits(case)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("channels", [16, 208])
def test_a_constant_image(channels: int, groups: int) -> None:
    MLP.assert_constant_image(Case((1, channels, 3, 3), num_groups=groups, hidden=40))


def test_a_view_that_does_not_start_on_16_bytes() -> None:
    x, params, options, dz = (
        [t if t is None else t.cuda() for t in given] if isinstance(given, list) else given
        for given in setup(Case((1, 16, 4, 4), hidden=24), torch.bfloat16)
    )

    def shifted(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    results = []
    for move in (lambda t: t, shifted):
        there, given = move(x.cuda()), [move(p) for p in params]
        z, saved, _, hidden = MLP.forward(there, given, options, save_hidden=True)
        grads = (
            MLP.backward(move(dz.cuda()), there, saved, kept, given, options)
            for kept in (move(hidden), None)
        )
        results.append([z, *(grad for each in grads for grad in each)])
    assert shifted(x).data_ptr() % 16
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_float32_products_round_only_where_pytorch_may(tf32: None) -> None:
    x, params, options, dz = setup(Case((1, 40, 4, 4), hidden=72), torch.float32)
    exact = cases.oracle("mlp", x, params, dz, **options)

    def errors() -> list[float]:
        z, saved, *_ = MLP.forward(x.cuda(), params, options)
        ours = [z, *MLP.backward(dz.cuda(), x.cuda(), saved, None, params, options)]
        pairs = zip(ours, exact, strict=True)
        return [((a.cpu().double() - b).norm() / b.norm()).item() for a, b in pairs]

    rounded = errors()
    torch.backends.cuda.matmul.allow_tf32 = False
    assert max(errors()) < 2e-6
    # db2 is no product, and z and dx are the residual's for the most part.
    assert all(1e-5 < e < 2e-3 for i, e in enumerate(rounded) if i != 7), rounded


def test_what_no_kernel_takes_is_refused_before_a_launch() -> None:
    x, params, options, _ = setup(SHAPES[0], torch.float64)
    with pytest.raises(TypeError, match=r"x is Double; .* take .* backend='torch'"):
        MLP.forward(x.cuda(), params, options)
    x, params, options, dz = setup(Case((1, 2056, 1, 1), hidden=1), torch.float32)
    saved = torch.ones(1, 1, 2).cuda()
    too_many = r"2056 channels; .* at most 2048.*backend='triton'"
    with pytest.raises(ValueError, match=too_many):
        MLP.forward(x.cuda(), params, options)
    with pytest.raises(ValueError, match=too_many):
        MLP.backward(dz.cuda(), x.cuda(), saved, None, params, options)
    x, params, options, _ = setup(SHAPES[0], torch.float16)
    with pytest.raises(ValueError, match=r"norm_weight has shape \[3\]; it needs \(64\)"):
        MLP.forward(x.cuda(), [params[0][:3], *params[1:]], options)
    with pytest.raises(TypeError, match=r"x is Half, fc1_weight Float"):
        weights = [p.float() if i in (2, 4) else p for i, p in enumerate(params)]
        MLP.forward(x.cuda(), weights, options)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dz": torch.ones(2, 64, 7, 6)}, r"dz has shape \[2, 64, 7, 6\]; it has to be that of x"),
        ({"saved": torch.ones(2, 2)}, r"saved has shape \[2, 2\]; it has to be \(2, G, 2\)"),
        ({"saved": torch.ones(2, 1, 2).double()}, "saved is Double; it has to be float32"),
        ({"hidden": torch.ones(2, 7, 256)}, r"hidden has shape .* it has to be \(2, H, W, 256\)"),
        ({"hidden": torch.ones(2, 7, 7, 256)}, "hidden is Float; it has to be Half as fc1_weight"),
    ],
)
def test_what_does_not_fit_the_forward_is_refused(
    changes: dict[str, torch.Tensor], reason: str
) -> None:
    x, params, options, dz = setup(SHAPES[0], torch.float16)
    given = {"dz": dz, "x": x, "saved": torch.ones(2, 1, 2), "hidden": None, **changes}
    given = {name: None if t is None else t.cuda() for name, t in given.items()}
    with pytest.raises((TypeError, ValueError), match=reason):
        MLP.backward(*given.values(), params, options)


COUNTED = """
import sys
import torch
from cases import Case
from mlp_checks import setup
from poolformer_kernels import reference
from test_cuda_mlp import MLP

torch.backends.cuda.matmul.allow_tf32 = True
direction, dtype, *shape = sys.argv[1:]
x, params, options, dz = setup(Case(tuple(map(int, shape))), getattr(torch, dtype))
stats = reference.statistics(x, 1).float().cuda()
x, dz = (MLP.there(t, "channels_last") for t in (x, dz))
params = [p.cuda() for p in params]
if direction == "forward":
    MLP.forward(x, params, options, stats, return_stats=True)
else:
    saved = torch.stack([stats[:, :, 0, 1], torch.ones_like(stats[:, :, 0, 1])], -1)
    MLP.backward(dz, x, saved, None, params, options)
print(sum(p.numel() * p.element_size() for p in params))
"""


@pytest.fixture
def counted(
    run_python: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> Callable[[str, str, str], tuple[list[dict[str, Any]], float, float]]:
    """What each launch counts, and the bytes of x and of the parameters."""
    pytest.importorskip("simgpu", reason="only the simulated GPU counts")

    def count(direction: str, shape: str, dtype: str) -> tuple[list[dict[str, Any]], float, float]:
        program, trace = tmp_path / "program.py", tmp_path / "trace"
        program.write_text(COUNTED)
        folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
        folders.append(os.environ.get("PYTHONPATH", ""))
        done = run_python(
            str(program),
            direction,
            dtype,
            *shape.split(),
            SIMGPU_TRACE=str(trace),
            PYTHONPATH=os.pathsep.join(filter(None, folders)),
        )
        assert done.returncode == 0, done.stderr
        counts = [n for n in map(json.loads, trace.read_text().splitlines()) if n["kind"] == "cuda"]
        size = torch.Size(map(int, shape.split())).numel() * getattr(torch, dtype).itemsize
        return counts, size, int(done.stdout)

    return count


def moved(counts: list[dict[str, Any]]) -> int:
    """Distinct bytes of each launch, summed."""
    return sum(n["unique_load_bytes"] + n["unique_store_bytes"] for n in counts)


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
    shape: str, dtype: str, passes: float, launches: int, counted: Callable[..., Any]
) -> None:
    """Distinct bytes but for parameters, in passes over x; matrix instructions; bank conflicts."""
    counts, size, parameters = counted("forward", shape, dtype)
    assert len(counts) == launches
    assert (moved(counts) - parameters) / size <= passes
    for n in counts:
        assert n["mma"] > 0
        assert n["bank_conflicts"] <= 0.1 * n["shared_requests"], n["kernel"]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ("1 64 32 16", "bfloat16"),
        ("1 256 16 8", "float16"),
        ("2 320 7 7", "bfloat16"),
        ("1 64 16 8", "float32"),
    ],
)
def test_what_a_backward_moves(shape: str, dtype: str, counted: Callable[..., Any]) -> None:
    """27 passes over x, of which 8 are the hidden's gradient and the activated, twice each; then
    what is there whatever the batch: parameters, and float32 sums of the weights' gradients."""
    counts, size, parameters = counted("backward", shape, dtype)
    names = [n["kernel"] for n in counts]
    of_images = ["hidden_gradient", "input_gradient", "parts_kernel"]
    assert len(counts) == 6
    kernels = [next(n for n in counts if name in n["kernel"]) for name in of_images]
    batch, channels, height, width = map(int, shape.split())
    parts = -(-batch * -(-height * width // (16 if dtype == "float32" else 32)) // 4)
    sums = parts * 2 * 4 * channels**2 * 4
    assert moved(kernels) <= 27.3 * size + sums + 1.6 * parameters, names  # fc1_weight twice
    rest = [n for n in counts if n not in kernels]
    assert moved(rest) <= 1.1 * sums + 3 * parameters, names
    for n in counts:
        assert n["bank_conflicts"] <= 0.1 * n["shared_requests"], n["kernel"]
        assert n["mma"] > 0 or n in rest

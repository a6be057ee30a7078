"""The CUDA C++ kernels: direct calls, and which elements threads have."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from cases import Case
from conftest import ROOT
from kernel_checks import NO_CUDA, Kernels

import build_plan
from poolformer_kernels import _extension, reference

BUILT = pytest.mark.skipif(NO_CUDA, reason="CUDA kernels are not built here")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def test_every_element_has_one_place(tmp_path: Path) -> None:
    compiler = build_plan.find_compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program = tmp_path / "check_layout"
    source = Path(__file__).with_name("check_layout.cpp")
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*compiler.split(), *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("checked 80"), done.stdout


@BUILT
def test_partial_statistics_do_not_depend_on_the_batch_and_are_few() -> None:
    partials = _extension.load().cuda_stats_partials
    for channels_last in (False, True):
        for itemsize in (2, 4):
            for height in (1, 7, 56, 333, 2048):
                assert (
                    1 <= partials("pool_mixer", 64, height, 56, 1, channels_last, itemsize) <= 512
                )
    with pytest.raises(ValueError, match="op is 'group_norm'"):
        partials("group_norm", 64, 7, 7, 1, True, 2)


@pytest.mark.gpu
@BUILT
@pytest.mark.parametrize("op", ["pool_mixer", "group_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_tensors_that_do_not_start_on_16_bytes(op: str, dtype: torch.dtype) -> None:
    case, kernels = Case((3, 8, 5, 4)), Kernels(op, "cuda")
    x, dy = torch.randn(2, *case.shape).to(dtype).cuda()
    params = [p.cuda() for p in cases.parameters(op, case, dtype)]

    def shifted(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    results = []
    for move in (lambda t: t, shifted):
        y, saved, *_ = kernels.forward(case, move(x), [move(p) for p in params])
        grads = kernels.backward(case, move(dy), move(x), saved, [move(p) for p in params])
        results.append([y, *grads])
    assert shifted(x).data_ptr() % 16 and shifted(x).is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_every_launch_is_given_the_stream() -> None:
    """A kernel on the default stream would do nothing in a captured graph."""
    launches = {
        (path.name, found)
        for path in SOURCES
        for found in re.findall(r"<<<(.*?)>>>", path.read_text(), re.DOTALL)
    }
    assert len(launches) >= 12
    assert not [launch for launch in launches if not launch[1].endswith(", stream")]


X = torch.randn(2, 8, 5, 4)
V, K, STATS, SAVED = torch.ones(8), torch.ones(2), torch.ones(2, 1, 1, 3), torch.ones(2, 1, 2)
FORWARD = {
    "x": X,
    "stats": STATS,
    "norm_weight": V,
    "layer_scale": V,
    "drop_path": K,
    "pool_size": 3,
    "num_groups": 1,
    "eps": 1e-5,
    "return_stats": True,
}
BACKWARD = {"dy": X, "x": X, "saved": SAVED, "norm_weight": V, "layer_scale": V, "drop_path": K}
BACKWARD["pool_size"] = 3
NORM = {"x": X, "stats": STATS, "weight": V, "bias": V, "num_groups": 1, "eps": 1e-5}
NORM_BACKWARD = {"dy": X, "x": X, "saved": SAVED, "weight": V}
GOOD = {
    "pool_mixer_forward": FORWARD,
    "pool_mixer_backward": BACKWARD,
    "group_norm_forward": NORM,
    "group_norm_backward": NORM_BACKWARD,
}
ON_CPU = {"x": X, "stats": STATS, "norm_weight": V, "weight": V, "drop_path": K, "dy": X}
ON_CPU |= {"saved": SAVED, "bias": V, "layer_scale": V}
ANY = [
    ({"x": X[0]}, ValueError, r"x has shape \[8, 5, 4\]; it has to be \(B, C, H, W\)"),
    ({"x": X.long()}, TypeError, "x is Long"),
    ({"x": X.double()}, TypeError, "x is Double; the CUDA kernels take float32"),
    ({"x": X[:, :4]}, ValueError, "needs|has to be"),
    ({"x": X.half()}, TypeError, "convert one of them"),
]
BAD = [
    *((name, *bad) for name in GOOD for bad in ANY),
    *(
        (name, {key: ("cpu", ON_CPU[key])}, ValueError, f"{key} is on cpu")
        for name, good in GOOD.items()
        for key in good.keys() & ON_CPU.keys()
    ),
    ("pool_mixer_forward", {"pool_size": 2}, ValueError, "pool_size is 2"),
    ("pool_mixer_backward", {"pool_size": -1}, ValueError, "pool_size is -1"),
    ("pool_mixer_forward", {"num_groups": 3}, ValueError, "num_groups is 3"),
    ("group_norm_forward", {"eps": -1.0}, ValueError, "eps is -1"),
    ("pool_mixer_forward", {"layer_scale": V[:3]}, ValueError, r"layer_scale has shape \[3\]"),
    ("pool_mixer_forward", {"drop_path": K.half()}, TypeError, "drop_path is Half"),
    ("pool_mixer_backward", {"drop_path": V}, ValueError, r"one factor an image, \(2\)"),
    ("group_norm_forward", {"stats": STATS[:1]}, ValueError, r"stats has shape \[1, 1, 1, 3\]"),
    ("group_norm_forward", {"stats": STATS.half()}, TypeError, "stats is Half"),
    ("pool_mixer_backward", {"saved": SAVED.half()}, TypeError, "saved is Half"),
    ("group_norm_backward", {"saved": SAVED[0]}, ValueError, r"saved has shape \[1, 2\]"),
    ("group_norm_backward", {"saved": torch.ones(2, 3, 2)}, ValueError, "num_groups is 3"),
    ("group_norm_backward", {"dy": X[:1]}, ValueError, r"dy has shape \[1, 8, 5, 4\]"),
]


def on_gpu(value: Any) -> Any:
    if isinstance(value, tuple):
        return value[1]
    return value.cuda() if isinstance(value, torch.Tensor) else value


@pytest.mark.gpu
@BUILT
@pytest.mark.parametrize(("name", "bad", "error", "message"), BAD)
def test_direct_calls_are_checked(
    name: str, bad: dict[str, Any], error: type, message: str
) -> None:
    function = getattr(_extension.load(), f"cuda_{name}")
    good = {key: on_gpu(value) for key, value in GOOD[name].items()}
    function(**good)
    with pytest.raises(error, match=message) as raised:
        function(**{**good, **{key: on_gpu(value) for key, value in bad.items()}})
    assert str(raised.value).startswith(("pool_mixer: ", "group_norm: "))


@pytest.mark.gpu
@BUILT
def test_images_too_large_for_32_bits_are_refused() -> None:
    x = torch.empty(1, device="cuda").expand(1, 2, 2**15, 2**15)
    with pytest.raises(ValueError, match=r"index fewer than 1073741824 in an image\. Use"):
        _extension.load().cuda_group_norm_forward(x, None, None, None, 1, 1e-5)


@pytest.mark.gpu
@BUILT
@pytest.mark.slow
def test_more_images_than_a_grid_has_in_z() -> None:
    case, kernels = Case((65537, 1, 1, 2)), Kernels("pool_mixer", "cuda")
    x, params = torch.randn(case.shape), [torch.rand(1) for _ in range(3)]
    stats = reference.statistics(x, 1).cuda()
    y, saved, _ = kernels.forward(case, x.cuda(), params, stats=stats)
    torch.testing.assert_close(y.cpu(), reference.pool_mixer(x, *params), rtol=1e-4, atol=1e-4)
    dx, dgamma, *_ = kernels.backward(case, x.cuda(), x.cuda(), saved, params)
    _, exact, exact_dgamma, *_ = cases.oracle("pool_mixer", x, params, x)
    torch.testing.assert_close(dx.cpu().double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dgamma.cpu().double(), exact_dgamma, rtol=1e-4, atol=1e-4)

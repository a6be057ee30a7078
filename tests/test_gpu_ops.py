"""The ops on a GPU through their public form: dispatcher, autograd, fakes, accelerate, training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cases
import pytest
import torch
from cases import Case
from kernel_checks import BACKENDS, NO_CUDA, NO_TRITON
from torch import Tensor

import poolformer_kernels as pk
from poolformer_kernels import fused, modules, reference
from poolformer_kernels.ops import _common

pytestmark = pytest.mark.gpu
OPS = [
    pytest.param(op, *backend.values, marks=backend.marks, id=f"{op}-{backend.values[0]}")
    for op in ("pool_mixer", "mlp", "group_norm")
    for backend in BACKENDS
]
CONFIG = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_labels": 4}
CASE = Case((2, 24, 7, 5), drop=True, hidden=40)


def on_gpu(value: Any) -> Any:
    return value.cuda() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(("op", "backend"), OPS)
def test_forward_and_gradients(op: str, backend: str, layout: str, dtype: torch.dtype) -> None:
    x = cases.random_input(CASE, layout, dtype)
    params, options = cases.parameters(op, CASE, dtype), cases.options(op, CASE)
    dy = torch.randn(CASE.shape).to(dtype)
    eager = cases.run(getattr(reference, op), x, params, dy, **options)
    exact = cases.oracle(op, x, params, dy, **options)
    x = cases.layout_of(x.cuda(), layout)
    params = [on_gpu(p) for p in params]
    options = {name: on_gpu(value) for name, value in options.items()}
    ours = cases.run(getattr(pk, op), x, params, dy.cuda(), backend=backend, **options)
    cases.assert_as_exact_as_eager([t.cpu() for t in ours], eager, exact)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.skipif(NO_TRITON, reason="Triton is not installed")
def test_auto_takes_the_kernels(autocast: bool) -> None:
    wide = torch.cuda.get_device_capability()[0] in (9, 10, 11)  # matrix instructions
    for op, act, triton in (
        ("pool_mixer", None, NO_CUDA),
        ("group_norm", None, NO_CUDA),
        ("mlp", "gelu", NO_CUDA or wide),
    ):
        chosen = pk.backends.resolve(op, "cuda", torch.bfloat16, act, True, autocast)
        assert chosen == ("triton" if triton else "cuda")


@pytest.mark.skipif(NO_CUDA or NO_TRITON, reason="it needs the kernels of both backends")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_statistics_go_from_cuda_kernels_to_triton(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = cases.layout_of(cases.random_input(CASE, layout, torch.float32).cuda(), layout)
    block = modules.PoolFormerBlock(24, 40, layer_scale_init_value=0.5).cuda().eval()
    given = []

    def mlp(*args: Any, **kwargs: Any) -> Tensor:
        given.append(kwargs["stats"])
        return pk.mlp(*args, **kwargs)

    monkeypatch.setattr(fused, "mlp", mlp)
    with torch.no_grad():
        result = block(x)
        y = pk.pool_mixer(x, block.before_norm.weight, None, block.layer_scale_1, return_stats=True)
        with pk.use_backend("torch"):
            torch.testing.assert_close(result, block(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(given[0], y[1]) and given[1] is None


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "backend"), OPS)
def test_autocast_follows_eager(
    op: str, backend: str, dtype: torch.dtype, x_dtype: torch.dtype
) -> None:
    """Parameters in float32, x as a block before or a convolution under autocast returns it."""
    case = Case(CASE.shape, drop=True, hidden=40, mean=10.0)
    x = cases.random_input(case, "channels_last", x_dtype).cuda()
    params = [on_gpu(p) for p in cases.parameters(op, case, torch.float32)]
    options = {name: on_gpu(value) for name, value in cases.options(op, case).items()}
    dy = torch.randn(case.shape).cuda()
    results = []
    for name in (backend, "torch"):
        with torch.autocast("cuda", dtype):
            results.append(cases.run(getattr(pk, op), x, params, dy, backend=name, **options))
    exact = cases.oracle(op, x, params, dy, **options)
    cases.assert_as_exact_as_eager(*results, exact)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(("op", "backend"), [p for p in OPS if p.values[0] != "group_norm"])
def test_fakes_agree_with_the_kernels(op: str, backend: str, layout: str) -> None:
    x = cases.random_input(CASE, layout, torch.float32).cuda()
    x = cases.layout_of(x, layout)
    params = [on_gpu(p) for p in cases.parameters(op, CASE, torch.float32)]
    if op == "pool_mixer":
        args: tuple[Any, ...] = (x, None, params[0], params[2], None, 3, 1, 1e-5, True, backend)
    else:
        args = (x, None, *params, None, None, "gelu", 1, 1e-5, True, True, backend)
    real = getattr(torch.ops.poolformer_kernels, f"{op}_fwd")(*args)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        fake = getattr(torch.ops.poolformer_kernels, f"{op}_fwd")(*fakes)
    for a, b in zip(real, fake, strict=True):
        assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


@pytest.mark.parametrize("op", ["pool_mixer", "group_norm"])
def test_another_backend_cannot_run_on_a_gpu(op: str) -> None:
    """A call of the dispatcher, past the choice of a backend in Python."""
    x, saved = torch.randn(2, 8, 4, 5).cuda(), torch.ones(2, 1, 2).cuda()
    vectors: tuple[Any, ...] = (None, None)
    forward: tuple[Any, ...] = (1, 1e-5)
    backward: tuple[Any, ...] = (None,)
    if op == "pool_mixer":
        vectors, forward, backward = (None,) * 3, (3, *forward, False), (*vectors, None, 3)
    ops = torch.ops.poolformer_kernels
    for direction, given in (
        ("fwd", (x, None, *vectors, *forward)),
        ("bwd", (x, x, saved, *backward)),
    ):
        with pytest.raises(ValueError, match=f"^{op}: the tensors are on a GPU and backend is"):
            getattr(ops, f"{op}_{direction}")(*given, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_saves_the_hidden_only_if_asked_to(backend: str, dtype: torch.dtype) -> None:
    x = cases.random_input(CASE, "channels_last", dtype).cuda()
    params = [on_gpu(p) for p in cases.parameters("mlp", CASE, dtype)]
    dz = torch.randn(CASE.shape).to(dtype).cuda()
    results, saved = [], []
    for save_hidden in (False, True):
        sizes: list[int] = []

        def pack(t: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            how = {"save_hidden": save_hidden, "backend": backend}
            results.append(cases.run(pk.mlp, x, params, dz, **how))
        saved.append(sum(sizes))
    batch, _, height, width = CASE.shape
    assert saved[1] - saved[0] == batch * height * width * CASE.hidden
    exact = cases.oracle("mlp", x, params, dz)
    cases.assert_as_exact_as_eager(*results, exact)


@contextmanager
def running(backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[str, str, str]]]:
    """In this context our models run on `backend`.

    Gives the (op, direction, backend) of every GPU kernel that is asked for.
    """
    asked: set[tuple[str, str, str]] = set()
    find = _common.gpu_kernel

    def gpu_kernel(op: str, direction: str, backend: str) -> Any:
        asked.add((op, direction, backend))
        return find(op, direction, backend)

    with monkeypatch.context() as patched, pk.use_backend(backend):
        patched.setattr(_common, "gpu_kernel", gpu_kernel)
        yield asked


def assert_all_ran(asked: set[tuple[str, str, str]], backend: str) -> None:
    ops = ("pool_mixer", "mlp", "group_norm")
    assert asked >= {(op, way, backend) for op in ops for way in ("forward", "backward")}


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_model_is_as_exact_as_eager(
    backend: str, dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and every gradient, with layer scales that hide no error."""
    config = pk.PoolFormerConfig(**CONFIG, layer_scale_init_value=0.7)
    model = pk.PoolFormerForImageClassification(config).to(dtype).train()
    x = torch.randn(2, 3, 48, 40).to(dtype)
    upstream = torch.randn(2, 4).to(dtype)

    def run(model: torch.nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
        logits = model(x).logits
        return [logits, *torch.autograd.grad(logits, list(model.parameters()), upstream)]

    with pk.use_backend("torch"):
        eager = run(model, x, upstream)
        exact = run(copy.deepcopy(model).double(), x.double(), upstream.double())
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = model.to("cuda", memory_format=memory_format)
    with running(backend, monkeypatch) as asked:
        ours = run(model, cases.layout_of(x.cuda(), layout), upstream.cuda())
    assert_all_ran(asked, backend)
    cases.assert_as_exact_as_eager([t.cpu() for t in ours], eager, exact)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_follows_eager(
    backend: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pk.PoolFormerConfig(**CONFIG, drop_path_rate=0.1, layer_scale_init_value=0.5)
    torch.manual_seed(0)
    start = pk.PoolFormerForImageClassification(config).state_dict()
    x, labels = torch.randn(4, 3, 32, 32).cuda(), torch.tensor([0, 1, 2, 3]).cuda()

    def losses() -> list[float]:
        model = pk.PoolFormerForImageClassification(config).cuda().train()
        model.load_state_dict(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found = []
        torch.manual_seed(1)
        for _ in range(20):
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss = model(x, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    with pk.use_backend("torch"):
        eager = losses()
    with running(backend, monkeypatch) as asked:
        ours = losses()
    assert_all_ran(asked, backend)
    assert sum(eager[-5:]) < 0.8 * sum(eager[:5]), eager
    tolerance = 5e-2 if autocast else 2e-3
    torch.testing.assert_close(ours, eager, rtol=tolerance, atol=tolerance)

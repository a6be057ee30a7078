"""patch_embed, the convolution that begins a stage: the op, its module, and accelerate."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import accelerated
import cases
import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from windows import CPU, DTYPES, LAYOUTS, WINDOWS, Window, tensors

import poolformer_kernels as pk
from poolformer_kernels import embeddings, reference


@CPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("w_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("x_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_as_exact_as_eager(
    window: Window,
    x_format: torch.memory_format,
    w_format: torch.memory_format,
    dtype: torch.dtype,
    capability: str,
) -> None:
    args = tensors(window, dtype, x_format, w_format)
    ours = pk.patch_embed(*args, **window.geometry, backend="cpu")
    eager = reference.patch_embed(*args, **window.geometry)
    assert ours.dtype == dtype and (ours.stride() == eager.stride() or not len(ours))
    exact = cases.oracle("patch_embed", args[0], args[1:], **window.geometry)
    if dtype == torch.float64:
        torch.testing.assert_close(ours, exact[0], rtol=1e-12, atol=1e-12)
    else:
        cases.assert_as_exact_as_eager([ours], [eager], exact)


@CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", ["stem", "deep", "one pixel", "many pixels", "many channels"])
def test_same_bits_on_any_number_of_threads(
    window: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    args = [t.requires_grad_() for t in tensors(WINDOWS[window], dtype, *LAYOUTS)]
    results = []
    for count in (1, 2, 3):
        threads(count)
        y = pk.patch_embed(*args, **WINDOWS[window].geometry, backend="cpu")
        results.append([y, *torch.autograd.grad((y * y).sum(), args)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_whether_threads_share_pixels_or_not(
    dtype: torch.dtype, capability: str, threads: Callable[[int], None]
) -> None:
    """Two threads have tiles of their own here, where one and eight share all pixels."""
    torch.manual_seed(0)
    side = {"default": 14, "avx2": 22}.get(capability, 28)  # of 6 to 11 panels
    x, weight = torch.randn(1, 90, side, side).to(dtype), torch.randn(20, 90, 3, 3).to(dtype)
    results = []
    for count in (1, 2, 8):
        threads(count)
        results.append(pk.patch_embed(x, weight, stride=2, padding=1, backend="cpu"))
    assert all(torch.equal(results[0], other) for other in results[1:])


@CPU
@pytest.mark.parametrize("layout", cases.LAYOUTS[2:])
def test_any_strides(layout: str) -> None:
    x = torch.randn(2, 4, 9, 8)
    weight, bias = torch.randn(6, 4, 3, 3), torch.randn(6).repeat_interleave(2)[::2]
    x = x[:1].expand(2, -1, -1, -1) if layout == "expanded" else cases.layout_of(x, layout)
    wide = cases.layout_of(weight, "sliced")
    result = pk.patch_embed(x, wide, bias, stride=2, padding=1, backend="cpu")
    expected = reference.patch_embed(x.contiguous(), weight, bias, stride=2, padding=1)
    torch.testing.assert_close(result, expected)


@CPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_opcheck(dtype: torch.dtype, layout: torch.memory_format) -> None:
    one = tensors(WINDOWS["one pixel"], dtype, torch.contiguous_format, layout)
    torch.library.opcheck(
        torch.ops.poolformer_kernels.patch_embed_fwd.default, (*one, [2, 2], [1, 1], "cpu")
    )
    args = tensors(WINDOWS["oblong"], dtype, torch.contiguous_format, layout)
    torch.library.opcheck(
        torch.ops.poolformer_kernels.patch_embed_fwd.default, (*args, [2, 3], [0, 2], "cpu")
    )
    dy = torch.randn_like(reference.patch_embed(*args, **WINDOWS["oblong"].geometry))
    for wanted in ([True, True, True], [False, True, False]):
        torch.library.opcheck(
            torch.ops.poolformer_kernels.patch_embed_bwd.default,
            (dy, *args[:2], [2, 3], [0, 2], wanted, "cpu"),
        )


@CPU
def test_compiles_whole_for_any_size() -> None:
    module = embeddings.PatchEmbed(3, 8, 7, 4, 2)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, edge in ((1, 32), (3, 40), (2, 36)):
        x = torch.randn(batch, 3, edge, edge)
        torch.testing.assert_close(compiled(x), nn.Conv2d.forward(module, x))
        compiled(x).sum().backward()
    assert module.weight.grad is not None


@CPU
@pytest.mark.parametrize("grad", [False, True])
def test_autocast_gives_eagers_dtypes(grad: bool) -> None:
    window = WINDOWS["downsample"]
    args = [t.requires_grad_(grad) for t in tensors(window, torch.float32, *LAYOUTS)]
    exact = cases.oracle("patch_embed", args[0], args[1:], **window.geometry)
    with torch.autocast("cpu", torch.bfloat16):
        ours = pk.patch_embed(*args, **window.geometry, backend="cpu")
        eager = reference.patch_embed(*args, **window.geometry)
    assert ours.dtype == eager.dtype == torch.bfloat16
    cases.assert_as_exact_as_eager([ours.detach()], [eager.detach()], exact)
    if grad:
        gradients = torch.autograd.grad(ours.float().sum(), args)
        assert [g.dtype for g in gradients] == [torch.float32] * 3


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.zeros(4, 8, 8)}, ValueError, r"x has shape \(4, 8, 8\)"),
    ({"x": torch.zeros(1, 4, 8, 8, dtype=torch.int32)}, TypeError, "x is torch.int32"),
    ({"x": torch.zeros(1, 5, 8, 8)}, ValueError, r"weight has shape .*\(C, 5, kernel height"),
    ({"x": torch.zeros(1, 4, 8, 8).half()}, TypeError, "weight is torch.float32 and x is .*16"),
    ({"x": torch.zeros(1, 4, 2, 8), "padding": 0}, ValueError, r"smaller than the window \(3, 3\)"),
    ({"weight": [1]}, TypeError, "weight is a list"),
    ({"weight": torch.zeros(6, 4)}, ValueError, r"weight has shape \(6, 4\)"),
    ({"bias": torch.zeros(5)}, ValueError, r"bias has shape \(5,\)"),
    ({"stride": 0}, ValueError, "stride is 0; it has to be one or two ints of at least 1"),
    ({"stride": (2, 2, 2)}, ValueError, "stride is"),
    ({"padding": -1}, ValueError, "padding is -1"),
    ({"padding": 1.0}, ValueError, "padding is 1.0"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    args: dict[str, Any] = {
        "x": torch.zeros(1, 4, 8, 8),
        "weight": torch.zeros(6, 4, 3, 3),
        "bias": torch.zeros(6),
        "stride": 2,
        "padding": 1,
    }
    with pytest.raises(error, match=message):
        pk.patch_embed(**(args | change))


BAD_DIRECT: list[tuple[dict[int, Any], type[Exception], str]] = [
    ({0: torch.zeros(1, 5, 8, 8)}, ValueError, "needs .C, 5, kernel height"),
    ({0: torch.zeros(1, 4, 1, 8), 4: [0, 0]}, ValueError, "smaller than the window"),
    ({1: torch.zeros(6, 4, 3, 3).half()}, TypeError, "weight is Half and x is Float"),
    ({1: torch.zeros(6, 4, 0, 3)}, ValueError, "weight has shape"),
    ({2: torch.zeros(5)}, ValueError, "bias has shape"),
    ({3: [0, 1]}, ValueError, "stride is"),
    ({4: [0, -1]}, ValueError, "padding is"),
    ({5: "cuda"}, ValueError, "backend is 'cuda'"),
]


@CPU
@pytest.mark.parametrize(("change", "error", "message"), BAD_DIRECT)
def test_the_kernel_refuses_what_it_cannot_read(
    change: dict[int, Any], error: type[Exception], message: str
) -> None:
    args = [torch.zeros(1, 4, 8, 8), torch.zeros(6, 4, 3, 3), torch.zeros(6), [2, 2], [1, 1], "cpu"]
    for place, value in change.items():
        args[place] = value
    with pytest.raises(error, match=message):
        torch.ops.poolformer_kernels.patch_embed_fwd(*args)
    if 2 not in change:
        x, weight, _, *geometry, backend = args
        with pytest.raises(error, match=message):
            torch.ops.poolformer_kernels.patch_embed_bwd(
                torch.zeros(1, 6, 4, 4), x, weight, *geometry, [True] * 3, backend
            )


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the results of `patch_embed` from now on."""
    shapes: list[tuple[int, ...]] = []
    op = embeddings.patch_embed

    def counted(*args: Any, **options: Any) -> Tensor:
        y = op(*args, **options)
        shapes.append(tuple(y.shape))
        return y

    monkeypatch.setattr(embeddings, "patch_embed", counted)
    return shapes


@CPU
@pytest.mark.parametrize("source", accelerated.SOURCES)
def test_accelerated_embeddings(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerated.make(source)
    shapes, x = count_calls(monkeypatch), torch.randn(2, 3, 64, 64)
    keys, before = list(model.state_dict()), str(model)
    with pk.use_backend("torch"), torch.inference_mode():
        expected = accelerated.logits(model, x)
    shapes.clear()
    pk.accelerate(model)
    with torch.inference_mode():
        torch.testing.assert_close(accelerated.logits(model, x), expected, rtol=1e-4, atol=1e-5)
    assert shapes == [(2, c, e, e) for c, e in zip(accelerated.WIDTHS, (16, 8, 4, 2), strict=True)]
    assert list(model.state_dict()) == keys and str(model) == before
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        shapes.clear()
        with torch.inference_mode():
            torch.testing.assert_close(accelerated.logits(twin, x), expected, rtol=1e-4, atol=1e-5)
        assert len(shapes) == 4
    pk.restore(model)
    shapes.clear()
    model(x)
    assert len(shapes) == (4 if source is accelerated.own else 0)


def convolution(model: nn.Module) -> nn.Conv2d:
    return embeddings.embedding_convolutions(model)[1]


@CPU
def test_hooks_and_replacements_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pk.accelerate(accelerated.make(accelerated.hugging_face))
    shapes, x, seen = count_calls(monkeypatch), torch.randn(1, 3, 64, 64), []
    handle: RemovableHandle = convolution(model).register_forward_hook(
        lambda module, inputs, output: seen.append(tuple(output.shape))
    )
    model(x)
    assert seen == [(1, 16, 8, 8)] and len(shapes) == 4
    handle.remove()

    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    stage = model.get_submodule("poolformer.encoder.patch_embeddings.1")
    stage.projection = Doubled(8, 16, 3, 2, 1)
    pk.accelerate(model)
    shapes.clear()
    model(x)
    assert type(stage.projection) is Doubled and len(shapes) == 3


@CPU
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv2d(4, 8, 3, dilation=2),
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 8, 3, padding="same"),
    ],
    ids=["groups", "dilation", "padding_mode", "same"],
)
def test_other_convolutions_run_as_they_are(
    conv: nn.Conv2d, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, x = count_calls(monkeypatch), torch.randn(1, 4, 9, 9)

    class PatchEmbed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = conv

    expected, model = conv(x), PatchEmbed()
    embeddings.accelerate_embeddings(model, None)
    assert torch.equal(model.proj(x), expected) and not shapes


def test_gpu_backends_leave_it_to_pytorch() -> None:
    x, weight = torch.randn(1, 3, 9, 9), torch.randn(4, 3, 3, 3)
    expected = reference.patch_embed(x, weight, stride=2)
    for backend in ("triton", "cuda", "torch"):
        assert torch.equal(pk.patch_embed(x, weight, stride=2, backend=backend), expected)

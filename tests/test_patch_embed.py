"""patch_embed, the convolution that begins a stage: the op, its module, and accelerate."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import accelerated
import cases
import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import poolformer_kernels as pk
from poolformer_kernels import _extension, embeddings, reference

CPU = pytest.mark.skipif(_extension.load() is None, reason="no CPU kernels")
OP = "poolformer_kernels::patch_embed_fwd"
LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [*cases.DTYPES, torch.float64]


@dataclass(frozen=True)
class Window:
    """Channels and geometry of a convolution, and the (B, H, W) that it is given."""

    channels: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    images: tuple[int, int, int]

    @property
    def geometry(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding}


WINDOWS = {
    "stem": Window((3, 64), (7, 7), (4, 4), (2, 2), (2, 33, 50)),
    "downsample": Window((20, 24), (3, 3), (2, 2), (1, 1), (3, 14, 14)),
    "wide": Window((64, 40), (3, 3), (2, 2), (1, 1), (2, 9, 37)),
    "deep": Window((300, 13), (3, 3), (2, 2), (1, 1), (1, 6, 5)),
    "patches": Window((5, 7), (2, 2), (2, 2), (0, 0), (1, 8, 9)),
    "padded": Window((8, 8), (3, 3), (1, 1), (2, 2), (2, 5, 4)),
    "channels": Window((12, 110), (3, 3), (2, 2), (1, 1), (1, 7, 7)),
    "one pixel": Window((16, 8), (3, 3), (2, 2), (1, 1), (9, 1, 1)),
    "gaps": Window((4, 6), (1, 1), (3, 3), (0, 0), (1, 10, 10)),
    "oblong": Window((4, 6), (3, 1), (2, 3), (0, 2), (2, 10, 10)),
    "dense": Window((64, 47), (3, 3), (2, 2), (1, 1), (1, 9, 9)),
    "many pixels": Window((6, 8), (3, 3), (2, 2), (1, 1), (4, 72, 80)),
    "many channels": Window((8, 200), (3, 3), (2, 2), (1, 1), (2, 12, 12)),
    "no image": Window((4, 6), (3, 3), (2, 2), (1, 1), (0, 8, 8)),
}


def tensors(
    window: Window, dtype: torch.dtype, x_format: torch.memory_format, w_format: torch.memory_format
) -> list[Tensor]:
    """x, weight and bias."""
    (inputs, outputs), (batch, height, width) = window.channels, window.images
    x = torch.randn(batch, inputs, height, width, dtype=torch.float64)
    depth = inputs * window.kernel[0] * window.kernel[1]
    weight = torch.randn(outputs, inputs, *window.kernel, dtype=torch.float64) / depth**0.5
    bias = torch.randn(outputs, dtype=torch.float64).to(dtype)
    return [
        x.to(dtype).contiguous(memory_format=x_format),
        weight.to(dtype).contiguous(memory_format=w_format),
        bias,
    ]


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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("w_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("x_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_gradients_as_exact_as_eager(
    window: Window,
    x_format: torch.memory_format,
    w_format: torch.memory_format,
    dtype: torch.dtype,
    capability: str,
) -> None:
    x, *params = tensors(window, dtype, x_format, w_format)
    dy = torch.randn(reference.patch_embed(x, *params, **window.geometry).shape).to(dtype)
    dy = dy.contiguous(memory_format=x_format)

    def ours(*args: Tensor, **geometry: Any) -> Tensor:
        return pk.patch_embed(*args, **geometry, backend="cpu")

    result = cases.run(ours, x, params, dy, **window.geometry)
    exact = cases.oracle("patch_embed", x, params, dy, **window.geometry)
    assert [g.dtype for g in result] == [dtype] * 4
    if dtype == torch.float64:
        torch.testing.assert_close(result, exact, rtol=1e-11, atol=1e-11)
    else:
        args = x, params, dy
        if window is WINDOWS["one pixel"]:  # in bfloat16 oneDNN reads memory that no one has set
            args = x.float(), [p.float() for p in params], dy.float()
        eager = cases.run(reference.patch_embed, *args, **window.geometry)
        cases.assert_as_exact_as_eager(result, [g.to(dtype) for g in eager], exact)


@CPU
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_gradients_on_a_machine_of_many_cores(
    window: Window, capability: str, many_cores: None
) -> None:
    args = [t.requires_grad_() for t in tensors(window, torch.float64, *LAYOUTS)]
    y = pk.patch_embed(*args, **window.geometry, backend="cpu")
    expected = reference.patch_embed(*args, **window.geometry)
    dy = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, args, dy), torch.autograd.grad(expected, args, dy)
    )


@CPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_nothing_is_left_of_an_earlier_call(
    window: Window, layout: torch.memory_format, dtype: torch.dtype, capability: str
) -> None:
    def ours(*args: Tensor) -> Tensor:
        return pk.patch_embed(*args, **window.geometry, backend="cpu")

    x, *params = tensors(window, dtype, layout, layout)
    dy = torch.randn(reference.patch_embed(x, *params, **window.geometry).shape).to(dtype)
    first, _, second = (
        cases.run(ours, x * factor, [p * factor for p in params], dy * factor)
        for factor in (1, math.nan, 1)
    )
    assert all(map(torch.equal, first, second))
    assert all(t.isfinite().all() for t in second)


@CPU
@pytest.mark.parametrize("window", ["downsample", "dense"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_wanted_gradients(wanted: tuple[int, ...], window: str) -> None:
    geometry = WINDOWS[window].geometry
    args = tensors(WINDOWS[window], torch.float32, *LAYOUTS)
    chosen = [args[i].requires_grad_() for i in wanted]
    y = pk.patch_embed(*args, **geometry, backend="cpu")
    expected = reference.patch_embed(*args, **geometry)
    dy = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, chosen, dy), torch.autograd.grad(expected, chosen, dy)
    )


@CPU
def test_gradcheck_also_of_second_derivatives() -> None:
    window = WINDOWS["oblong"]
    args = [t.requires_grad_() for t in tensors(window, torch.float64, *LAYOUTS)]

    def op(*args: Tensor) -> Tensor:
        return pk.patch_embed(*args, **window.geometry, backend="cpu")

    assert torch.autograd.gradcheck(op, args)
    assert torch.autograd.gradgradcheck(op, args)


@CPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_that_are_differentiated(dtype: torch.dtype) -> None:
    window = WINDOWS["one pixel"]
    args = [t.requires_grad_() for t in tensors(window, dtype, *LAYOUTS)]
    y = pk.patch_embed(*args, **window.geometry, backend="cpu")
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, args, dy, create_graph=True)
    exact = cases.oracle("patch_embed", args[0], args[1:], dy, **window.geometry)[1:]
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == dtype and a.requires_grad
        torch.testing.assert_close(a.double(), b, rtol=0.02, atol=0.02)


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


@CPU
@pytest.mark.parametrize(
    ("dy", "error", "message"),
    [
        (torch.zeros(1, 6, 4, 5), ValueError, "the output's gradient has shape"),
        (torch.zeros(1, 6, 4, 4).half(), TypeError, "the output's gradient is Half"),
    ],
)
def test_the_backward_refuses_a_gradient_that_does_not_fit(
    dy: Tensor, error: type[Exception], message: str
) -> None:
    args = [torch.zeros(1, 4, 8, 8), torch.zeros(6, 4, 3, 3), [2, 2], [1, 1], [True] * 3, "cpu"]
    with pytest.raises(error, match=message):
        torch.ops.poolformer_kernels.patch_embed_bwd(dy, *args)


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

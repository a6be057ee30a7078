"""Every cell of the README's table of features, model sources and backends."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerated
import cases
import pytest
import torch
from accelerated import BLOCKS, logits, loss_and_gradients
from conftest import ROOT
from feature_matrix import FEATURES, GPU, SOURCES, Feature, table
from kernel_checks import BACKENDS as GPU_BACKENDS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import poolformer_kernels as pk

DRAWING = ("training", "autocast", "checkpointing", "compiled_training")  # what is dropped
DYNAMIC = torch.export.Dim("batch", min=1, max=64)


def close(ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
    """To `tolerance` of each tensor's largest value, or of a thousandth of the largest of all."""
    largest = max(b.abs().max().item() for b in theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        scale = max(b.abs().max().item(), 1e-3 * largest)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


def inference(stock: nn.Module, fused: nn.Module, x: Tensor) -> None:
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        pixels = x.to(dtype)
        with torch.inference_mode():
            expected = logits(stock.to(dtype), pixels)
            for layout in (torch.contiguous_format, torch.channels_last):
                model = fused.to(dtype, memory_format=layout)
                result = logits(model, pixels.to(memory_format=layout))
                close([result], [expected], tolerance)


def training(stock: nn.Module, fused: nn.Module, x: Tensor) -> None:
    close(loss_and_gradients(fused.train(), x), loss_and_gradients(stock.train(), x))


def autocast(stock: nn.Module, fused: nn.Module, x: Tensor) -> None:
    with torch.autocast(x.device.type, torch.bfloat16):
        results = [loss_and_gradients(model.train(), x) for model in (fused, stock)]
    largest = max(b.float().norm() for b in results[1])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert (a.float() - b.float()).norm() <= 0.1 * b.float().norm() + 1e-3 * largest


def copies(stock: nn.Module, fused: nn.Module, x: Tensor) -> None:
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), loaded):
        assert len(pk.report(other).fused) == BLOCKS
        assert torch.equal(logits(other, x), logits(fused, x))


def checkpointing(stock: nn.Module, fused: nn.Module, x: Tensor) -> None:
    parameters = [p for p in fused.train().parameters() if p.requires_grad]
    expected = loss_and_gradients(fused, x)
    torch.manual_seed(7)
    result = checkpoint(lambda given: logits(fused, given), x, use_reentrant=False)
    gradients = torch.autograd.grad(result.square().mean(), parameters)
    assert all(torch.equal(a, b) for a, b in zip([result, *gradients], expected, strict=True))


def compiled(stock: nn.Module, fused: nn.Module, x: Tensor) -> None:
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    model = torch.compile(fused, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for batch, height, width in ((2, 96, 64), (3, 64, 64), (5, 160, 128)):
            pixels = torch.randn(batch, 3, height, width)
            close([logits(model, pixels)], [logits(fused, pixels)])
    assert counter.frame_count == 1, "sizes whose last stage has one row or column would add more"


def compiled_training(stock: nn.Module, fused: nn.Module, x: Tensor) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    model = torch.compile(fused.train(), fullgraph=True, backend=counter)
    for pixels in (x, torch.cat([x, x, x])):
        torch._dynamo.mark_dynamic(pixels, 0)
        close(loss_and_gradients(model, pixels), loss_and_gradients(fused, pixels))
    assert counter.frame_count == 1


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return logits(self.model, pixels)


def exported(stock: nn.Module, fused: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        program = torch.export.export(Logits(fused), (x,), dynamic_shapes=({0: DYNAMIC},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    more = torch.cat([x, x])
    close([torch.export.load(file).module()(more)], [logits(stock, more)])


def onnx(stock: nn.Module, fused: nn.Module, x: Tensor) -> None:
    runtime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    names = {"input_names": ["pixels"], "dynamic_axes": {"pixels": {0: "batch"}}}
    torch.onnx.export(Logits(fused), (x,), file, dynamo=False, **names)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    more = torch.cat([x, x])
    result = torch.from_numpy(session.run(None, {"pixels": more.numpy()})[0])
    close([result], [logits(stock, more)], 1e-3)


def cells() -> Iterator[Any]:
    """A test for each cell whose feature is checked here."""
    marks = {param.values[0]: param.marks for param in (*cases.BACKENDS, *GPU_BACKENDS)}
    for feature in FEATURES:
        for source in SOURCES:
            for backend in feature.backends(source):
                if "::" not in feature.check:
                    more = [pytest.mark.gpu] if backend in GPU else []
                    yield pytest.param(
                        feature,
                        source,
                        backend,
                        marks=[*marks[backend], *more],
                        id=f"{feature.check}-{source}-{backend}",
                    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("feature", "source", "backend"), [*cells()])
def test_cell(feature: Feature, source: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check: Callable[[nn.Module, nn.Module, Tensor], None] = globals()[feature.check]
    if feature.kernels:  # tracing a block takes a second
        monkeypatch.setattr(accelerated, "DEPTHS", [1, 2, 1, 1])
    device = "cuda" if backend in GPU else "cpu"
    drop_path = 0.3 if feature.check in DRAWING else 0.0
    stock = accelerated.make(lambda rate: getattr(accelerated, SOURCES[source])(rate), drop_path)
    stock.to(device)
    fused = pk.accelerate(copy.deepcopy(stock), backend)
    if source == "our own":
        pk.accelerate(stock, "torch")
    check(stock, fused, torch.randn(2, 3, 32, 32, device=device))


@pytest.mark.parametrize("feature", [f for f in FEATURES if "::" in f.check], ids=lambda f: f.name)
def test_the_tests_of_other_files_are_there(feature: Feature) -> None:
    file, name = feature.check.split("::")
    test = getattr(importlib.import_module(file.removesuffix(".py")), name)
    parameters = dict(mark.args for mark in test.pytestmark if mark.name == "parametrize")
    assert {p.values[0] for p in parameters["backend"]} == set(feature.backends(feature.sources[0]))


def test_the_readme_has_this_table() -> None:
    text = Path(ROOT / "README.md").read_text(encoding="utf-8")
    shown = text.split("<!-- matrix -->")[1].split("<!-- end -->")[0].strip()
    assert shown == table(), "paste what `python tests/feature_matrix.py` prints"

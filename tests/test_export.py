"""torch.export, AOTInductor and ONNX of accelerated models and of our own."""

from __future__ import annotations

import collections
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import KERNELS
from torch import Tensor, nn

import poolformer_kernels as pk
from poolformer_kernels import backends

SIZES: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1], "num_labels": 5}
BATCH = torch.export.Dim("batch", min=1, max=64)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).logits


def own() -> nn.Module:
    config = pk.PoolFormerConfig(**SIZES, layer_scale_init_value=0.5)
    return pk.PoolFormerForImageClassification(config).eval()


def foreign() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.PoolFormerConfig(**SIZES, layer_scale_init_value=0.5)
    return transformers.PoolFormerForImageClassification(config).eval()


def exported(model: nn.Module, pixels: Tensor) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(Logits(model), (pixels,), dynamic_shapes={"pixels": {0: BATCH}})


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("build", [own, foreign])
def test_an_exported_program_keeps_the_ops_through_a_file(
    build: Any, backend: str, tmp_path: Path
) -> None:
    model, pixels = build(), torch.randn(2, 3, 64, 64)
    expected = model(pixels).logits
    program = exported(pk.accelerate(model, backend), pixels)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    names = [str(n.target) for n in loaded.graph.nodes if n.op == "call_function"]
    assert names.count("poolformer_kernels.pool_mixer_fwd.default") == sum(SIZES["depths"])
    assert names.count("poolformer_kernels.mlp_fwd.default") == sum(SIZES["depths"])
    for size in (2, 1, 5):
        more = torch.cat([pixels, torch.randn(3, 3, 64, 64)])[:size]
        result = loaded.module()(more)
        torch.testing.assert_close(result, model(more).logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loaded.module()(pixels), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", KERNELS)
def test_a_program_compiled_ahead_runs_the_ops(backend: str, tmp_path: Path) -> None:
    model, pixels = pk.accelerate(own(), backend), torch.randn(2, 3, 64, 64)
    path = torch._inductor.aoti_compile_and_package(
        exported(model, pixels), package_path=str(tmp_path / "model.pt2")
    )
    with zipfile.ZipFile(path) as package:
        calls = b"".join(package.read(name) for name in package.namelist() if ".json" in name)
    assert calls.count(b"pool_mixer_fwd") == calls.count(b"mlp_fwd") == sum(SIZES["depths"])
    runner = torch._inductor.aoti_load_package(path)
    for size in (2, 3):
        more = torch.randn(size, 3, 64, 64)
        torch.testing.assert_close(runner(more), model(more).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
@pytest.mark.parametrize("build", [own, foreign])
def test_onnx_gets_the_stock_graph(build: Any, dynamo: bool, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, pixels = build(), torch.randn(2, 3, 64, 64)
    named: dict[str, Any] = {"dynamic_shapes": {"pixels": {0: BATCH}}}
    if not dynamo:
        named = {"input_names": ["pixels"], "dynamic_axes": {"pixels": {0: "batch"}}}
    counts = []
    for backend in ("torch", "auto"):
        path = tmp_path / f"{backend}.onnx"
        module = Logits(pk.accelerate(model, backend)).eval()
        torch.onnx.export(module, (pixels,), path, dynamo=dynamo, verbose=False, **named)
        nodes = onnx.load(path).graph.node
        counts.append(collections.Counter((node.domain, node.op_type) for node in nodes))
    assert counts[0] == counts[1] and {domain for domain, _ in counts[0]} == {""}
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    more = torch.randn(3, 3, 64, 64)
    result = torch.from_numpy(session.run(None, {"pixels": more.numpy()})[0])
    torch.testing.assert_close(result, model(more).logits, rtol=1e-4, atol=1e-5)


def test_after_an_onnx_export_the_choice_is_as_before() -> None:
    pytest.importorskip("onnxscript")
    before = backends.requested("cpu")
    seen = []

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(backends.requested("cpu"))
            return x + 1

    torch.onnx.export(Asks(), (torch.zeros(2),), dynamo=True, verbose=False)
    assert set(seen) == {"torch"} and backends.requested("cpu") == before == "cpu"

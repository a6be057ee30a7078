"""Other engines as contenders of whole models in inference, each at its best setting.

All get the eager model with its parameters rounded to the setting's dtype, and as many threads as
PyTorch has. OpenVINO and ONNX Runtime compile a graph for every batch size; for bfloat16 they are
given float32 parameters and asked for bfloat16 products, which OpenVINO ignores on a CPU without
them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .models import Forward, Setting, Unavailable, contender

Engine = Callable[[Tensor], Tensor]

# All contenders of a run share `Logits.forward`; past eight compilations of it, torch.compile would
# go on in eager mode.
torch._dynamo.config.recompile_limit = 256


class Logits(nn.Module):
    """A model that returns its logits alone, for what takes no classes as results."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).logits


def _for_each_shape(compile_for: Callable[[Tensor], Engine]) -> Forward:
    """A forward that compiles once for every shape of pixels."""
    engines: dict[torch.Size, Engine] = {}

    def forward(pixels: Tensor) -> Tensor:
        if pixels.shape not in engines:
            engines[pixels.shape] = compile_for(pixels)
        return engines[pixels.shape](pixels)

    return forward


def _float_model(setting: Setting, engine: str, dtypes: tuple[str, ...]) -> nn.Module:
    """The setting's model in float32, NCHW, if `engine` runs the setting."""
    if setting.device != "cpu":
        raise Unavailable(f"{engine} is entered for CPUs, and the device is {setting.device}")
    if setting.dtype not in dtypes:
        raise Unavailable(f"{engine} is entered for {' and '.join(dtypes)}, not {setting.dtype}")
    if setting.layout != "nchw":
        raise Unavailable(f"{engine} chooses layouts by itself; it is entered once, for nchw")
    return Logits(setting.eager()).float().eval()


@contender("OpenVINO")
def openvino(setting: Setting) -> Forward:
    model = _float_model(setting, "OpenVINO", ("float32", "bfloat16"))
    try:
        import openvino
    except ImportError as error:
        raise Unavailable("OpenVINO is not installed: pip install openvino") from error
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[setting.dtype],
    }

    def compile_for(pixels: Tensor) -> Engine:
        shape = list(pixels.shape)
        graph = openvino.convert_model(model, example_input=pixels.float(), input=shape)
        request = openvino.Core().compile_model(graph, "CPU", options).create_infer_request()

        def run(pixels: Tensor) -> Tensor:
            request.infer([pixels.float().numpy()], share_inputs=True)
            return torch.from_numpy(request.get_output_tensor().data)

        return run

    return _for_each_shape(compile_for)


@contender("ONNX Runtime")
def onnx_runtime(setting: Setting) -> Forward:
    model = _float_model(setting, "ONNX Runtime", ("float32",))
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx.export needs it
    except ImportError as error:
        raise Unavailable(f"{error}: pip install onnxruntime onnx onnxscript") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its idle threads would spin on the cores that the next contender runs on.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def compile_for(pixels: Tensor) -> Engine:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            torch.onnx.export(
                model, (pixels,), path, dynamo=True, external_data=False, verbose=False
            )
            providers = ["CPUExecutionProvider"]
            session = onnxruntime.InferenceSession(path, options, providers=providers)
        name = session.get_inputs()[0].name
        return lambda pixels: torch.from_numpy(session.run(None, {name: pixels.numpy()})[0])

    return _for_each_shape(compile_for)


def _frozen(setting: Setting, **options: Any) -> Forward:
    """torch.compile with parameters as constants, which it packs for oneDNN; no dynamic shapes."""
    if setting.device != "cpu":
        raise Unavailable("freezing packs parameters for CPUs")
    model = Logits(setting.eager()).eval().requires_grad_(False)
    compiled = torch.compile(model, dynamic=False, **options)
    return torch.no_grad()(compiled)


@contender("torch.compile, freezing")
def frozen(setting: Setting) -> Forward:
    return _frozen(setting, options={"freezing": True})


@contender("torch.compile, max-autotune")
def autotuned(setting: Setting) -> Forward:
    return _frozen(setting, options={"freezing": True, "max_autotune": True})


@contender("zentorch")
def zentorch(setting: Setting) -> Forward:
    try:
        import zentorch  # noqa: F401  # registers a backend of torch.compile
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(f"zentorch does not load: {error}") from error
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        raise Unavailable("zentorch optimizes only on CPUs with AVX-512")
    return _frozen(setting, backend="zentorch")


PEERS = (
    "OpenVINO",
    "ONNX Runtime",
    "torch.compile, freezing",
    "torch.compile, max-autotune",
    "zentorch",
)

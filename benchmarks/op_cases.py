"""The ops as cases for the harness: arguments at trained scales, one contender a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from poolformer_kernels import backends, ops, reference
from poolformer_kernels.models.poolformer.variants import VARIANTS

from .harness import Case, Contender

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@dataclass(frozen=True)
class Setting:
    """One cell of the grid.

    shape: (B, C, H, W) of the result; layout: x's; record: whether autograd records the call.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "nchw"
    device: str = "cpu"
    backward: bool = False
    record: bool = False

    @property
    def labels(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "direction": "forward+backward" if self.backward else "forward",
            "shape": "x".join(map(str, self.shape)),
            "dtype": self.dtype,
            "layout": self.layout,
            "device": self.device,
        }

    def why_not(self, backend: str) -> str | None:
        """None if `backend` runs this op here, else its reason."""
        act = "gelu" if self.op == "mlp" else None
        dtype, grad = DTYPES[self.dtype], self.backward or self.record
        try:
            backends.resolve(self.op, self.device, dtype, act, grad, backend=backend)
        except backends.BackendUnavailable as error:
            return str(error)
        return None


def stage_shapes(variant: str, batch: int, image_size: int = 224) -> list[tuple[int, ...]]:
    """(B, C, H, W) of the variant's four stages."""
    edges = [-(-image_size // stride) for stride in (4, 8, 16, 32)]
    sizes = VARIANTS[variant].hidden_sizes
    return [(batch, size, edge, edge) for size, edge in zip(sizes, edges, strict=True)]


def geometry(op: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """The options with which `op` gives a result of `shape` in the released models."""
    if op != "patch_embed":
        return {}
    stem = all(shape[1] not in variant.hidden_sizes[1:] for variant in VARIANTS.values())
    return {"stride": 4, "padding": 2} if stem else {"stride": 2, "padding": 1}


def _window(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Input channels, kernel and stride of the embedding whose result has `shape`."""
    stride = geometry("patch_embed", shape)["stride"]
    narrower = [
        before
        for variant in VARIANTS.values()
        for before, after in pairwise(variant.hidden_sizes)
        if after == shape[1]
    ]
    return (narrower[0], 3, stride) if narrower else (3, 7, stride)


def make_arguments(op: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """float64 arguments of `op` for a result of `shape`, at the scales that trained models have."""
    generator = torch.Generator().manual_seed(0)
    channels, hidden = shape[1], 4 * shape[1]

    def normal(*size: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64) * std + mean

    if op == "patch_embed":
        inputs, kernel, stride = _window(shape)
        return {
            "x": normal(shape[0], inputs, stride * shape[2], stride * shape[3]),
            "weight": normal(channels, inputs, kernel, kernel, std=inputs**-0.5 / kernel),
            "bias": normal(channels, std=0.1),
        }
    x = normal(*shape, mean=0.5)
    weight, bias = normal(channels, std=0.2, mean=1.0), normal(channels, std=0.2)
    if op == "group_norm":
        return {"x": x, "weight": weight, "bias": bias}
    arguments = {"x": x, "norm_weight": weight, "norm_bias": bias}
    if op == "mlp":
        arguments |= {
            "fc1_weight": normal(hidden, channels, std=channels**-0.5),
            "fc1_bias": normal(hidden, std=0.1),
            "fc2_weight": normal(channels, hidden, std=hidden**-0.5),
            "fc2_bias": normal(channels, std=0.1),
        }
    return {**arguments, "layer_scale": normal(channels, std=0.3, mean=1.0)}


def make_call(
    function: Callable[..., Tensor], arguments: dict[str, Tensor], record: bool
) -> Callable[[], Tensor]:
    """The forward alone; `record`: with autograd recording it for every argument."""
    if not record:
        return torch.inference_mode()(partial(function, **arguments))
    leaves = {name: value.detach().requires_grad_() for name, value in arguments.items()}
    return torch.enable_grad()(partial(function, **leaves))


def make_step(
    function: Callable[..., Tensor], arguments: dict[str, Tensor]
) -> Callable[[], list[Tensor]]:
    """Forward and backward: the output and the gradient of every argument."""
    leaves = {name: value.detach().requires_grad_() for name, value in arguments.items()}
    with torch.no_grad():
        y = function(**arguments)
    upstream = torch.empty(y.shape, dtype=torch.float64)
    upstream.normal_(generator=torch.Generator().manual_seed(1))
    upstream = torch.empty_like(y).copy_(upstream.float())  # y's dtype, device and layout

    @torch.enable_grad()
    def step() -> list[Tensor]:
        output = function(**leaves)
        return [output, *torch.autograd.grad(output, list(leaves.values()), upstream)]

    return step


def make_case(setting: Setting, names: Sequence[str]) -> Case:
    """`setting` with plain PyTorch as the baseline and the backends of `names` that run it."""
    make = make_step if setting.backward else partial(make_call, record=setting.record)
    exact = make_arguments(setting.op, setting.shape)
    arguments = {name: value.to(DTYPES[setting.dtype]) for name, value in exact.items()}
    rounded = {name: value.double() for name, value in arguments.items()}
    arguments = {name: value.to(setting.device) for name, value in arguments.items()}
    for name in ("x", "weight") if setting.op == "patch_embed" else ("x",):
        arguments[name] = arguments[name].contiguous(memory_format=LAYOUTS[setting.layout])
    fixed = geometry(setting.op, setting.shape)
    plain = partial(getattr(reference, setting.op), **fixed)
    fused = partial(getattr(ops, setting.op), **fixed)
    contenders = [Contender("torch", make(plain, arguments))]
    for name in names:
        if setting.why_not(name) is None:
            contenders.append(Contender(name, make(partial(fused, backend=name), arguments)))
    return Case(setting.labels, contenders, make(plain, rounded), DTYPES[setting.dtype])

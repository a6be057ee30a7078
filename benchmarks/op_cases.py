"""The ops as cases for the harness: arguments at trained scales, one contender a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
    """One cell of the grid. shape: (B, C, H, W) of x; layout: x's; record: autograd records it."""

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


def make_arguments(op: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """float64 arguments of `op` for x of `shape`, at the scales that trained models have."""
    generator = torch.Generator().manual_seed(0)
    channels, hidden = shape[1], 4 * shape[1]

    def normal(*size: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64) * std + mean

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
    x = arguments["x"]
    upstream = torch.empty(x.shape, dtype=torch.float64)
    upstream.normal_(generator=torch.Generator().manual_seed(1))
    upstream = torch.empty_like(x).copy_(upstream.float())  # x's dtype, device and layout

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
    arguments["x"] = arguments["x"].contiguous(memory_format=LAYOUTS[setting.layout])
    plain, fused = getattr(reference, setting.op), getattr(ops, setting.op)
    contenders = [Contender("torch", make(plain, arguments))]
    for name in names:
        if setting.why_not(name) is None:
            contenders.append(Contender(name, make(partial(fused, backend=name), arguments)))
    return Case(setting.labels, contenders, make(plain, rounded), DTYPES[setting.dtype])

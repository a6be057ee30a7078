"""Calls of the MLP's Triton launchers, on a GPU or in Triton's interpreter, for tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import cases
import torch
from cases import Case
from torch import Tensor

from poolformer_kernels.kernels import mlp as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported
DEVICE = "cpu" if INTERPRETED else "cuda"
EPS = 1e-5


def setup(
    case: Case, dtype: torch.dtype, products: torch.dtype | None = None
) -> tuple[Tensor, list[Tensor | None], dict[str, Any], Tensor]:
    """x, parameters, options and dz, in `dtype`; parameters have values that `products` holds."""
    x = cases.random_input(case, "nchw", dtype)
    params = cases.parameters("mlp", case, products or dtype)
    params = [None if p is None else p.to(dtype) for p in params]
    return x, params, cases.options("mlp", case), torch.randn(case.shape).to(dtype)


def on_device(t: Tensor | None, layout: str = "nchw") -> Tensor | None:
    if t is None:
        return None
    if layout == "expanded":
        return t[:1].to(DEVICE).expand(t.shape)
    return cases.layout_of(t.to(DEVICE), layout)


def forward(
    x: Tensor,
    params: list[Tensor | None],
    options: dict[str, Any],
    stats: Tensor | None = None,
    return_stats: bool = False,
    save_hidden: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    factors = (options.get("drop_path"), options.get("hidden_drop_path"))
    return kernels.forward(
        x,
        stats,
        *(None if p is None else p.to(x.device) for p in (*params, *factors)),
        options["act"],
        options["num_groups"],
        EPS,
        return_stats,
        save_hidden,
    )


def backward(
    dz: Tensor,
    x: Tensor,
    saved: Tensor,
    hidden: Tensor | None,
    params: list[Tensor | None],
    options: dict[str, Any],
) -> list[Tensor]:
    """dx, and the gradients of the parameters that are there."""
    on_it = [None if p is None else p.to(DEVICE) for p in params]
    factors = [on_device(options.get(name)) for name in ("drop_path", "hidden_drop_path")]
    dx, *grads = kernels.backward(dz, x, saved, hidden, *on_it, *factors, options["act"])
    there = [(g, p) for g, p in zip(grads, params, strict=True) if p is not None]
    assert dx.dtype == x.dtype and all(g.dtype == p.dtype for g, p in there)
    return [dx, *(g for g, _ in there)]


def hidden_of(x: Tensor, params: list[Tensor | None], options: dict[str, Any]) -> Tensor:
    """fc1's result before the activation: (B, H, W, hidden)."""
    gamma, beta, fc1_weight, fc1_bias, *_ = params
    normed = torch.group_norm(x, options["num_groups"], gamma, beta, EPS).movedim(1, 3)
    return torch.nn.functional.linear(normed, fc1_weight, fc1_bias)


@contextmanager
def counted() -> Iterator[list[dict[str, int]]]:
    """What each Triton launch inside the `with` moved, as the simulated GPU counts it."""
    import simgpu
    from triton.runtime.jit import JITFunction

    launches: list[dict[str, int]] = []
    run = JITFunction.run

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = run(self, *args, **kwargs)
        launches.append(simgpu.last_launch())
        return result

    with mock.patch.object(JITFunction, "run", count):
        yield launches


def passes(launches: list[dict[str, int]], x: Tensor) -> float:
    """Distinct bytes of each launch, summed, in units of the bytes of x."""
    moved = sum(n["unique_load_bytes"] + n["unique_store_bytes"] for n in launches)
    return moved / (x.numel() * x.element_size())

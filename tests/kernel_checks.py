"""Checks of the GPU launchers of pool_mixer and group_norm, Triton's and CUDA C++'s.

As a program, in Triton's interpreter on the CPU:
TRITON_INTERPRET=1 python tests/kernel_checks.py OP
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from typing import Any

import cases
import pytest
import torch
from cases import Case
from torch import Tensor
from torch._prims_common import suggest_memory_format

from poolformer_kernels import _extension, backends, reference
from poolformer_kernels.ops import _common

EPS = 1e-5
NO_TRITON = importlib.util.find_spec("triton") is None
NO_CUDA = (_extension.build_info() or {}).get("mode") != "cuda"
BACKENDS = [
    pytest.param("triton", marks=pytest.mark.skipif(NO_TRITON, reason="Triton is not installed")),
    pytest.param(
        "cuda", marks=pytest.mark.skipif(NO_CUDA, reason="CUDA kernels are not built here")
    ),
]
# Small: an operator of the interpreter costs as much as a whole kernel elsewhere.
INTERPRETED = [
    Case((2, 16, 4, 3), drop=True),
    Case((1, 6, 2, 5), num_groups=2),
    Case((1, 3, 3, 4), pool_size=5, affine=False, mean=10.0),
    Case((0, 16, 4, 4)),
]


def trains(op: str, backend: str, dtype: torch.dtype = torch.float32) -> bool:
    """Whether `backend` has the gradients of `op` on GPUs."""
    act = "gelu" if op == "mlp" else None
    call = backends.Call(op, "cuda", dtype, act, grad=True)
    return backends.BACKENDS[backend](call) is None


def on(device: str, *tensors: Any) -> list[Any]:
    return [t.to(device) if isinstance(t, Tensor) else t for t in tensors]


@dataclass(frozen=True)
class Kernels:
    """The launchers of an op ("pool_mixer" or "group_norm") on a backend."""

    op: str
    backend: str

    def forward(
        self,
        case: Case,
        x: Tensor,
        params: list[Tensor | None],
        options: dict[str, Any] | None = None,
        stats: Tensor | None = None,
        return_stats: bool = False,
    ) -> tuple[Tensor, ...]:
        """(y, saved), for pool_mixer also stats_out."""
        launch = _common.gpu_kernel(self.op, "forward", self.backend)
        gamma, beta, *scale = on(str(x.device), *params)
        if self.op == "group_norm":
            return launch(x, stats, gamma, beta, case.num_groups, EPS)
        (drop_path,) = on(str(x.device), (options or {}).get("drop_path"))
        settings = (case.pool_size, case.num_groups, EPS, return_stats)
        return launch(x, stats, gamma, *scale, drop_path, *settings)

    def backward(
        self,
        case: Case,
        dy: Tensor,
        x: Tensor,
        saved: Tensor,
        params: list[Tensor | None],
        options: dict[str, Any] | None = None,
    ) -> list[Tensor]:
        """Gradients in the order of `cases.run`: for x and for each parameter that is there."""
        launch = _common.gpu_kernel(self.op, "backward", self.backend)
        gamma, _, *scale = on(str(x.device), *params)
        if self.op == "group_norm":
            dx, *grads = launch(dy, x, saved, gamma)
        else:
            (drop_path,) = on(str(x.device), (options or {}).get("drop_path"))
            dx, dgamma, dscale = launch(dy, x, saved, gamma, *scale, drop_path, case.pool_size)
            grads = [dgamma, torch.zeros_like(dgamma), dscale]
        return [dx, *(g for g, p in zip(grads, params, strict=True) if p is not None)]

    def assert_right(
        self, case: Case, layout: str, dtype: torch.dtype, device: str = "cuda"
    ) -> None:
        """Forward and every gradient against float64 and eager on the CPU; their layout."""
        op = self.op
        x, params = cases.random_input(case, layout, dtype), cases.parameters(op, case, dtype)
        options = cases.options(op, case)
        dy = cases.layout_of(torch.randn(case.shape).to(dtype), layout)
        eager = cases.run(getattr(reference, op), x, params, dy, **options)
        exact = cases.oracle(op, x, params, dy, **options)
        x_there, dy_there = on(device, x, dy)
        y, saved, *_ = self.forward(case, x_there, params, options)
        grads = self.backward(case, dy_there, x_there, saved, params, options)
        cases.assert_as_exact_as_eager([y, *grads], eager, exact)
        expected = torch.empty_like(x, memory_format=suggest_memory_format(x)).stride()
        assert y.stride() == expected and grads[0].stride() == expected


if __name__ == "__main__":
    torch.manual_seed(0)
    checked = 0
    for index, case in enumerate(INTERPRETED):
        for layout in ("nchw", "channels_last"):
            # Each case in one dtype: all of them would take a minute.
            dtype = cases.DTYPES[(index + checked) % 3]
            Kernels(sys.argv[1], "triton").assert_right(case, layout, dtype, "cpu")
            checked += 1
    print(f"checked {checked}")

"""Checks of the Triton launchers on a GPU or, as a program, in Triton's interpreter on the CPU.

TRITON_INTERPRET=1 python tests/triton_checks.py OP
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import cases
import torch
from cases import Case
from torch import Tensor
from torch._prims_common import suggest_memory_format

from poolformer_kernels import reference

EPS = 1e-5
# Small: an operator of the interpreter costs as much as a whole kernel elsewhere.
INTERPRETED = [
    Case((2, 16, 4, 3), drop=True),
    Case((1, 6, 2, 5), num_groups=2),
    Case((1, 3, 3, 4), pool_size=5, affine=False, mean=10.0),
    Case((0, 16, 4, 4)),
]


def launchers(op: str) -> ModuleType:
    return importlib.import_module(f"poolformer_kernels.kernels.{op}")


def on(device: str, *tensors: Any) -> list[Any]:
    return [t.to(device) if isinstance(t, Tensor) else t for t in tensors]


def forward(
    op: str,
    case: Case,
    x: Tensor,
    params: list[Tensor | None],
    options: dict[str, Any],
    stats: Tensor | None = None,
    return_stats: bool = False,
) -> tuple[Tensor, ...]:
    """What the launcher returns: (y, saved), for pool_mixer also stats_out."""
    module, (gamma, beta, *scale) = launchers(op), on(str(x.device), *params)
    if op == "group_norm":
        return module.forward(x, stats, gamma, beta, case.num_groups, EPS)
    drop_path = on(str(x.device), options.get("drop_path"))[0]
    return module.forward(
        x, stats, gamma, *scale, drop_path, case.pool_size, case.num_groups, EPS, return_stats
    )


def backward(
    op: str,
    case: Case,
    dy: Tensor,
    x: Tensor,
    saved: Tensor,
    params: list[Tensor | None],
    options: dict[str, Any],
) -> list[Tensor]:
    """Gradients in the order of `cases.run`: for x and for each parameter that is there."""
    module, (gamma, _, *scale) = launchers(op), on(str(x.device), *params)
    if op == "group_norm":
        dx, *grads = module.backward(dy, x, saved, gamma)
    else:
        drop_path = on(str(x.device), options.get("drop_path"))[0]
        dx, dgamma, dscale = module.backward(dy, x, saved, gamma, *scale, drop_path, case.pool_size)
        grads = [dgamma, torch.zeros_like(dgamma), dscale]
    return [dx, *(g for g, p in zip(grads, params, strict=True) if p is not None)]


def assert_right(op: str, case: Case, layout: str, dtype: torch.dtype, device: str) -> None:
    """Forward and every gradient against float64 and against eager on the CPU; their layout."""
    x, params = cases.random_input(case, layout, dtype), cases.parameters(op, case, dtype)
    options = cases.options(op, case)
    dy = cases.layout_of(torch.randn(case.shape).to(dtype), layout)
    eager = cases.run(getattr(reference, op), x, params, dy, **options)
    exact = cases.oracle(op, x, params, dy, **options)
    x_there, dy_there = on(device, x, dy)
    y, saved, *_ = forward(op, case, x_there, params, options)
    grads = backward(op, case, dy_there, x_there, saved, params, options)
    cases.assert_as_exact_as_eager([y, *grads], eager, exact)
    expected = torch.empty_like(x, memory_format=suggest_memory_format(x)).stride()
    assert y.stride() == expected and grads[0].stride() == expected


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


if __name__ == "__main__":
    torch.manual_seed(0)
    checked = 0
    for index, case in enumerate(INTERPRETED):
        for layout in ("nchw", "channels_last"):
            # Each case in one dtype: all of them would take a minute.
            assert_right(sys.argv[1], case, layout, cases.DTYPES[(index + checked) % 3], "cpu")
            checked += 1
    print(f"checked {checked}")

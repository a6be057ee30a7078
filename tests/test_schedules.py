"""Every GPU kernel, for the simulated GPU to run in several orders of blocks, warps and copies.

A missing barrier shows in some of them only. `.ci/run` runs these tests under each.
"""

from __future__ import annotations

import cases
import pytest
import torch
from cases import Case
from kernel_checks import BACKENDS

import poolformer_kernels as pk
from poolformer_kernels import reference

pytestmark = [pytest.mark.gpu, pytest.mark.sweep]
OPS = ("pool_mixer", "group_norm", "mlp")
# One tile and several; whole vectors and none; groups; the fused MLP, its ring, and two products.
CASES = {
    "pool_mixer": [
        Case((2, 64, 7, 7), drop=True),
        Case((1, 24, 30, 18), num_groups=2),
        Case((2, 13, 5, 6), pool_size=5),
    ],
    "group_norm": [Case((2, 64, 7, 7)), Case((1, 24, 30, 18), num_groups=2)],
    "mlp": [Case((2, 64, 12, 11), drop=True), Case((1, 208, 9, 8), hidden=96)],
}
FLOAT, HALF = torch.float32, torch.bfloat16
KINDS = [(FLOAT, "nchw"), (HALF, "channels_last"), (HALF, "nchw")]


@pytest.mark.parametrize(("dtype", "layout"), KINDS, ids=str)
@pytest.mark.parametrize(("op", "case"), [(op, case) for op in OPS for case in CASES[op]], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_order_gives_the_right_result(
    backend: str, op: str, case: Case, layout: str, dtype: torch.dtype
) -> None:
    """Forward and backward, run twice with the same bits."""
    x, params = cases.random_input(case, layout, dtype), cases.parameters(op, case, dtype)
    options = cases.options(op, case)
    dy = torch.randn(case.shape).to(dtype)
    eager = cases.run(getattr(reference, op), x, params, dy, **options)
    exact = cases.oracle(op, x, params, dy, **options)

    def on_gpu(value: object) -> object:
        return value.cuda() if isinstance(value, torch.Tensor) else value

    arguments = [cases.layout_of(x.cuda(), layout), [on_gpu(p) for p in params], on_gpu(dy)]
    options = {name: on_gpu(value) for name, value in options.items()} | {"backend": backend}
    first, second = (cases.run(getattr(pk, op), *arguments, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    cases.assert_as_exact_as_eager([t.cpu() for t in first], eager, exact)

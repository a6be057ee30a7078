"""A program: what the launches of the ops move, as a simulated GPU counts it, as JSON.

SIMGPU_TRACE=FILE python tests/count_traffic.py OP BACKEND LAYOUT DTYPE SHAPE…, with a shape such as
1x64x56x56. Prints {SHAPE: {CALL: [launch]}}.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import cases
import torch
from cases import Case
from kernel_checks import Kernels

from poolformer_kernels import reference

TRACE = Path(os.environ["SIMGPU_TRACE"])


class Launches:
    """Those of the "cuda" or "triton" kind since the last call."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self) -> list[dict[str, Any]]:
        lines = TRACE.read_text().splitlines()
        new, self.seen = lines[self.seen :], len(lines)
        return [n for n in map(json.loads, new) if n["kind"] in ("cuda", "triton")]


def calls(
    kernels: Kernels, layout: str, dtype: torch.dtype, shape: tuple[int, ...], launches: Launches
) -> dict[str, Any]:
    case = Case(shape)
    x = cases.random_input(case, layout, dtype).cuda()
    params = [p.cuda() for p in cases.parameters(kernels.op, case, dtype)]
    stats, dy = reference.statistics(x, 1), torch.randn_like(x)
    counted = {}
    launches()
    kernels.forward(case, x, params, None, stats, True)
    counted["forward, statistics given"] = launches()
    _, saved, *_ = kernels.forward(case, x, params)
    counted["forward"] = launches()
    kernels.backward(case, dy, x, saved, params)
    counted["backward"] = launches()
    return counted


if __name__ == "__main__":
    op, backend, layout, dtype, *shapes = sys.argv[1:]
    count = partial(calls, Kernels(op, backend), layout, getattr(torch, dtype))
    launches = Launches()
    print(json.dumps({s: count(tuple(int(n) for n in s.split("x")), launches) for s in shapes}))

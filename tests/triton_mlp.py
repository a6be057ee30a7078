"""Calls of the MLP's Triton launchers, on a GPU or in Triton's interpreter, for tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from mlp_checks import Launchers
from torch import Tensor

from poolformer_kernels.kernels import mlp as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported
DEVICE = "cpu" if INTERPRETED else "cuda"
MLP = Launchers(kernels.forward, kernels.backward, kernels.stats_partials, DEVICE)


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

"""What a call launches and moves, read from the trace of a simulated GPU.

The simulator (module simgpu) appends a JSON line a launch to the file that SIMGPU_TRACE names: for
a kernel the distinct bytes that it loads and stores, in all and of each allocation; for an operator
of PyTorch its operands' and results' bytes. A real GPU keeps no such account: profilers count what
caches let through.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
TRACE = "SIMGPU_TRACE"


def why_not() -> str | None:
    """None where launches can be counted, else what is missing and what to do."""
    if importlib.util.find_spec("simgpu") is None or not torch.cuda.is_available():
        found = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
        return (
            f"bytes are counted on a simulated GPU, and here is {found} without the module simgpu. "
            "Start this program under the simulator; on a GPU, measure with `ncu --metrics "
            "dram__bytes.sum`."
        )
    return None


def run_traced(module: str, arguments: Sequence[str]) -> int:
    """Runs `python -m module arguments` with a trace of its own; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "launches.jsonl")
        trace.touch()
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {TRACE: str(trace), "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(command, env={**os.environ, **environment}).returncode


@dataclass(frozen=True)
class Counts:
    """Sums over launches, in bytes.

    loaded, stored: distinct bytes of each launch, so what has to cross the memory bus at least.
    requested: what the threads ask of the caches.
    activation: the part of loaded + stored that is x's, the hidden's or their gradients'. The rest
        is the parameters', their gradients', and that of partial sums.
    """

    launches: int = 0
    loaded: int = 0
    stored: int = 0
    requested: int = 0
    activation: int = 0

    @property
    def moved(self) -> int:
        return self.loaded + self.stored

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(self._values(), other._values(), strict=True)))

    def _values(self) -> tuple[int, ...]:
        return self.launches, self.loaded, self.stored, self.requested, self.activation


def counts_of(rows: Iterable[dict[str, Any]], activations: Sequence[int]) -> Counts:
    """The sums over a trace's rows.

    activations: bytes of the tensors that count as activation, the smallest first. A kernel's
    buffers are told apart by their sizes. An operator of PyTorch, whose trace has no buffers,
    counts as activation as a whole if it moves as much as the smallest.
    """
    total = Counts()
    for row in rows:
        if row["kind"] == "memset":
            continue
        loaded = row.get("unique_load_bytes", row["load_bytes"])
        stored = row.get("unique_store_bytes", row["store_bytes"])
        if "buffers" in row:
            chosen = (b for b in row["buffers"] if b["bytes"] in activations)
            activation = sum(b["read"] + b["written"] for b in chosen)
        else:
            activation = loaded + stored if loaded + stored >= activations[0] else 0
        requested = row["load_bytes"] + row["store_bytes"]
        total += Counts(1, loaded, stored, requested, activation)
    return total


def traced(run: Callable[[], object]) -> list[dict[str, Any]]:
    """The trace's rows of what `run` launches. Needs SIMGPU_TRACE; see `run_traced`."""
    path = Path(os.environ[TRACE])
    torch.cuda.synchronize()
    start = path.stat().st_size
    run()
    torch.cuda.synchronize()
    with path.open(encoding="utf-8") as file:
        file.seek(start)
        return [json.loads(line) for line in file]


def count(run: Callable[[], object], activations: Sequence[int]) -> Counts:
    """What `run` launches and moves."""
    return counts_of(traced(run), activations)

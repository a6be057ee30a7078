"""Peak memory of one contender, in a process of its own.

The process imports everything, notes its resident memory, builds the contender, runs it, and
reports the high-water mark of its resident memory above what it noted: weights, packed weights,
workspaces and activations, but neither imports nor whatever building the model needed for a while.
On a GPU: the high-water mark of torch's allocator, weights included.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

MIB = 2**20


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed: else it returns large buffers, and each use faults pages in.

    So no contender pays for its allocator. Engines with allocators of their own do not notice.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _reset_high_water() -> None:
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _measure(target: str, options: dict[str, Any], sizes: Sequence[int]) -> dict[int, float]:
    module, _, name = target.partition(":")
    build = getattr(importlib.import_module(module), name)
    cuda = torch.device(options.get("device", "cpu")).type == "cuda"
    before = 0 if cuda else _status("VmRSS")
    run = build(**options)
    peaks = {}
    for size in sizes:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            _reset_high_water()
        run(size)
        run(size)
        peak = torch.cuda.max_memory_allocated() if cuda else _status("VmHWM") - before
        peaks[size] = peak / MIB
    return peaks


def peak_memory(
    target: str, options: dict[str, Any], sizes: Sequence[int], timeout_s: float = 300
) -> dict[int, float]:
    """MiB at each size for `build(**options)(size)`; {} where it cannot be measured.

    target: "module:build", importable by a new Python; options: JSON. build returns a function that
    runs the contender at a size. Sizes should ascend: a process keeps what it grew to.
    """
    command = [sys.executable, "-m", "benchmarks.memory", target, json.dumps(options)]
    try:
        done = subprocess.run(
            [*command, *map(str, sizes)],
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
        )
        measured = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[-1:] or [f"exit code {error.returncode}"]
        print(f"no peak memory for {options}: {reason[0]}", file=sys.stderr)
        return {}
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        print(f"no peak memory for {options}: {error}", file=sys.stderr)
        return {}
    return {int(size): peak for size, peak in measured.items()}


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], json.loads(sys.argv[2]), list(map(int, sys.argv[3:])))))

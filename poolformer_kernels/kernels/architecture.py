"""The GPU that tiles are chosen for: one for the whole process.

The tiles decide the shapes of returned statistics, which fakes have to tell without a tensor on a
device; so what fits all GPUs of the process is chosen, and no call depends on the current device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

# sm_120 stands for every GPU with 99 KB of shared memory for a block, gfx942 for AMD's.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
SMALLEST = "sm_120"  # its tiles fit NVIDIA's other GPUs too

_chosen: str | None = None


def of_capability(major: int, minor: int) -> str:
    """One of ARCHITECTURES for an NVIDIA GPU, known or not."""
    if (major, minor) in ((8, 0), (8, 7), (9, 0)):
        return "sm_90" if major == 9 else "sm_80"
    return "sm_100" if major in (10, 11) else SMALLEST


@cache
def _of_devices() -> str:
    if torch.version.hip is not None:
        return "gfx942"
    if not torch.cuda.is_available():
        return SMALLEST
    devices = range(torch.cuda.device_count())
    found = {of_capability(*torch.cuda.get_device_capability(device)) for device in devices}
    return found.pop() if len(found) == 1 else SMALLEST


def architecture() -> str:
    """One of ARCHITECTURES: that of the GPUs of this process, SMALLEST where they differ."""
    return _chosen or _of_devices()


def is_amd() -> bool:
    return architecture().startswith("gfx")


def warps_for(threads: int) -> int:
    """num_warps of a program of so many threads: AMD's warps have 64."""
    return max(1, threads // (64 if is_amd() else 32))


@contextmanager
def tiles_for(name: str) -> Iterator[None]:
    """Tiles are chosen for `name`, whatever GPU is there: to compile ahead of time."""
    global _chosen
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture is {name!r}, but must be one of {', '.join(ARCHITECTURES)}")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before

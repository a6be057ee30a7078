"""Finds, checks and loads the compiled part of the package, `poolformer_kernels._C`.

The build writes a record beside the extension. The record is compared with the running Python and
PyTorch BEFORE the extension is loaded, so a mismatch is one sentence with its cure and never an
undefined symbol. This file imports nothing of the package: setup.py uses it too.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import json
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

RECORD = "_C.json"
FOLDER = Path(__file__).resolve().parent
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
# What must be equal when building and when loading, in the order in which it is reported.
MUST_MATCH = {
    "platform": "platform",
    "python": "Python",
    "torch": "PyTorch",
    "cuda": "CUDA (of PyTorch)",
    "cxx11_abi": "C++11 ABI (of PyTorch)",
}


def environment() -> dict[str, Any]:
    """What a binary depends on, of the running Python and PyTorch: the keys of `MUST_MATCH`."""
    import torch

    return {
        "platform": f"{sys.platform}-{platform.machine()}",
        "python": f"{sys.implementation.cache_tag}{getattr(sys, 'abiflags', '')}",
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "cuda": torch.version.cuda,
        "cxx11_abi": bool(torch.compiled_with_cxx11_abi()),
    }


def check(folder: Path, running: dict[str, Any]) -> str | None:
    """Why the extension in `folder` cannot be loaded by the `running` environment, or None."""
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    here = folder / f"_C{suffix}"
    others = sorted(p.name for p in folder.glob("_C.*") if p.suffix in (".so", ".pyd"))
    if not here.exists() and not others:
        return (
            "the extension is not built (plain PyTorch is used): to build it, install a C++ "
            f"compiler and run `{REBUILD}` in the source tree"
        )
    if not here.exists():
        return (
            f"the extension was built for another Python ({', '.join(others)}; this one needs "
            f"{here.name}): rebuild it with `{REBUILD}` in the source tree"
        )
    try:
        record = json.loads((folder / RECORD).read_text())
        different = [k for k in MUST_MATCH if record[k] != running[k]]
    except FileNotFoundError:
        return (
            f"{here.name} has no build record ({RECORD}), so what it was built for is unknown: "
            f"rebuild it with `{REBUILD}` in the source tree"
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        return (
            f"the build record {RECORD} is unreadable ({type(error).__name__}: {error}): "
            f"rebuild with `{REBUILD}` in the source tree"
        )
    if different:
        was = ", ".join(f"{MUST_MATCH[k]} {record[k]}" for k in different)
        now = ", ".join(f"{MUST_MATCH[k]} {running[k]}" for k in different)
        return (
            f"the extension was built for {was}, and this is {now}: rebuild it with `{REBUILD}` "
            "in the source tree"
        )
    return None


@functools.cache
def _loaded() -> tuple[ModuleType | None, str | None]:
    try:
        reason = check(FOLDER, environment())
        if reason is not None:
            return None, reason
        return importlib.import_module("poolformer_kernels._C"), None
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        return None, (
            f"the extension did not load ({type(error).__name__}: {first}): rebuild it with "
            f"`{REBUILD}` in the source tree"
        )


def load() -> ModuleType | None:
    """The compiled module, or None when it is absent or unfit (`why_not()` says why). Cached."""
    return _loaded()[0]


def why_not() -> str | None:
    """One sentence on why `load()` gives None, with the cure; None when it is loaded."""
    return _loaded()[1]


def build_info() -> dict[str, Any] | None:
    """The build record (torch, CUDA, architectures, compiler, ...), or None if there is none."""
    try:
        record = json.loads((FOLDER / RECORD).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None

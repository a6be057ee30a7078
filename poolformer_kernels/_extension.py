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
# What must be equal when building and when loading, in the order in which it is reported.
MUST_MATCH = {
    "platform": "platform",
    "python": "Python",
    "torch": "PyTorch",
    "cuda": "CUDA",
    "cxx11_abi": "C++11 ABI",
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


def _cure() -> str:
    if (FOLDER.parent / "setup.py").exists():
        return f"run `python setup.py build_ext --inplace` in {FOLDER.parent}"
    return "run `pip install --no-build-isolation --force-reinstall --no-deps .` in the source tree"


def _read_record(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / RECORD).read_text())
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__} where an object has to be")
    return record


def check(folder: Path, running: dict[str, Any]) -> str | None:
    """Why the extension in `folder` cannot be loaded by the `running` environment, or None."""
    here = folder / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    others = sorted(p.name for p in folder.glob("_C.*") if p.suffix in (".so", ".pyd"))
    if not others:
        why = (build_info(folder) or {}).get("why", "it needs a C++ compiler")
        return f"the extension is not built ({why}): to build it, {_cure()}"
    if not here.exists():
        return (
            f"the extension was built for another Python ({', '.join(others)}, and this one needs "
            f"{here.name}): {_cure()}"
        )
    try:
        record = _read_record(folder)
        different = [key for key in MUST_MATCH if record[key] != running[key]]
    except FileNotFoundError:
        return f"{here.name} has no record of what it was built for ({RECORD}): {_cure()}"
    except KeyError as error:
        return f"the build record {RECORD} lacks {error}: {_cure()}"
    except (OSError, ValueError) as error:
        return f"the build record {RECORD} cannot be read ({error}): {_cure()}"
    if not different:
        return None
    built = ", ".join(f"{MUST_MATCH[key]} {record[key] or 'none'}" for key in different)
    now = ", ".join(f"{MUST_MATCH[key]} {running[key] or 'none'}" for key in different)
    return f"the extension was built for {built}, and this is {now}: {_cure()}"


@functools.cache
def _loaded() -> tuple[ModuleType | None, str | None]:
    try:
        reason = check(FOLDER, environment())
        if reason is not None:
            return None, reason
        return importlib.import_module(f"{__package__}._C"), None
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        return None, f"the extension failed to load ({type(error).__name__}: {first}): {_cure()}"


def load() -> ModuleType | None:
    """The compiled module, or None when it is absent or unfit (`why_not()` says why). Cached."""
    return _loaded()[0]


def why_not() -> str | None:
    """One sentence on why `load()` gives None, with the cure; None when it is loaded."""
    return _loaded()[1]


def build_info(folder: Path = FOLDER) -> dict[str, Any] | None:
    """The build record, or None if there is none.

    Keys: mode ("cuda", "cpu" or "none"), why (that mode) and, where there is an extension,
    those of `MUST_MATCH`, torch_version, cuda_archs, nvcc and compiler.
    """
    try:
        return _read_record(folder)
    except (OSError, ValueError):
        return None

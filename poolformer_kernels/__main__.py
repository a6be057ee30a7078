"""`python -m poolformer_kernels [--json]`: versions, what is built, what runs each op and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from typing import Any

import torch

from . import _extension, backends
from ._version import __version__

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, Any]:
    """Of this package and what it runs on."""
    return {
        "poolformer_kernels": __version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform}-{platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _try_kernel(device: torch.device) -> str:
    """Runs a CUDA kernel of the extension on `device`: what happened, in a few words."""
    module = _extension.load()
    if module is None:
        return "no CUDA code: the extension is not loaded"
    if not hasattr(module, "cuda_architecture"):
        return "no CUDA code in this build"
    x = torch.arange(64.0).view(1, 4, 4, 4)
    try:
        y, _ = module.cuda_group_norm_forward(x.to(device), None, None, None, 1, 1e-5)
        right = torch.allclose(y.cpu(), torch.group_norm(x, 1), atol=1e-5)
        architecture = module.cuda_architecture(device.index)
    except RuntimeError as error:
        return f"this build's CUDA code does not run: {str(error).strip().splitlines()[0]}"
    if not right:
        return "this build's CUDA code gives wrong results: update the driver, then rebuild"
    return f"runs this build's code (compiled for {architecture / 10:.1f})"


def devices() -> list[dict[str, Any]]:
    """The CUDA devices, and whether the CUDA code of this build runs on each."""
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        try:
            name = torch.cuda.get_device_name(device)
            capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
            code = _try_kernel(device)
        except (RuntimeError, AssertionError) as error:
            name, capability = "unknown", "unknown"
            code = f"PyTorch cannot use it: {str(error).strip().splitlines()[0]}"
        found.append({"device": str(device), "name": name, "capability": capability, "code": code})
    return found


def choices() -> list[dict[str, Any]]:
    """For each op, device type, dtype, and with and without gradient: what runs it and why."""
    rows = []
    for device in ("cpu", "cuda") if torch.cuda.device_count() else ("cpu",):
        for op in backends.OPS:
            for dtype in DTYPES:
                for grad in (False, True):
                    act = "gelu" if op == "mlp" else None
                    call = backends.Call(op, device, dtype, act, grad)
                    try:
                        runs = backends.resolve(op, device, dtype, act, grad)
                    except backends.BackendUnavailable:
                        runs = "error"
                    reasons = {k: v for k, v in backends.explain(call).items() if v is not None}
                    rows.append(
                        {
                            "op": op,
                            "device": device,
                            "dtype": str(dtype).removeprefix("torch."),
                            "grad": grad,
                            "runs": runs,
                            "reasons": reasons,
                        }
                    )
    return rows


def report() -> dict[str, Any]:
    """Everything that this command prints."""
    return {
        "versions": versions(),
        "extension": {
            "loaded": _extension.load() is not None,
            "why_not": _extension.why_not(),
            "build": _extension.build_info(),
        },
        "devices": devices(),
        "requested": backends.requested(),
        "choices": choices(),
    }


def _extension_lines(extension: dict[str, Any]) -> list[str]:
    if not extension["loaded"]:
        return [f"Extension: not loaded; {extension['why_not']}"]
    build = extension["build"]
    what = f"CPU kernels only ({build.get('why', 'of an older build')})"
    if archs := build.get("cuda_archs"):
        what = f"CPU and CUDA kernels, for {', '.join(archs)}"
    tools = [tool for tool in (build.get("compiler"), build.get("nvcc")) if tool]
    return [
        f"Extension: loaded; {what}",
        f"  built for PyTorch {build['torch']}, with {', nvcc '.join(tools) or 'unknown tools'}",
    ]


def _choice_lines(rows: list[dict[str, Any]], extension: dict[str, Any]) -> list[str]:
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    table: dict[tuple[str, str, str], list[str]] = {}
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        use = "training" if row["grad"] else "inference"
        table.setdefault((row["op"], row["device"], use), []).append(row["runs"])
        for backend, reason in row["reasons"].items():
            of = reasons.setdefault((backend, reason), [])
            if (what := f"{row['op']} {row['dtype']}") not in of:
                of.append(what)
    template = "  {:<12}{:<8}{:<11}" + "{:<10}" * len(names)
    lines = [template.format("op", "device", "use", *names).rstrip()]
    lines += [template.format(*key, *runs).rstrip() for key, runs in table.items()]
    lines.append("Not taken:")
    for (backend, reason), of in sorted(
        reasons.items(), key=lambda item: backends.PREFERENCE.index(item[0][0])
    ):
        ops = sorted({what.split()[0] for what in of}, key=backends.OPS.index)
        whole = len(of) == len(ops) * len(names)
        where = ", ".join(ops if whole else of)
        reason = "the extension is not loaded" if reason == extension["why_not"] else reason
        lines.append(f"  {backend}, for {where}: {reason}")
    return lines


def text(facts: dict[str, Any]) -> str:
    """`report()` for people."""
    v = facts["versions"]
    lines = [
        f"poolformer_kernels {v['poolformer_kernels']}",
        f"Python {v['python']}, PyTorch {v['torch']} (CUDA {v['cuda'] or 'none'}), "
        f"Triton {v['triton'] or 'none'}, {v['platform']}",
        f"CPU: {v['cpu_capability']}, {v['threads']} threads",
        *_extension_lines(facts["extension"]),
    ]
    for d in facts["devices"]:
        lines.append(f"{d['device']}: {d['name']}, capability {d['capability']}; {d['code']}")
    if not facts["devices"]:
        lines.append("CUDA devices: none")
    lines.append(f"What runs, with backend={facts['requested']!r}:")
    return "\n".join(lines + _choice_lines(facts["choices"], facts["extension"]))


def main(arguments: list[str] | None = None) -> int:
    """Prints the report; 0 also where nothing is built, since plain PyTorch always runs."""
    parser = argparse.ArgumentParser(prog="python -m poolformer_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, for bug reports and tools")
    options = parser.parse_args(arguments)
    facts = report()
    print(json.dumps(facts, indent=2) if options.json else text(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())

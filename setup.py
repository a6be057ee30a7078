"""Builds poolformer_kernels._C. POOLFORMER_BUILD=auto|cuda|cpu|none; see CONTRIBUTING.md."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "poolformer_kernels"
BUILDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"}
CXX_FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
NVCC_FLAGS = ["-O3", "-lineinfo"]

sys.path.insert(0, str(ROOT))
import build_plan  # noqa: E402

_spec = importlib.util.spec_from_file_location("_extension", ROOT / PACKAGE / "_extension.py")
_extension = importlib.util.module_from_spec(_spec)  # without importing the package
_spec.loader.exec_module(_extension)


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for g in patterns for p in ROOT.glob(g))


def nvidia_wheels(kind: str, cuda: str) -> list[str]:
    """Folders of headers ("include") or libraries ("lib") that come with PyTorch's own wheels."""
    import torch

    root = Path(torch.__file__).parents[1] / "nvidia"
    together = root / f"cu{cuda.split('.')[0]}" / kind
    return [str(p) for p in ([together] if together.is_dir() else sorted(root.glob(f"*/{kind}")))]


def write_record(folder: Path, record: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _extension.RECORD).write_text(json.dumps(record, indent=2) + "\n")


def without_extension(plan: build_plan.Plan) -> dict:
    """Arguments of setup() for a package in plain Python, which records why it is that."""

    class BuildPy(build_py):
        def run(self):
            super().run()
            if not self.editable_mode:
                write_record(Path(self.build_lib, PACKAGE), {"mode": plan.mode, "why": plan.why})

    class BuildExtension(build_ext):
        def run(self):
            if self.inplace:
                for stale in (ROOT / PACKAGE).glob("_C.*"):
                    stale.unlink()
                write_record(ROOT / PACKAGE, {"mode": plan.mode, "why": plan.why})

    return {"cmdclass": {"build_py": BuildPy, "build_ext": BuildExtension}}


def with_extension(plan: build_plan.Plan, machine: build_plan.Machine) -> dict:
    """Arguments of setup() for the extension."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = build_plan.jobs(os.environ.get("MAX_JOBS"), cores or 1, build_plan.find_memory())
    os.environ.update(MAX_JOBS=str(jobs), CXX=machine.compiler)
    if plan.mode == "cuda":  # before cpp_extension is imported: it looks at them then
        os.environ.update(CUDA_HOME=machine.cuda_home, TORCH_CUDA_ARCH_LIST=plan.archs)
    from torch.utils import cpp_extension

    record = {"mode": plan.mode, "why": plan.why, **_extension.environment()}
    record["torch_version"] = machine.torch
    record["cuda_archs"] = plan.archs.split(";") if plan.archs else []
    record["nvcc"] = machine.nvcc if plan.mode == "cuda" else None
    record["compiler"] = build_plan.find_compiler_version(machine.compiler)

    # The version is on the command line so that ninja compiles again after PyTorch changed.
    flags = [*CXX_FLAGS, f"-DPOOLFORMER_TORCH={machine.torch}".replace("+", "_")]
    if sys.platform == "linux":
        flags.append("-fopenmp")  # not when linking: PyTorch's own OpenMP is the one to use
    files = sources("csrc/*.cpp", "csrc/cpu/*.cpp")
    kind, libraries, arguments = cpp_extension.CppExtension, [], {"cxx": flags}
    if plan.mode == "cuda":
        kind, libraries = cpp_extension.CUDAExtension, nvidia_wheels("lib", machine.torch_cuda)
        files += sources("csrc/cuda/*.cpp", "csrc/cuda/*.cu")
        flags.append("-DWITH_CUDA")
        for folder in nvidia_wheels("include", machine.torch_cuda):
            flags += ["-idirafter", folder]  # the toolkit's own headers come first
        arguments["nvcc"] = NVCC_FLAGS

    class BuildExtension(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.force = True  # ninja knows what is up to date

        def run(self):
            super().run()
            write_record(Path(self.build_lib, PACKAGE), record)
            if self.inplace or self.editable_mode:
                write_record(ROOT / PACKAGE, record)

    extension = kind(
        f"{PACKAGE}._C",
        files,
        include_dirs=[str(ROOT / "csrc")],
        library_dirs=libraries,
        extra_compile_args=arguments,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


def configure() -> dict:
    """Arguments of setup() for what POOLFORMER_BUILD and this machine lead to."""
    if int(setuptools.__version__.split(".")[0]) < 77:  # as pip checks in isolated builds only
        raise build_plan.BuildError(
            f"setuptools {setuptools.__version__} is too old: run `pip install torch "
            "'setuptools>=77'`, then `pip install --no-build-isolation .`"
        )
    if not BUILDS & set(sys.argv):
        return {}
    request = os.environ.get("POOLFORMER_BUILD") or "auto"
    machine = build_plan.find_machine() if request != "none" else None
    plan = build_plan.plan(request, machine, os.environ.get("TORCH_CUDA_ARCH_LIST"))
    print(f"{PACKAGE}: {plan}", file=sys.stderr)
    return without_extension(plan) if plan.mode == "none" else with_extension(plan, machine)


try:
    arguments = configure()
except build_plan.BuildError as error:
    raise SystemExit(f"{PACKAGE}: {error}") from None
setuptools.setup(**arguments)

"""Builds poolformer_kernels._C. POOLFORMER_BUILD=auto|cuda|cpu|none; see CONTRIBUTING.md."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
PACKAGE = "poolformer_kernels"
BUILDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"}
CXX_FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
NVCC_FLAGS = ["-O3", "-lineinfo"]

sys.path.insert(0, str(ROOT))
import build_plan  # noqa: E402


def extension_module():
    """poolformer_kernels/_extension.py, without importing the package."""
    spec = importlib.util.spec_from_file_location("_e", ROOT / PACKAGE / "_extension.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for g in patterns for p in ROOT.glob(g))


def nvidia_wheels(kind: str, cuda: str) -> list[str]:
    """Folders of headers ("include") or libraries ("lib") that come with PyTorch's own wheels."""
    import torch

    root = Path(torch.__file__).parents[1] / "nvidia"
    found = [root / f"cu{cuda.split('.')[0]}" / kind]
    found = found if found[0].is_dir() else sorted(root.glob(f"*/{kind}"))
    return [str(p) for p in found]


def configure() -> dict:
    """The arguments of setup() for what POOLFORMER_BUILD and this machine lead to."""
    request = os.environ.get("POOLFORMER_BUILD", "") or "auto"
    machine = build_plan.find_machine() if request != "none" else None
    plan = build_plan.plan(request, machine, os.environ.get("TORCH_CUDA_ARCH_LIST"))
    print(f"{PACKAGE}: {plan.note}", file=sys.stderr)
    if plan.mode == "none":
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = build_plan.jobs(os.environ.get("MAX_JOBS"), cores or 1, build_plan.find_memory())
    os.environ.update(MAX_JOBS=str(jobs), CXX=machine.compiler)
    if plan.mode == "cuda":  # before cpp_extension is imported: it looks at them then
        os.environ.update(CUDA_HOME=machine.cuda_home, TORCH_CUDA_ARCH_LIST=plan.archs)

    from torch.utils import cpp_extension

    record = extension_module().environment()
    record |= {
        "torch_version": machine.torch,
        "cuda_archs": plan.archs.split(";") if plan.archs else [],
        "nvcc": machine.nvcc if plan.mode == "cuda" else None,
        "compiler": build_plan.find_compiler_version(machine.compiler),
    }
    # The version is on the command line so that ninja compiles again after PyTorch changed.
    flags = [*CXX_FLAGS, f"-DPOOLFORMER_TORCH={machine.torch}".replace("+", "_")]
    if sys.platform == "linux":
        flags.append("-fopenmp")  # not when linking: PyTorch's own OpenMP is used
    if plan.mode == "cuda":
        cuda = cpp_extension.CUDAExtension
        files = sources("csrc/*.cpp", "csrc/cpu/*.cpp", "csrc/cuda/*.cpp", "csrc/cuda/*.cu")
        for folder in nvidia_wheels("include", machine.torch_cuda):
            flags += ["-idirafter", folder]
        options = {
            "extra_compile_args": {"cxx": [*flags, "-DWITH_CUDA"], "nvcc": NVCC_FLAGS},
            "library_dirs": nvidia_wheels("lib", machine.torch_cuda),
        }
    else:
        cuda = cpp_extension.CppExtension
        files = sources("csrc/*.cpp", "csrc/cpu/*.cpp")
        options = {"extra_compile_args": {"cxx": flags}}
    module = cuda(f"{PACKAGE}._C", files, include_dirs=[str(ROOT / "csrc")], **options)

    class BuildExtension(cpp_extension.BuildExtension):
        """Also writes the build record beside the extension."""

        def finalize_options(self):
            super().finalize_options()
            self.force = True  # ninja knows what is up to date

        def run(self):
            super().run()
            folders = {Path(self.build_lib, PACKAGE)}
            folders |= {ROOT / PACKAGE} if self.inplace else set()
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
                text = json.dumps(record, indent=2) + "\n"
                (folder / extension_module().RECORD).write_text(text)

    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


try:
    setup(**(configure() if BUILDS & set(sys.argv) else {}))
except build_plan.BuildError as error:
    raise SystemExit(f"{PACKAGE}: {error}") from None

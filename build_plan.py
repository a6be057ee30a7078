"""What setup.py builds, decided from POOLFORMER_BUILD and what the machine has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

MODES = ("auto", "cuda", "cpu", "none")
DEFAULT_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
ARCH_NAMES = ("native", "Turing", "Ampere", "Ada", "Hopper", "Blackwell")  # of PyTorch
BYTES_PER_JOB = 4 * 2**30


class BuildError(Exception):
    """A request that this machine cannot meet; the message names the cure."""


@dataclass(frozen=True)
class Machine:
    """What a build can use."""

    torch: str  # version of PyTorch
    torch_cuda: str | None  # CUDA version PyTorch was built with
    compiler: str | None  # C++ compiler
    python_headers: bool
    cuda_home: str | None = None  # root of the toolkit
    nvcc: str | None = None  # version of nvcc, such as "13.0"
    nvcc_archs: tuple[str, ...] = ()  # such as "8.0"
    gpus: int = 0  # visible to PyTorch
    windows: bool = False


@dataclass(frozen=True)
class Plan:
    """mode: "cuda" (CPU and CUDA kernels), "cpu" or "none"; why: what led to it."""

    mode: str
    why: str
    archs: str = ""  # in the form of TORCH_CUDA_ARCH_LIST

    def __str__(self) -> str:
        what = {
            "cuda": f"CPU and CUDA kernels, for {self.archs}",
            "cpu": "CPU kernels only",
            "none": "no kernels, plain PyTorch will run everything",
        }
        return f"{what[self.mode]} ({self.why})"


def _no_compiler(machine: Machine) -> str | None:
    if machine.windows:
        return "the extension is built on Linux and macOS only: use WSL2"
    if machine.compiler is None:
        return (
            "no C++ compiler was found: install one (`apt install g++`, `dnf install gcc-c++`) "
            "or name it in CXX"
        )
    if not machine.python_headers:
        return (
            "Python's headers (Python.h) are missing: install them (`apt install python3-dev`, "
            "`dnf install python3-devel`)"
        )
    return None


def _no_cuda(machine: Machine) -> str | None:
    if machine.torch_cuda is None:
        return (
            f"PyTorch {machine.torch} was built without CUDA: for CUDA kernels, install a CUDA "
            "build of PyTorch, see https://pytorch.org/get-started"
        )
    if machine.nvcc is None:
        return (
            f"nvcc was not found: install the CUDA {machine.torch_cuda} toolkit and put nvcc on "
            "PATH, or set CUDA_HOME to the toolkit's root"
        )
    if machine.nvcc.split(".")[0] != machine.torch_cuda.split(".")[0]:
        return (
            f"nvcc is CUDA {machine.nvcc} and PyTorch was built with CUDA {machine.torch_cuda}: "
            f"set CUDA_HOME to a CUDA {machine.torch_cuda.split('.')[0]} toolkit, or install a "
            f"PyTorch for CUDA {machine.nvcc.split('.')[0]}"
        )
    return None


def _archs(asked: str | None, machine: Machine) -> str:
    """The architectures to compile for; those asked for must all be known to nvcc."""
    known = ", ".join(machine.nvcc_archs)
    names = [name for name in re.split(r"[;,\s]+", asked or "") if name]
    for name in names:
        number = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", name)
        if number and number.group(1) not in machine.nvcc_archs:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST has {name}, which nvcc {machine.nvcc} cannot compile "
                f"(it can: {known}): leave it out, or use another toolkit"
            )
        if name == "native" and not machine.gpus:
            raise BuildError(
                "TORCH_CUDA_ARCH_LIST is native, and no GPU is visible here: name the compute "
                f"capabilities instead, such as {DEFAULT_ARCHS}"
            )
        if not number and name not in ARCH_NAMES:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST has {name!r}, which is no compute capability: write "
                f"numbers such as {DEFAULT_ARCHS}"
            )
    if names:
        return ";".join(names)
    names = [a for a in DEFAULT_ARCHS.split(";") if a.removesuffix("+PTX") in machine.nvcc_archs]
    if not names:
        raise BuildError(
            f"nvcc {machine.nvcc} knows none of {DEFAULT_ARCHS} (it can: {known}): set "
            "TORCH_CUDA_ARCH_LIST, or use another toolkit"
        )
    return ";".join([*names[:-1], names[-1].removesuffix("+PTX") + "+PTX"])


def plan(request: str, machine: Machine | None, arch_list: str | None = None) -> Plan:
    """Decides what to build. request: value of POOLFORMER_BUILD; machine: None without PyTorch."""
    if request not in MODES:
        raise BuildError(f"POOLFORMER_BUILD is {request!r}, and must be one of {', '.join(MODES)}")
    if request == "none":
        return Plan("none", "POOLFORMER_BUILD=none")
    if machine is None:
        raise BuildError(
            "PyTorch is needed to build and was not found. Run `pip install torch`, then `pip "
            "install --no-build-isolation .` (without that option pip builds where your PyTorch "
            "cannot be seen); or set POOLFORMER_BUILD=none for an install without kernels"
        )
    lack = _no_compiler(machine)
    if lack and request == "auto":
        return Plan("none", lack)
    if lack:
        raise BuildError(f"POOLFORMER_BUILD={request}: {lack}")
    if request == "cpu":
        return Plan("cpu", "POOLFORMER_BUILD=cpu")
    lack = _no_cuda(machine)
    if lack and request == "auto":
        return Plan("cpu", lack)
    if lack:
        raise BuildError(f"POOLFORMER_BUILD=cuda: {lack}")
    archs = _archs(arch_list, machine)
    return Plan("cuda", f"CUDA {machine.nvcc}", archs)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""


def find_compiler() -> str | None:
    """The C++ compiler: CXX, or the first of c++, g++, clang++ that runs."""
    names = (os.environ["CXX"],) if os.environ.get("CXX") else ("c++", "g++", "clang++")
    for name in names:
        if _output(*name.split(), "--version"):
            return name
    return None


def find_compiler_version(compiler: str) -> str:
    """The first line of `compiler --version`."""
    return (_output(*compiler.split(), "--version").splitlines() or ["unknown"])[0]


def find_cuda() -> tuple[str | None, str | None, tuple[str, ...]]:
    """(root, version, architectures) of the CUDA toolkit, or (None, None, ())."""
    root = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(root, "bin", "nvcc")) if root else shutil.which("nvcc")
    version = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version")) if nvcc else None
    if nvcc is None or version is None:
        return None, None, ()
    if not root:  # nvcc on PATH may be a wrapper: it knows its own root
        top = re.search(r"^#\$ TOP=(.+)$", _output(nvcc, "--dryrun", "x.cu"), re.MULTILINE)
        root = os.path.realpath(top.group(1) if top else Path(nvcc).resolve().parents[1])
    numbers = re.findall(r"compute_(\d+)(\d)\b", _output(nvcc, "--list-gpu-arch"))
    return root, version.group(1), tuple(f"{major}.{minor}" for major, minor in numbers)


def find_machine() -> Machine | None:
    """This machine, or None when PyTorch cannot be imported."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return None
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    home, nvcc, archs = find_cuda() if torch.version.cuda else (None, None, ())
    return Machine(
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        compiler=find_compiler(),
        python_headers=headers,
        cuda_home=home,
        nvcc=nvcc,
        nvcc_archs=archs,
        gpus=torch.cuda.device_count(),
        windows=os.name == "nt",
    )


def jobs(asked: str | None, cores: int, memory: int) -> int:
    """Parallel compilations: MAX_JOBS, or one a core with 4 GB each."""
    if not asked:
        return max(1, min(cores, memory // BYTES_PER_JOB))
    if not asked.isdecimal() or int(asked) < 1:
        raise BuildError(f"MAX_JOBS is {asked!r}, and must be a whole number of at least 1")
    return int(asked)


def find_memory() -> int:
    """Bytes of memory that this process may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no cgroup, or "max"
        return total

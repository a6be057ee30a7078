"""setup.py's decision, on machines that exist only here, and what a source release contains."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import tarfile

import pytest
from conftest import ROOT

import build_plan
from build_plan import BuildError, Machine, plan

ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
FULL = Machine(
    torch="2.14.1+cu130",
    torch_cuda="13.0",
    compiler="g++",
    python_headers=True,
    cuda_home="/toolkit",
    nvcc="13.0",
    nvcc_archs=ARCHS,
)
NO_NVCC = dataclasses.replace(FULL, cuda_home=None, nvcc=None, nvcc_archs=())
CPU_TORCH = dataclasses.replace(NO_NVCC, torch="2.13.0+cpu", torch_cuda=None)
OTHER_MAJOR = dataclasses.replace(FULL, nvcc="12.8")
NO_COMPILER = dataclasses.replace(FULL, compiler=None)
NO_HEADERS = dataclasses.replace(FULL, python_headers=False)
WINDOWS = dataclasses.replace(FULL, windows=True)


@pytest.mark.parametrize(
    ("request_", "machine", "mode", "said"),
    [
        ("auto", FULL, "cuda", "CUDA 13.0"),
        ("auto", NO_NVCC, "cpu", "nvcc was not found"),
        ("auto", CPU_TORCH, "cpu", "built without CUDA"),
        ("auto", OTHER_MAJOR, "cpu", "nvcc is CUDA 12.8"),
        ("auto", NO_COMPILER, "none", "apt install g++"),
        ("auto", NO_HEADERS, "none", "python3-dev"),
        ("auto", WINDOWS, "none", "WSL2"),
        ("cuda", FULL, "cuda", "CUDA 13.0"),
        ("cpu", FULL, "cpu", "POOLFORMER_BUILD=cpu"),
        ("none", FULL, "none", "POOLFORMER_BUILD=none"),
        ("none", None, "none", "POOLFORMER_BUILD=none"),
    ],
)
def test_plan(request_: str, machine: Machine | None, mode: str, said: str) -> None:
    decided = plan(request_, machine)
    assert decided.mode == mode
    assert said in str(decided)


@pytest.mark.parametrize(
    ("request_", "machine", "said"),
    [
        ("gpu", FULL, "must be one of auto, cuda, cpu, none"),
        ("auto", None, "pip install torch"),
        ("cpu", None, "pip install --no-build-isolation ."),
        ("cuda", NO_NVCC, "set CUDA_HOME"),
        ("cuda", CPU_TORCH, "for CUDA kernels, install a CUDA build"),
        ("cuda", OTHER_MAJOR, "set CUDA_HOME to a CUDA 13 toolkit"),
        ("cuda", NO_COMPILER, "apt install g++"),
        ("cpu", NO_COMPILER, "apt install g++"),
        ("cpu", NO_HEADERS, "python3-dev"),
    ],
)
def test_plan_names_the_cure(request_: str, machine: Machine | None, said: str) -> None:
    with pytest.raises(BuildError) as error:
        plan(request_, machine)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("asked", "nvcc_archs", "archs"),
    [
        (None, ARCHS, "8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        ("", ARCHS, "8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        (None, ("7.5", "8.0", "8.6", "8.9", "9.0"), "8.0;8.6;8.9;9.0+PTX"),
        ("8.0+PTX", ARCHS, "8.0+PTX"),
        ("8.0 9.0a;12.0+PTX", ARCHS, "8.0;9.0a;12.0+PTX"),
        ("Ampere;Hopper", ARCHS, "Ampere;Hopper"),
    ],
)
def test_architectures(asked: str | None, nvcc_archs: tuple[str, ...], archs: str) -> None:
    machine = dataclasses.replace(FULL, nvcc_archs=nvcc_archs)
    assert plan("auto", machine, asked).archs == archs


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("8.0;6.1", "has 6.1, which nvcc 13.0 cannot compile"),
        ("sm_90", "is no compute capability"),
        ("Fermi", "is no compute capability"),
        ("native", "no GPU is visible"),
    ],
)
def test_architectures_that_cannot_be(asked: str, said: str) -> None:
    with pytest.raises(BuildError, match=said):
        plan("auto", FULL, asked)
    assert plan("auto", CPU_TORCH, asked).mode == "cpu"  # nothing is compiled for them


def test_no_known_architecture_left() -> None:
    with pytest.raises(BuildError, match="knows none of"):
        plan("cuda", dataclasses.replace(FULL, nvcc_archs=("13.0",)))


@pytest.mark.parametrize(
    ("asked", "cores", "memory", "jobs"),
    [(None, 16, 64, 16), (None, 16, 10, 2), (None, 1, 64, 1), (None, 8, 2, 1), ("3", 1, 1, 3)],
)
def test_jobs(asked: str | None, cores: int, memory: int, jobs: int) -> None:
    assert build_plan.jobs(asked, cores, memory * 2**30) == jobs


@pytest.mark.parametrize("asked", ["0", "-1", "many", "1.5"])
def test_jobs_refuses(asked: str) -> None:
    with pytest.raises(BuildError, match="MAX_JOBS"):
        build_plan.jobs(asked, 1, 2**40)


def test_compiler_is_cxx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert build_plan.find_compiler() is None
    monkeypatch.setenv("CXX", f"{sys.executable} -I")  # anything that answers --version
    assert build_plan.find_compiler() == f"{sys.executable} -I"


def test_cuda_home_without_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build_plan.find_cuda() == (None, None, ())


NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 12.8, V12.8.93" ;;
  --list-gpu-arch) printf 'compute_80\\ncompute_120\\n' ;;
  --dryrun) echo '#$ _HERE_={root}/bin' >&2; echo '#$ TOP={root}/bin/..' >&2 ;;
esac
"""


def test_cuda_root_comes_from_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """nvcc on PATH may be a wrapper far from its toolkit."""
    root, wrapper = tmp_path / "toolkit", tmp_path / "bin" / "nvcc"
    (root / "bin").mkdir(parents=True)
    wrapper.parent.mkdir()
    wrapper.write_text(NVCC.format(root=root))
    wrapper.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
    assert build_plan.find_cuda() == (str(root), "12.8", ("8.0", "12.0"))


def test_source_release_is_complete(tmp_path) -> None:
    """All that setup.py compiles and imports is in the sdist, which needs no PyTorch."""
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "_C*", "*.egg-info")
    for name in ("csrc", "poolformer_kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".toml", ".md", ".in") or path.name == "LICENSE":
            shutil.copy(path, tree)
    script = "import sys; sys.modules['torch'] = None; exec(open('setup.py').read())"
    code = f"__file__ = {str(tree / 'setup.py')!r}; {script}"
    done = subprocess.run(
        [sys.executable, "-c", code, "-q", "sdist", "-d", str(tmp_path)],
        cwd=tree,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    wanted = {p.relative_to(tree).as_posix() for p in (tree / "csrc").rglob("*") if p.is_file()}
    wanted |= {"build_plan.py", "pyproject.toml", "LICENSE", "poolformer_kernels/py.typed"}
    assert wanted <= packed

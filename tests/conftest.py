"""What every test file shares."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network, or waits for it

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # for benchmarks and build_plan, which are not installed
    sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)


def extension() -> Any:
    """The compiled extension, or None."""
    from poolformer_kernels import _extension

    return _extension.load()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets PyTorch's threads; the test leaves as many as it found."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=extension().cpu_capabilities() if extension() else [])
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set that this machine runs, and that the C++ kernels use in this test."""
    kernels = extension()
    before = kernels.cpu_capability()
    kernels.set_cpu_capability(request.param)
    yield request.param
    kernels.set_cpu_capability(before)


@pytest.fixture
def many_cores() -> Iterator[None]:
    """The C++ kernels cut backwards into as many tasks as on 64 cores."""
    extension().set_cpu_backward_tasks(64)
    yield
    extension().set_cpu_backward_tasks(0)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small PoolFormer, as save_pretrained writes it."""
    from benchmarks import models
    from poolformer_kernels import PoolFormerConfig, PoolFormerForImageClassification

    folder = tmp_path_factory.mktemp("tiny")
    config = PoolFormerConfig(depths=[1, 2, 1, 1], hidden_sizes=[8, 16, 8, 8], num_labels=30)
    models.seed(PoolFormerForImageClassification(config)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def run_python(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python ARGUMENTS` with the repository importable, in another folder."""
    folder = tmp_path_factory.mktemp("run")

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run

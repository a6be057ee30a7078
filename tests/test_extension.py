"""The build record, checked before loading, and the report of `python -m poolformer_kernels`."""

from __future__ import annotations

import importlib.machinery
import json
import sys
from pathlib import Path

import pytest
import torch

import poolformer_kernels
from poolformer_kernels import _extension, backends

SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
RUNNING = _extension.environment()
CUDA_FUNCTIONS = {
    "cuda_architecture",
    "cuda_stats_partials",
    "cuda_pool_mixer_forward",
    "cuda_pool_mixer_backward",
    "cuda_group_norm_forward",
    "cuda_group_norm_backward",
    "cuda_mlp_forward",
    "cuda_mlp_backward",
}


def make(folder: Path, record: object, library: str = f"_C{SUFFIX}") -> Path:
    """A package folder with an extension that is no library, and `record` (None: no record)."""
    (folder / library).write_bytes(b"no library")
    if record is not None:
        text = record if isinstance(record, str) else json.dumps(record)
        (folder / _extension.RECORD).write_text(text)
    return folder


def test_fitting_record_passes(tmp_path: Path) -> None:
    assert _extension.check(make(tmp_path, RUNNING), RUNNING) is None


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("torch", "2.8", "was built for PyTorch 2.8, and this is PyTorch "),
        ("cuda", "11.8", "was built for CUDA 11.8, and this is CUDA "),
        ("cxx11_abi", not RUNNING["cxx11_abi"], "was built for C++11 ABI "),
        ("python", "cpython-39", "was built for Python cpython-39, and this is Python "),
        ("platform", "linux-pdp11", "was built for platform linux-pdp11"),
    ],
)
def test_mismatch_is_one_sentence_with_the_cure(
    tmp_path: Path, key: str, value: object, said: str
) -> None:
    reason = _extension.check(make(tmp_path, {**RUNNING, key: value}), RUNNING)
    assert reason is not None
    assert said in reason
    assert reason.endswith(_extension._cure())
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (None, "has no record of what it was built for"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("\udcff".encode("utf-8", "surrogateescape").decode("latin-1"), "cannot be read"),
        ({k: v for k, v in RUNNING.items() if k != "torch"}, "lacks 'torch'"),
    ],
)
def test_broken_record(tmp_path: Path, record: object, said: str) -> None:
    reason = _extension.check(make(tmp_path, record), RUNNING)
    assert reason is not None
    assert said in reason
    assert _extension._cure() in reason


def test_not_built_says_why(tmp_path: Path) -> None:
    reason = _extension.check(tmp_path, RUNNING)
    assert reason is not None and "not built" in reason
    record = {"mode": "none", "why": "no C++ compiler was found"}
    (tmp_path / _extension.RECORD).write_text(json.dumps(record))
    reason = _extension.check(tmp_path, RUNNING)
    assert reason is not None and "not built (no C++ compiler was found)" in reason


def test_built_for_another_python(tmp_path: Path) -> None:
    make(tmp_path, RUNNING, "_C.cpython-39-x86_64-linux-gnu.so")
    reason = _extension.check(tmp_path, RUNNING)
    assert reason is not None and "another Python (_C.cpython-39" in reason


@pytest.fixture
def package_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The package with its extension looked for in an empty folder: that folder."""
    monkeypatch.setattr(_extension, "FOLDER", tmp_path)
    monkeypatch.setattr(poolformer_kernels, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "poolformer_kernels._C", raising=False)
    _extension._loaded.cache_clear()
    backends._resolved.clear()
    yield tmp_path
    _extension._loaded.cache_clear()
    backends._resolved.clear()


def test_load_that_fails_is_a_sentence(package_at: Path) -> None:
    make(package_at, RUNNING)
    assert _extension.load() is None
    reason = _extension.why_not()
    assert reason is not None and "failed to load (ImportError: " in reason
    assert reason.endswith(_extension._cure())


def test_ops_run_without_the_extension(package_at: Path) -> None:
    assert _extension.load() is None
    x, weight, bias = torch.randn(2, 4, 5, 6), torch.randn(4), torch.randn(4)
    y = poolformer_kernels.group_norm(x, weight, bias)
    torch.testing.assert_close(y, torch.group_norm(x, 1, weight, bias))
    with pytest.raises(backends.BackendUnavailable, match="not built"):
        poolformer_kernels.group_norm(x, weight, bias, backend="cpu")


def test_what_was_built_loads() -> None:
    record = _extension.build_info()
    if record is None or record["mode"] == "none":
        pytest.skip("the extension is not built here")
    module = _extension.load()
    assert module is not None, _extension.why_not()
    assert _extension.why_not() is None
    assert module is _extension.load()
    functions = {name for name in dir(module) if name.startswith("cuda_")}
    assert functions == (CUDA_FUNCTIONS if record["mode"] == "cuda" else set())


def test_command_line(run_python) -> None:
    done = run_python("-m", "poolformer_kernels")
    assert done.returncode == 0, done.stderr
    for said in (f"poolformer_kernels {poolformer_kernels.__version__}", torch.__version__):
        assert said in done.stdout
    for op in backends.OPS:
        assert f"  {op}" in done.stdout
    if (reason := _extension.why_not()) is not None:
        assert reason in done.stdout


def test_command_line_json(run_python) -> None:
    done = run_python("-m", "poolformer_kernels", "--json", POOLFORMER_BACKEND="torch")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["extension"]["loaded"] == (_extension.load() is not None)
    assert facts["requested"] == "torch"
    assert {row["op"] for row in facts["choices"]} == set(backends.OPS)
    assert {row["runs"] for row in facts["choices"]} == {"torch"}


@pytest.mark.gpu
def test_command_line_runs_a_kernel(run_python) -> None:
    if (_extension.build_info() or {}).get("mode") != "cuda":
        pytest.skip("this build has no CUDA code")
    done = run_python("-m", "poolformer_kernels")
    assert "runs this build's code (compiled for " in done.stdout, done.stdout + done.stderr

"""Which backend runs a call: argument > use_backend > POOLFORMER_BACKEND > the best available."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import poolformer_kernels as pk
from poolformer_kernels import _extension, backends

CALL = backends.Call("mlp", "cpu", torch.float32, "gelu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_resolved", {})


def pretend(monkeypatch: pytest.MonkeyPatch, **native: Any) -> None:
    """An extension is loaded, on a CPU with or without native half-precision products.

    cuda: the architecture that its CUDA kernels run for, 0 if none fits, absent without kernels.
    is: the GPU's compute capability.
    """
    module = SimpleNamespace(
        amx_bf16=lambda: native.get("amx", False), native_fp16=lambda: native.get("fp16", False)
    )
    if "cuda" in native:
        module.cuda_architecture = lambda device: native["cuda"]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: native.get("is", (9, 0)))
    monkeypatch.setattr(_extension, "load", lambda: module)
    record = {"mode": "cpu", "why": "nvcc was not found", "cuda_archs": ["12.0"]}
    monkeypatch.setattr(_extension, "build_info", lambda: record)
    monkeypatch.setattr(backends, "_has_triton", lambda: native.get("triton", True))


def resolve(**changes: Any) -> str:
    call = {"op": "mlp", "device": "cpu", "dtype": torch.float32, "act": "gelu", **changes}
    return backends.resolve(**call)


def test_order_of_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    assert resolve() == "cpu"
    monkeypatch.setattr(backends, "_default", "torch")
    assert resolve() == "torch"
    with pk.use_backend("cpu"):
        assert resolve() == "cpu"
        assert resolve(backend="torch") == "torch"
        with pk.use_backend("torch"):
            assert resolve() == "torch"
        assert resolve() == "cpu"
        assert resolve(backend="auto") == "cpu"
    assert resolve() == "torch"


def test_use_backend_ends_with_its_context_also_on_errors() -> None:
    with pytest.raises(KeyError), pk.use_backend("torch"):
        raise KeyError
    assert backends.requested() == backends._default


def test_use_backend_rules_its_own_thread_only() -> None:
    seen = []
    with pk.use_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(backends.requested()))
        thread.start()
        thread.join()
    assert seen == [backends._default]


def test_the_environment_rules_the_process(run_python: Any) -> None:
    code = "import poolformer_kernels as pk; print(pk.backends.requested())"
    assert run_python("-c", code, POOLFORMER_BACKEND="torch").stdout.strip() == "torch"
    wrong = run_python("-c", code, POOLFORMER_BACKEND="gpu").stderr
    assert "POOLFORMER_BACKEND is 'gpu'; it has to be one of 'auto', 'torch', 'cpu'" in wrong


AUTO = [
    ({}, {}, "cpu"),
    ({"dtype": torch.bfloat16}, {}, "cpu"),
    ({"dtype": torch.bfloat16}, {"amx": True}, "torch"),
    ({"dtype": torch.float16}, {"amx": True}, "cpu"),
    ({"dtype": torch.float16}, {"fp16": True}, "torch"),
    ({"dtype": torch.bfloat16, "op": "pool_mixer", "act": None}, {"amx": True}, "cpu"),
    ({"dtype": torch.float64}, {}, "torch"),
    ({"op": "group_norm", "act": None}, {}, "torch"),
    ({"grad": True}, {}, "cpu"),
    ({"grad": True, "dtype": torch.bfloat16}, {}, "cpu"),
    ({"grad": True, "dtype": torch.bfloat16, "op": "pool_mixer", "act": None}, {}, "cpu"),
    ({"grad": True, "op": "group_norm", "act": None}, {}, "torch"),
    ({"act": "callable"}, {}, "torch"),
    ({"autocast": True}, {}, "cpu"),
    ({"autocast": True, "dtype": torch.bfloat16}, {}, "cpu"),
    ({"autocast": True, "grad": True}, {}, "cpu"),
    ({"autocast": True}, {"amx": True}, "torch"),
    ({"autocast": True, "op": "pool_mixer", "act": None}, {"amx": True}, "cpu"),
    ({"autocast": True, "dtype": torch.float64}, {}, "torch"),
    ({"op": "patch_embed", "act": None}, {}, "cpu"),
    ({"op": "patch_embed", "act": None, "dtype": torch.bfloat16}, {}, "cpu"),
    ({"op": "patch_embed", "act": None, "dtype": torch.bfloat16}, {"amx": True}, "torch"),
    ({"op": "patch_embed", "act": None, "autocast": True}, {}, "cpu"),
    ({"op": "patch_embed", "act": None, "device": "cuda"}, {"cuda": 80}, "torch"),
    ({"device": "cuda"}, {}, "triton"),
    ({"device": "cuda", "grad": True, "dtype": torch.bfloat16}, {}, "triton"),
    ({"device": "cuda", "op": "group_norm", "act": None}, {}, "triton"),
    ({"device": "cuda", "op": "group_norm", "act": None}, {"cuda": 80}, "cuda"),
    ({"device": "cuda", "op": "pool_mixer", "act": None, "grad": True}, {"cuda": 80}, "cuda"),
    ({"device": "cuda", "op": "pool_mixer", "act": None}, {"cuda": 80, "triton": False}, "cuda"),
    ({"device": "cuda", "op": "pool_mixer", "act": None}, {"cuda": 0}, "triton"),
    ({"device": "cuda"}, {"cuda": 80, "is": (9, 0)}, "triton"),
    ({"device": "cuda"}, {"cuda": 80, "is": (9, 0), "triton": False}, "cuda"),
    ({"device": "cuda"}, {"cuda": 80, "is": (8, 0)}, "cuda"),
    ({"device": "cuda"}, {"cuda": 120, "is": (12, 0)}, "cuda"),
    ({"device": "cuda", "grad": True}, {"cuda": 80, "is": (9, 0)}, "triton"),
    ({"device": "cuda", "grad": True}, {"cuda": 80, "is": (8, 0)}, "cuda"),
    ({"device": "cuda", "grad": True}, {"cuda": 80, "triton": False}, "cuda"),
    ({"device": "cuda"}, {"triton": False}, "torch"),
    ({"device": "cuda", "dtype": torch.float64}, {}, "torch"),
    ({"device": "cuda", "autocast": True}, {}, "triton"),
    ({"device": "mps"}, {}, "torch"),
]


@pytest.mark.parametrize(("call", "native", "expected"), AUTO)
def test_auto_takes_the_first_that_can_and_is_not_slower(
    monkeypatch: pytest.MonkeyPatch, call: Any, native: Any, expected: str
) -> None:
    pretend(monkeypatch, **native)
    assert resolve(**call) == expected


def test_the_dtype_of_autocast_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, amx=True)
    for dtype, expected in ((torch.bfloat16, "torch"), (torch.float16, "cpu")):
        with torch.autocast("cpu", dtype):
            assert resolve(autocast=True) == expected


def test_without_the_extension_auto_moves_on_and_a_name_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_extension, "load", lambda: None)
    monkeypatch.setattr(_extension, "why_not", lambda: "the extension is not built")
    assert resolve() == "torch"
    with pytest.raises(pk.BackendUnavailable, match="cannot run this call: the extension is not"):
        resolve(backend="cpu")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"device": "cuda", "backend": "cpu"}, "it runs on CPU tensors, and this one is on cuda"),
        ({"act": "callable", "backend": "cpu"}, "an activation given as a callable"),
        ({"autocast": True, "dtype": torch.float64, "backend": "cpu"}, "compute in float32"),
        ({"backend": "cuda"}, "it runs on NVIDIA GPUs, and this tensor is on cpu"),
        (
            {"backend": "cuda", "device": "cuda", "grad": True},
            r"built without CUDA kernels \(nvcc was not found\)",
        ),
        ({"backend": "triton"}, "it runs on GPUs, and this tensor is on cpu"),
        ({"backend": "triton", "device": "cuda", "act": "callable"}, "given as a callable"),
    ],
)
def test_a_backend_asked_for_by_name_says_why_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch, call: Any, reason: str
) -> None:
    pretend(monkeypatch)
    with pytest.raises(pk.BackendUnavailable, match=reason):
        resolve(**call)


@pytest.mark.parametrize(
    ("cuda", "changes", "reason"),
    [
        (0, {}, "built for 12.0, runs on this GPU of compute capability 9.0: build again with"),
        (80, {"dtype": torch.float64}, "no kernel for torch.float64"),
    ],
)
def test_cuda_kernels_that_do_not_fit_say_so(
    monkeypatch: pytest.MonkeyPatch, cuda: int, changes: Any, reason: str
) -> None:
    pretend(monkeypatch, cuda=cuda)
    with pytest.raises(pk.BackendUnavailable, match=reason):
        resolve(**{"op": "pool_mixer", "act": None, "device": "cuda", "backend": "cuda", **changes})


def test_explain_has_a_reason_for_every_backend_that_auto_passes_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch)
    reasons = backends.explain(CALL)
    assert list(reasons) == list(backends.PREFERENCE) and set(reasons) == set(backends.BACKENDS)
    assert reasons["cpu"] is None and reasons["torch"] is None
    assert all(reasons[name] for name in ("cuda", "triton"))

"""DDP and FSDP2 around accelerated models: two processes of gloo on the CPU, through torchrun.

All cases run in one pair of processes (distributed_worker.py), whose start takes most of the time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerated
import pytest
import torch
from cases import KERNELS
from feature_matrix import SOURCES

if not torch.distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

WORKER = str(Path(__file__).with_name("distributed_worker.py"))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, run_python: Callable[..., Any]) -> Any:
    folder = tmp_path_factory.mktemp("distributed")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_python(*torchrun, WORKER, str(folder))
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(params=SOURCES)
def found(request: pytest.FixtureRequest, result: Any) -> Any:
    """What was seen of the models of one source, on backend "cpu"."""
    library = request.param.split(",")[0]
    if library in ("transformers", "timm"):
        pytest.importorskip(library)
    return result[request.param]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_losses_and_gradients_are_those_of_one_process(found: Any, way: str, backend: str) -> None:
    assert found[way]["losses"] == pytest.approx(found["one"], rel=1e-6)
    wrong = {name: error for name, error in found[way]["errors"].items() if not error < 1e-4}
    assert found[way]["errors"] and not wrong
    assert found[way]["fused"] == accelerated.BLOCKS


@pytest.mark.parametrize("backend", KERNELS)
def test_the_forward_of_sharded_blocks_may_be_in_bfloat16(found: Any, backend: str) -> None:
    losses = found["FSDP2 bfloat16"]["losses"]
    assert losses == pytest.approx(found["one"], rel=5e-3)
    assert losses != pytest.approx(found["one"], rel=2e-5)
    assert found["FSDP2 bfloat16"]["fused"] == accelerated.BLOCKS


def test_a_sharded_run_goes_on_from_its_checkpoint(result: Any) -> None:
    assert result["resume"]["resumed"] == result["resume"]["expected"]


@pytest.mark.parametrize("source", ["own", "original"])
def test_a_sharded_model_changes_backend_and_is_restored(result: Any, source: str) -> None:
    found = result["change"][source]
    assert found["losses"] == pytest.approx([found["expected"]] * 4, rel=2e-5)
    assert all(found["classes"]), "a block has lost what FSDP2 added to its class"

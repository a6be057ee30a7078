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


@pytest.fixture(params=["own", "transformers", "timm"])
def losses(request: pytest.FixtureRequest, result: Any) -> Any:
    if request.param != "own":
        pytest.importorskip(request.param)
    return result[request.param]


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_losses_are_those_of_one_process(losses: Any, way: str) -> None:
    assert losses[way] == pytest.approx(losses["one"], rel=2e-5)
    assert len(set(losses["one"])) > 1, "nothing was learned"


def test_the_forward_of_sharded_blocks_may_be_in_bfloat16(losses: Any) -> None:
    assert losses["fsdp bfloat16"] == pytest.approx(losses["one"], rel=3e-2)
    assert losses["fsdp bfloat16"] != pytest.approx(losses["one"], rel=2e-5)


def test_every_parameter_gets_a_gradient(losses: Any) -> None:
    assert losses["without"] == []


def test_sharded_blocks_are_known(losses: Any) -> None:
    assert losses["fused"] == accelerated.BLOCKS


def test_a_sharded_run_goes_on_from_its_checkpoint(result: Any) -> None:
    assert result["resume"]["resumed"] == result["resume"]["expected"]


@pytest.mark.parametrize("source", ["own", "original"])
def test_a_sharded_model_changes_backend_and_is_restored(result: Any, source: str) -> None:
    found = result["change"][source]
    assert found["losses"] == pytest.approx([found["expected"]] * 4, rel=2e-5)
    assert all(found["classes"]), "a block has lost what FSDP2 added to its class"

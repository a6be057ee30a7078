"""How many Triton launches the blocks of a stage need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerated import block_by_block, hugging_face, logits, make

import poolformer_kernels as pk

pytest.importorskip("triton")
import triton

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_two_launches_a_block_and_one_that_computes_statistics(
    train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[Any] = []
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", launches.append)
    one_stage = {"hidden_sizes": [32], "depths": [2], "num_encoder_blocks": 1}
    model = make(lambda drop_path: hugging_face(drop_path, **one_stage)).bfloat16().cuda()
    pk.accelerate(model, "triton").train(train)
    x = torch.randn(1, 3, 32, 24).bfloat16().cuda()
    linked = logits(model, x)
    assert len(launches) == 2 * 2 + 1
    launches.clear()
    with block_by_block():
        alone = logits(model, x)
    assert len(launches) == 2 * 2 + 2
    torch.testing.assert_close(linked, alone, rtol=2e-2, atol=2e-2)

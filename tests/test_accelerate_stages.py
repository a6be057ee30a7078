"""Statistics handed from block to block: counted, and the same results as block by block."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.utils.parametrize
from accelerated import (
    DEPTHS,
    HANDED,
    LONGEST,
    SOURCES,
    block_by_block,
    given_in,
    hugging_face,
    images,
    logits,
    loss_and_gradients,
    make,
    mixers_given_statistics,
    original_poolformer,
    stages_of,
    timm,
)
from cases import KERNELS
from torch import Tensor, nn

import poolformer_kernels as pk

FOREIGN = SOURCES[:3]
needs_kernels = pytest.mark.parametrize("backend", KERNELS)


@needs_kernels
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("source", SOURCES)
def test_each_block_but_the_first_is_given_statistics(
    source: Any, train: bool, backend: str
) -> None:
    model = pk.accelerate(make(source, drop_path=0.4), backend).train(train)
    x = images()
    with mixers_given_statistics() as given:
        linked = loss_and_gradients(model, x)
    state = torch.get_rng_state()
    assert given == HANDED
    with mixers_given_statistics() as given, block_by_block():
        alone = loss_and_gradients(model, x)
    assert given == [False] * len(HANDED)
    assert torch.equal(torch.get_rng_state(), state), "another number of random draws"
    for a, b in zip(linked, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * (1 + b.abs().max().item()))


@pytest.mark.parametrize("source", SOURCES)
def test_the_torch_backend_computes_no_statistics_to_hand_on(source: Any) -> None:
    model = pk.accelerate(make(source), "torch")
    with mock.patch.object(pk.reference, "statistics", side_effect=AssertionError):
        assert logits(model, images()).isfinite().all()


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@needs_kernels
@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_hooked_block_sees_plain_tensors_and_the_others_stay_linked(
    source: Any, register: str, backend: str
) -> None:
    model = pk.accelerate(make(source), backend).train()
    stage = stages_of(model)[LONGEST]
    stage.append(copy.deepcopy(stage[0]))
    stage.append(copy.deepcopy(stage[0]))
    seen: list[Any] = []
    getattr(stage[2], register)(lambda module, *values: seen.append(values) and None)
    with mixers_given_statistics() as given:
        logits(model, images()).sum().backward()
    place = sum(DEPTHS[:LONGEST])
    assert given[place : place + 5] == [False, True, False, False, True]
    arguments, *result = seen[0]
    assert len(seen) == 1 and len(arguments) == 1 and isinstance(arguments[0], Tensor)
    if register == "register_forward_hook":
        (output,) = result
        output = output[0] if source is hugging_face else output
        assert isinstance(output, Tensor) and output.shape == arguments[0].shape


def replace_forward(stage: Any) -> None:
    stage[1].forward = lambda x, forward=stage[1].forward: forward(x)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module(x)


def wrap(stage: Any) -> None:
    stage[1] = Wrapper(stage[1])


def parametrize(stage: Any) -> None:
    torch.nn.utils.parametrize.register_parametrization(stage[1], "layer_scale_1", nn.Identity())


def restore_block(stage: Any) -> None:
    pk.restore(stage[1])


ALONE = [(replace_forward, 2), (wrap, 3), (parametrize, 3), (restore_block, 2)]


@needs_kernels
@pytest.mark.filterwarnings("ignore:a block runs its own forward")
@pytest.mark.parametrize(("change", "mixers"), ALONE)
@pytest.mark.parametrize("source", [hugging_face, original_poolformer])
def test_what_is_no_accelerated_block_is_called_as_it_was(
    source: Any, change: Any, mixers: int, backend: str
) -> None:
    model, x = pk.accelerate(make(source), backend), images()
    expected = logits(model, x)
    change(stages_of(model)[LONGEST])
    with mixers_given_statistics() as given:
        torch.testing.assert_close(logits(model, x), expected, rtol=1e-4, atol=1e-4)
    place = sum(DEPTHS[:LONGEST])
    assert given[place : -DEPTHS[-1]] == [False] * mixers


@needs_kernels
@pytest.mark.parametrize("source", FOREIGN)
def test_a_block_that_runs_its_own_forward_hands_on_nothing(source: Any, backend: str) -> None:
    model, x = pk.accelerate(make(source), backend), images()
    expected = logits(model, x)
    stage = stages_of(model)[LONGEST]
    norm = getattr(stage[1], "before_norm", None) or stage[1].norm1
    norm.register_forward_hook(lambda *_: None)
    with (
        pytest.warns(UserWarning, match="runs its own forward"),
        mixers_given_statistics() as given,
    ):
        torch.testing.assert_close(logits(model, x), expected, rtol=1e-4, atol=1e-4)
    place = sum(DEPTHS[:LONGEST])
    assert given[place : place + 2] == [False, False] and len(given) == len(HANDED) - 1


@needs_kernels
@pytest.mark.parametrize("source", SOURCES)
def test_blocks_of_another_number_of_groups_take_no_statistics(source: Any, backend: str) -> None:
    model = make(source)
    stage = stages_of(model)[LONGEST]
    for norm in stage[1].modules():
        if isinstance(norm, nn.GroupNorm):
            norm.num_groups = 2
    with pk.use_backend("torch"):
        expected = logits(model, x := images())
    pk.accelerate(model, backend)
    with mixers_given_statistics() as given:
        torch.testing.assert_close(logits(model, x), expected, rtol=1e-4, atol=1e-4)
    place = sum(DEPTHS[:LONGEST])
    assert given[place : place + 3] == [False, False, False]


@needs_kernels
@pytest.mark.parametrize("source", SOURCES)
def test_appended_and_removed_blocks_are_noticed(source: Any, backend: str) -> None:
    model, x = pk.accelerate(make(source), backend), images()
    stage = stages_of(model)[0]
    assert given_in(lambda: logits(model, x)) == HANDED
    stage.append(copy.deepcopy(stage[0]))
    assert given_in(lambda: logits(model, x)) == [False, True, *HANDED[1:]]
    del stage[0]
    assert given_in(lambda: logits(model, x)) == HANDED


@needs_kernels
@pytest.mark.parametrize("source", [timm, original_poolformer])
def test_parts_of_a_sequential_run_as_before(source: Any, backend: str) -> None:
    stage = stages_of(pk.accelerate(make(source), backend))[LONGEST]
    x = torch.randn(2, 24, 6, 5)
    first, second, third = stage
    expected = second(first(x))
    part = stage[0:2]
    assert type(part) is type(stage) and isinstance(part, nn.Sequential) and len(part) == 2
    assert given_in(lambda: torch.testing.assert_close(part(x), expected)) == [False, True]
    torch.testing.assert_close(pk.restore(copy.deepcopy(part))(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(third(part(input=x)), stage(x))
    torch.testing.assert_close((part + stage[2:])(x), stage(x))
    torch.testing.assert_close(third(expected), stage(x))
    assert torch.equal(stage[3:](x), x)

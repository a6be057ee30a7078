"""Linked stages copied, pickled, replicated, checkpointed, compiled, exported; other encoders."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any
from unittest import mock

import pytest
import torch
from accelerated import (
    HANDED,
    LONGEST,
    SOURCES,
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
from original import PoolFormerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import poolformer_kernels as pk

needs_kernels = pytest.mark.parametrize("backend", KERNELS)


@needs_kernels
@pytest.mark.parametrize("source", SOURCES)
def test_copies_hand_on_and_restored_models_do_not(source: Any, backend: str) -> None:
    model, x = pk.accelerate(pk.accelerate(make(source), "torch"), backend), images()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert given_in(lambda other=other: logits(other, x)) == HANDED
        pk.restore(other)
        if source in SOURCES[:3]:
            assert given_in(lambda other=other: logits(other, x)) == []
    assert given_in(lambda: logits(model, x)) == HANDED


def replica(model: nn.Module) -> Any:
    """What nn.DataParallel makes of a model for each device."""
    modules = list(model.modules())
    replicas = {id(m): m._replicate_for_data_parallel() for m in modules}
    for module in modules:
        for name, child in module._modules.items():
            replicas[id(module)]._modules[name] = replicas.get(id(child))
        for name, parameter in module._parameters.items():
            copied = None if parameter is None else parameter.view_as(parameter)  # no Parameter
            setattr(replicas[id(module)], name, copied)
    return replicas[id(model)]


@needs_kernels
@pytest.mark.parametrize("source", SOURCES)
def test_replicas_of_data_parallel_run_in_threads(source: Any, backend: str) -> None:
    model = pk.accelerate(make(source), backend)
    batches = [images() for _ in range(3)]
    expected = [logits(model, x) for x in batches]
    results: list[Any] = [None] * 3

    def run(place: int, module: nn.Module) -> None:
        with torch.inference_mode():
            results[place] = logits(module, batches[place])

    threads = [threading.Thread(target=run, args=(i, replica(model))) for i in range(3)]
    with mixers_given_statistics() as given:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sum(given) == 3 * sum(HANDED) and len(given) == 3 * len(HANDED)
    for result, there in zip(results, expected, strict=True):
        torch.testing.assert_close(result, there)


@needs_kernels
def test_checkpointed_blocks_stay_alone(backend: str) -> None:
    model, x = pk.accelerate(make(timm, drop_path=0.4), backend).train(), images()
    expected = loss_and_gradients(model, x)
    model.set_grad_checkpointing()
    with mixers_given_statistics() as given:
        torch.manual_seed(7)
        result = model(x)
        result.square().mean().backward()
    assert not any(given) and len(given) >= 2 * len(HANDED)
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    for a, b in zip([result.detach(), *gradients], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * (1 + b.abs().max().item()))


@needs_kernels
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("source", [hugging_face, original_poolformer])
def test_checkpointed_stages_hand_on(source: Any, reentrant: bool, backend: str) -> None:
    model = pk.accelerate(make(source), backend).train()
    run: Any = stages_of(model)[LONGEST]
    x = torch.randn(2, 24, 6, 5)
    if source is hugging_face:
        run, x = model.poolformer.encoder, images()
        run.forward = lambda x, run=run, forward=run.forward: forward(x)[0]
    blocks = [p for p in run.parameters() if p.requires_grad]
    x.requires_grad_()
    expected = torch.autograd.grad(run(x).square().sum(), [x, *blocks])
    with mixers_given_statistics() as given:
        checkpoint(run, x, use_reentrant=reentrant).square().sum().backward()
    assert sum(given) == 2 * (sum(HANDED) if source is hugging_face else 2)
    for p, there in zip([x, *blocks], expected, strict=True):
        torch.testing.assert_close(p.grad, there, rtol=1e-4, atol=1e-4 * there.abs().max().item())
    if source is original_poolformer:
        y = checkpoint_sequential(run, 2, x, use_reentrant=reentrant)
        torch.testing.assert_close(y, run(x))


@needs_kernels
@pytest.mark.parametrize("source", SOURCES)
def test_compiled_and_exported_models_hand_on(source: Any, backend: str) -> None:
    model, x = pk.accelerate(make(source), backend), torch.randn(2, 3, 32, 32)
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        expected = logits(model, x)
        compiled = torch.compile(model, fullgraph=True, backend=keep)
        torch.testing.assert_close(logits(compiled, x), expected)
        exported = torch.export.export(model, (x,))
    torch.testing.assert_close(logits(exported.module(), x), expected)
    for graph in (graphs[0].graph, exported.graph):
        calls = [n for n in graph.nodes if "pool_mixer_fwd" in str(n.target)]
        assert [n.args[1] is not None for n in calls] == HANDED


@needs_kernels
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("return_dict", [False, True])
def test_the_encoder_returns_what_it_did(hidden: bool, return_dict: bool, backend: str) -> None:
    model, x = make(hugging_face).poolformer, images()
    options = {"output_hidden_states": hidden, "return_dict": return_dict}
    expected = model(x, **options)
    result = pk.accelerate(model, backend)(x, **options)
    assert type(result) is type(expected)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def of_each_block(self: Any, x: Tensor, output_hidden_states: Any = 0, return_dict: Any = 0) -> Any:
    results = []
    for embed, blocks in zip(self.patch_embeddings, self.block, strict=True):
        x = embed(x)
        for block in blocks:
            x = block(x)[0]
            results.append(x)
    return results


def with_checkpoints(self: Any, x: Tensor, **_: Any) -> Any:
    return [self.training, of_each_block(self, x)[-1]]


def by_place(self: Any, x: Tensor, **_: Any) -> Any:
    for stage in range(2):
        x = self.patch_embeddings[stage](x)
        for place in range((1, 2)[stage]):
            x = self.block[stage][place](x)[0]
    return [x]


@needs_kernels
@pytest.mark.parametrize("forward", [of_each_block, with_checkpoints, by_place])
def test_an_encoder_with_another_forward_is_left(forward: Any, backend: str) -> None:
    modeling = pytest.importorskip("transformers.models.poolformer.modeling_poolformer")
    with mock.patch.object(modeling.PoolFormerEncoder, "forward", forward):
        encoder, x = make(hugging_face).poolformer.encoder, images()
        expected = encoder(x)
        result = pk.accelerate(encoder, backend)(x)
        assert type(encoder) is modeling.PoolFormerEncoder
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_classes_with_a_forward_of_their_own_are_left(backend: str) -> None:
    modeling = pytest.importorskip("transformers.models.poolformer.modeling_poolformer")

    class Loud(modeling.PoolFormerEncoder):  # type: ignore[misc, name-defined]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    class Twice(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for block in self:
                x = block(block(x))
            return x

    encoder = make(hugging_face).poolformer.encoder
    encoder.__class__ = Loud
    twice = Twice(PoolFormerBlock(24, 0.0), PoolFormerBlock(24, 0.0))
    for module, x in ((encoder, images()), (twice, torch.randn(2, 24, 6, 5))):
        cls, before = type(module), module(x)
        after = pk.accelerate(module, backend)(x)
        assert type(module) is cls
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)

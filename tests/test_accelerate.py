"""accelerate() and restore() on models of transformers, timm, the original, and our own."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from accelerated import (
    BLOCKS,
    SOURCES,
    first_block,
    hugging_face,
    logits,
    loss_and_gradients,
    make,
    make_again,
    own,
)
from cases import BACKENDS
from torch import Tensor, nn

import poolformer_kernels as pk
from benchmarks.saved_bytes import saved_storages


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("source", SOURCES)
def test_same_results_and_gradients_as_before(source: Any, train: bool, backend: str) -> None:
    model = make(source, drop_path=0.4).train(train)
    x = torch.randn(3, 3, 64, 48)
    with pk.use_backend("torch"):
        before = loss_and_gradients(model, x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert pk.accelerate(model, backend) is model
    report = pk.report(model)
    assert len(report.fused) == BLOCKS and not report.left
    assert f"{BLOCKS} of {BLOCKS}" in str(report)
    after = loss_and_gradients(model, x)
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * (1 + b.abs().max().item()))
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)


@pytest.mark.parametrize("source", SOURCES)
def test_the_same_seed_drops_the_same_images(source: Any) -> None:
    x = torch.randn(8, 3, 32, 32)
    model = make(source, drop_path=0.6).train()
    torch.manual_seed(3)
    before = logits(model, x)
    state = torch.get_rng_state()
    pk.accelerate(model)
    torch.manual_seed(3)
    torch.testing.assert_close(logits(model, x), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), state), "another number of random draws than eager"


@pytest.mark.parametrize("source", SOURCES)
def test_save_hidden_reaches_every_mlp(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*args: Any, save_hidden: bool | None = False, **options: Any) -> Any:
        seen.append(save_hidden)
        return pk.mlp(*args, save_hidden=save_hidden, **options)

    monkeypatch.setattr(pk.fused, "mlp", spy)
    model, x = make(source), torch.randn(1, 3, 32, 32)
    for expected in (True, False, None):
        logits(pk.accelerate(model, save_hidden=expected), x)
        assert seen == [expected] * BLOCKS
        seen.clear()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("source", SOURCES)
def test_residual_in_the_dtype_of_autocast(source: Any, backend: str) -> None:
    model, x = make(source).train(), torch.randn(4, 3, 64, 64)
    with pk.use_backend("torch"):  # rules our own model here
        exact, narrow = (
            loss_and_gradients(copy.deepcopy(model).to(dtype), x.to(dtype))
            for dtype in (torch.float64, torch.bfloat16)
        )
    pk.accelerate(model, backend, residual_in_fp32=False)
    block, seen = first_block(model), []
    handle = block.register_forward_hook(lambda *given: seen.append(given[2]))
    saved: list[int] = []
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_gradients(model, x)
        handle.remove()
        for kept in (True, False):
            pk.accelerate(model, backend, residual_in_fp32=kept)
            with saved_storages(model) as storages:
                logits(model, x.repeat(16, 1, 1, 1))
            saved.append(sum(storage.nbytes() for storage in storages.values()))
    result = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]
    assert result.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in ours[1:])
    assert backend == "torch" or saved[1] < 0.9 * saved[0]
    distances = [
        sum((a.double() - b).norm() / b.norm() for a, b in zip(result, exact, strict=True))
        for result in (ours, narrow)
    ]
    assert distances[0] <= 1.5 * distances[1]


@pytest.mark.parametrize("source", SOURCES[:3])
def test_restore_gives_the_model_back(source: Any) -> None:
    model = make(source)
    classes, shown = [type(m) for m in model.modules()], repr(model)
    attributes = [set(m.__dict__) for m in model.modules()]
    x = torch.randn(1, 3, 32, 32)
    before = logits(model, x)
    pk.accelerate(model, "torch")
    changed = [type(m) for m in model.modules()]
    assert changed != classes and repr(model) == shown
    assert all(issubclass(a, b) for a, b in zip(changed, classes, strict=True))
    assert pk.restore(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert torch.equal(logits(model, x), before)
    assert len(pk.report(model).left) == BLOCKS


@pytest.mark.parametrize("source", SOURCES)
def test_copies_and_pickles_stay_accelerated(source: Any) -> None:
    model = pk.accelerate(make(source), "torch")
    x = torch.randn(1, 3, 32, 32)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    for other in copies:
        assert len(pk.report(other).fused) == BLOCKS
        assert torch.equal(logits(other, x), logits(model, x))
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert next(model.parameters()).abs().max() > 0
        pk.restore(other)
    assert len(pk.report(model).fused) == BLOCKS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("source", SOURCES)
def test_half_and_channels_last(source: Any, backend: str) -> None:
    x = torch.randn(2, 3, 40, 32)
    exact = logits(make_again(source).double(), x.double())
    for dtype in (torch.bfloat16, torch.float16):
        eager = logits(make_again(source).to(dtype), x.to(dtype))
        model = pk.accelerate(make_again(source), backend)
        model.to(dtype).to(memory_format=torch.channels_last)
        ours = logits(model, x.to(dtype).to(memory_format=torch.channels_last))
        assert ours.dtype == dtype
        error = (ours.double() - exact).norm()
        assert error <= 2 * (eager.double() - exact).norm() + torch.finfo(dtype).eps * exact.norm()


def replace_activation(block: nn.Module) -> None:
    holder = getattr(block, "output", None) or block.mlp
    setattr(holder, "act_fn" if hasattr(holder, "act_fn") else "act", nn.Hardswish())


class Wrapped(nn.Conv2d):
    """What LoRA and quantisers put in a convolution's place."""


def wrap_convolution(block: nn.Module) -> None:
    holder = getattr(block, "output", None) or block.mlp
    name = "conv1" if hasattr(holder, "conv1") else "fc1"
    conv = getattr(holder, name)
    wrapped = Wrapped(conv.in_channels, conv.out_channels, 1)
    wrapped.load_state_dict(conv.state_dict())
    setattr(holder, name, wrapped)


def hook_norm(block: nn.Module) -> None:
    norm = block.before_norm if hasattr(block, "before_norm") else block.norm1
    norm.register_forward_hook(lambda module, args, result: 2 * result)


def replace_forward(block: nn.Module) -> None:
    block.forward = type(block).forward.__get__(block)


def widen_pool(block: nn.Module) -> None:
    holder = block.pooling if hasattr(block, "pooling") else block.token_mixer
    holder.pool = nn.AvgPool2d(2, 1, 1, count_include_pad=False)


def count_padding(block: nn.Module) -> None:
    holder = block.pooling if hasattr(block, "pooling") else block.token_mixer
    holder.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=True)


def prune(block: nn.Module) -> None:
    holder = getattr(block, "output", None) or block.mlp
    conv = holder.conv2 if hasattr(holder, "conv2") else holder.fc2
    torch.nn.utils.prune.l1_unstructured(conv, "weight", 0.5)


CHANGES = [
    (replace_activation, "no kernel for its activation Hardswish"),
    (wrap_convolution, "Wrapped, not a torch.nn.Conv2d"),
    (hook_norm, "forward hook on its"),
    (replace_forward, "replaced on the instance"),
    (widen_pool, "pool size is 2"),
    (count_padding, "padding 1 that is not counted"),
    (prune, "forward hook on its"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES)
@pytest.mark.parametrize("source", SOURCES[:3])
def test_blocks_that_the_ops_would_get_wrong_are_left(
    source: Any, change: Any, reason: str
) -> None:
    model = make(source)
    change(first_block(model))
    with pytest.warns(UserWarning, match=reason):
        pk.accelerate(model)
    report = pk.report(model)
    assert len(report.left) == 1 and len(report.fused) == BLOCKS - 1
    assert reason in str(report)


@pytest.mark.parametrize("change", [replace_activation, wrap_convolution, hook_norm, prune])
@pytest.mark.parametrize("source", SOURCES[:3])
def test_a_change_after_accelerate_is_seen(source: Any, change: Any) -> None:
    x = torch.randn(1, 3, 32, 32)
    expected, model = make_again(source), pk.accelerate(make_again(source))
    torch.manual_seed(5)
    change(first_block(expected))
    torch.manual_seed(5)
    change(first_block(model))
    with pytest.warns(UserWarning, match="runs its own forward"):
        ours = logits(model, x)
    torch.testing.assert_close(ours, logits(expected, x))
    assert len(pk.report(model).left) == 1


@pytest.mark.parametrize("source", SOURCES[:3])
def test_hooks_on_a_block_itself_still_run(source: Any) -> None:
    model = pk.accelerate(make(source))
    called = []
    first_block(model).register_forward_hook(lambda *_: called.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, torch.randn(1, 3, 32, 32))
    assert called


def test_an_overridden_forward_is_left() -> None:
    transformers = pytest.importorskip("transformers")
    layer = transformers.models.poolformer.modeling_poolformer.PoolFormerLayer

    class Loud(layer):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor) -> Any:
            return (2 * super().forward(hidden_states)[0],)

    model = make(hugging_face)
    model.poolformer.encoder.block[0][0].__class__ = Loud
    with pytest.warns(UserWarning, match="Loud overrides the forward of PoolFormerLayer"):
        pk.accelerate(model)


def test_timm_models_that_are_no_poolformer_are_refused() -> None:
    create_model = pytest.importorskip("timm").create_model
    with pytest.raises(ValueError, match="found no PoolFormer block in this MetaFormer"):
        pk.accelerate(create_model("convformer_s18"))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="found no PoolFormer block in this Linear"):
        pk.accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model is a str"):
        pk.accelerate("poolformer_s12")
    with pytest.raises(ValueError, match="backend is 'gpu'"):
        pk.accelerate(own(), "gpu")
    model = own()
    with pytest.raises(pk.BackendUnavailable, match="backend 'triton' cannot run"):
        pk.accelerate(model, "triton")
    assert all(m.backend is None for m in model.modules() if isinstance(m, pk.PoolFormerBlock))


def test_auto_lets_use_backend_rule_and_a_name_does_not() -> None:
    model, x = make(own), torch.randn(1, 3, 32, 32)
    with pk.use_backend("triton"), pytest.raises(pk.BackendUnavailable):
        logits(model, x)
    with pk.use_backend("triton"):
        logits(pk.accelerate(model, "torch"), x)
    with pk.use_backend("triton"), pytest.raises(pk.BackendUnavailable):
        logits(pk.restore(model), x)

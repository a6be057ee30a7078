"""What PyTorch does around a model: torch.func, checkpoints, hooks, threads, workers, scalers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import KERNELS
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import poolformer_kernels as pk

SIZES: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1], "num_labels": 5}
LABELS = torch.tensor([1, 2])
Build = Callable[[], nn.Module]


def own() -> nn.Module:
    config = pk.PoolFormerConfig(**SIZES, layer_scale_init_value=0.5)
    return pk.PoolFormerForImageClassification(config)


def foreign() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.PoolFormerConfig(**SIZES, layer_scale_init_value=0.5)
    return transformers.PoolFormerForImageClassification(config)


@pytest.fixture(params=[own, foreign], ids=["own", "transformers"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return request.param()


@pytest.fixture(params=KERNELS)
def fused(request: pytest.FixtureRequest, model: nn.Module) -> nn.Module:
    return pk.accelerate(model, request.param)


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, pixels: Tensor, labels: Tensor = LABELS) -> Tensor:
    return nn.functional.cross_entropy(model(pixels).logits, labels)


def gradients(model: nn.Module, pixels: Tensor, labels: Tensor = LABELS) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, pixels, labels).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def functional_loss(model: nn.Module, given: dict[str, Tensor], pixels: Tensor, labels: Tensor):
    return nn.functional.cross_entropy(functional_call(model, given, (pixels,)).logits, labels)


def test_func_grad_is_backward(fused: nn.Module, pixels: Tensor) -> None:
    ours = grad(lambda given: functional_loss(fused, given, pixels, LABELS))(parameters(fused))
    torch.testing.assert_close(ours, gradients(fused, pixels), rtol=1e-5, atol=1e-6)


def test_vmap_gives_gradients_of_every_image(fused: nn.Module, pixels: Tensor) -> None:
    def of_one(given: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return functional_loss(fused, given, image[None], label[None])

    ours = vmap(grad(of_one), (None, 0, 0))(parameters(fused), pixels, LABELS)
    for index in range(2):
        alone = gradients(fused, pixels[index : index + 1], LABELS[index : index + 1])
        torch.testing.assert_close({n: g[index] for n, g in ours.items()}, alone)


def test_vmap_runs_several_models(fused: nn.Module, pixels: Tensor) -> None:
    several = {name: torch.stack([p, 0.5 * p]) for name, p in parameters(fused).items()}
    ours = vmap(lambda given: functional_call(fused, given, (pixels,)).logits)(several)
    for index in range(2):
        given = {name: p[index] for name, p in several.items()}
        torch.testing.assert_close(ours[index], functional_call(fused, given, (pixels,)).logits)


def test_forward_mode_needs_the_torch_backend(fused: nn.Module, pixels: Tensor) -> None:
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        jvp(lambda given: fused(given).logits, (pixels,), (pixels,))
    with pk.use_backend("torch"):
        pk.accelerate(fused)
        assert jvp(lambda given: fused(given).logits, (pixels,), (pixels,))[1].isfinite().all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(fused: nn.Module, pixels: Tensor, reentrant: bool) -> None:
    expected = gradients(fused, pixels)
    fused.zero_grad()
    pixels.requires_grad_()
    checkpoint(lambda given: loss_of(fused, given), pixels, use_reentrant=reentrant).backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in fused.named_parameters())


def test_a_graph_that_is_kept_gives_the_same_gradients_again(
    fused: nn.Module, pixels: Tensor
) -> None:
    loss = loss_of(fused, pixels)
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in fused.parameters()]
    fused.zero_grad()
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(fused.parameters(), first, strict=True))


def test_frozen_parameters_get_no_gradient(fused: nn.Module, pixels: Tensor) -> None:
    expected = gradients(fused, pixels)
    fused.zero_grad(set_to_none=True)
    for name, p in fused.named_parameters():
        p.requires_grad_("norm" not in name and "layer_scale" not in name)
    loss_of(fused, pixels).backward()
    for name, p in fused.named_parameters():
        assert (p.grad is not None) == p.requires_grad
        assert p.grad is None or torch.equal(p.grad, expected[name])


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_anomaly_mode_and_deterministic_algorithms(
    fused: nn.Module, pixels: Tensor, deterministic: None
) -> None:
    first = gradients(fused, pixels)
    with torch.autograd.set_detect_anomaly(True):
        second = gradients(fused, pixels)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_anomaly_mode_names_the_op_of_a_nan(fused: nn.Module, pixels: Tensor) -> None:
    with torch.no_grad():
        next(p for n, p in fused.named_parameters() if n.endswith("conv1.weight"))[0] = torch.inf
    with torch.autograd.set_detect_anomaly(True), pytest.raises(RuntimeError, match="nan values"):
        loss_of(fused, pixels).backward()


def test_hooks_of_blocks_are_called_with_their_gradients(fused: nn.Module, pixels: Tensor) -> None:
    blocks = [
        m for m in fused.modules() if type(m).__name__ in ("PoolFormerLayer", "PoolFormerBlock")
    ]
    assert len(blocks) == sum(SIZES["depths"])
    seen: list[tuple[str, torch.Size]] = []
    for block in blocks:
        block.register_forward_hook(
            lambda module, given, result: seen.append(("forward", given[0].shape))
        )
        block.register_full_backward_hook(
            lambda module, dx, dy: seen.append(("backward", dx[0].shape))
        )
    loss_of(fused, pixels).backward()
    shapes = [shape for way, shape in seen if way == "forward"]
    assert len(shapes) == len(blocks)
    assert [shape for way, shape in seen if way == "backward"] == shapes[::-1]


def test_several_threads_of_inference(fused: nn.Module, pixels: Tensor) -> None:
    fused.eval()
    with torch.inference_mode():
        expected = fused(pixels).logits
    results: list[Tensor] = []

    def infer() -> None:
        with torch.inference_mode():
            results.extend(fused(pixels).logits for _ in range(4))

    threads = [threading.Thread(target=infer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 16 and all(torch.equal(r, expected) for r in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_grad_scaler(fused: nn.Module, pixels: Tensor, dtype: torch.dtype) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(fused.parameters(), 1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = loss_of(fused, pixels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert scaler.get_scale() == 2.0**12


def test_grad_scaler_steps_back_from_an_overflow(fused: nn.Module, pixels: Tensor) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = torch.optim.SGD(fused.parameters(), 1e-2)
    before = [p.detach().clone() for p in fused.parameters()]
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(fused, pixels)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(p, old) for p, old in zip(fused.parameters(), before, strict=True))


WORKERS = """
import sys

import torch
from torch.utils.data import DataLoader, Dataset

import poolformer_kernels as pk


class Embedded(Dataset):
    def __init__(self, model, pixels):
        self.model, self.pixels = model, pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        torch.set_num_threads(1)
        with torch.no_grad():
            return self.model(self.pixels[index : index + 1]).logits[0].clone()


if __name__ == "__main__":
    config = pk.PoolFormerConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=5)
    model = pk.accelerate(pk.PoolFormerForImageClassification(config).eval(), sys.argv[1])
    data = Embedded(model, torch.randn(2, 3, 64, 64))
    expected = torch.stack([data[0], data[1]])
    (result,) = DataLoader(
        data, batch_size=2, num_workers=2, multiprocessing_context=sys.argv[2], timeout=120
    )
    torch.testing.assert_close(result, expected)
    print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("backend", KERNELS)
def test_loader_workers(
    backend: str, method: str, run_python: Callable[..., Any], tmp_path: Path
) -> None:
    """In a process of its own: a fork of one with many libraries' threads may hang or abort."""
    program = tmp_path / "workers.py"
    program.write_text(WORKERS)
    done = run_python(str(program), backend, method)
    assert done.stdout.strip() == "equal", done.stderr

"""Accelerated models inside timm's own parts: its factory, features, train and validate loops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerated import BLOCKS, make_again, timm, timm_v2
from cases import BACKENDS
from torch import nn

import poolformer_kernels as pk

create_model = pytest.importorskip("timm").create_model
from timm.data import Mixup  # noqa: E402
from timm.loss import SoftTargetCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402
from timm.utils import AverageMeter, ModelEmaV3, accuracy, dispatch_clip_grad  # noqa: E402

STEPS, CLASSES = 4, 5


def train_and_validate(model: nn.Module) -> dict[str, Any]:
    """Mixup and cutmix, drop path, clipping, a schedule and an EMA, as in timm's train.py."""
    torch.manual_seed(3)
    np.random.seed(3)
    images, labels = torch.randn(STEPS, 4, 3, 32, 32), torch.randint(CLASSES, (STEPS, 4))
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=CLASSES)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=STEPS, warmup_epochs=1)
    ema, losses, history = ModelEmaV3(model, decay=0.5), AverageMeter(), []
    model.train()
    for step in range(STEPS):
        pixels, targets = mixup(images[step], labels[step])
        loss = SoftTargetCrossEntropy()(model(pixels), targets)
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model, step=step)
        scheduler.step(step + 1)
        losses.update(loss.item(), len(pixels))
        history.append(loss.item())
    with torch.inference_mode():
        results = [net.eval()(images[0]) for net in (model, ema.module)]
    top = accuracy(results[0], labels[0], topk=(1, 2))
    return {"losses": [*history, losses.avg], "logits": results, "top": top, "ema": ema.module}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("source", [timm, timm_v2])
def test_training_has_the_losses_of_eager(
    source: Callable[[float], nn.Module], backend: str
) -> None:
    eager = train_and_validate(make_again(lambda _: source(0.3)))
    ours = train_and_validate(pk.accelerate(make_again(lambda _: source(0.3)), backend))
    torch.testing.assert_close(ours["losses"], eager["losses"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["logits"], eager["logits"], rtol=1e-2, atol=1e-3)
    assert ours["top"] == eager["top"] and len(set(ours["losses"])) > STEPS
    assert len(pk.report(ours["ema"]).fused) == BLOCKS, "the EMA's copy runs fused too"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrapper", ["list", "getter", "hook"])
@pytest.mark.parametrize("name", ["poolformer_s12", "poolformerv2_s12"])
def test_features_only(name: str, wrapper: str, backend: str) -> None:
    model = create_model(name, features_only=True, feature_cls=wrapper, out_indices=(1, 3)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "scale" in key and parameter.dim() == 1:
                parameter.uniform_(0.5, 1.0)
    x = torch.randn(1, 3, 64, 32)
    with torch.inference_mode():
        expected = model(x)
        result = pk.accelerate(model, backend)(x)
    assert len(pk.report(model).fused) == 12 and model.feature_info.channels() == [128, 512]
    assert [t.shape[1:] for t in result] == [(128, 8, 4), (512, 2, 1)]
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_a_model_traced_by_fx_has_no_blocks_left() -> None:
    traced = create_model("poolformer_s12", features_only=True, feature_cls="fx")
    with pytest.raises(ValueError, match="found no PoolFormer block in this FeatureGraphNet"):
        pk.accelerate(traced)


def test_the_factory_and_a_new_head() -> None:
    model = pk.accelerate(create_model("poolformer_s12", num_classes=7, drop_path_rate=0.1)).eval()
    stock = pk.restore(copy.deepcopy(model))
    model.reset_classifier(3)
    assert len(pk.report(model).fused) == 12
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert model(x).shape == (1, 3)
        expected = stock.forward_features(x)
        torch.testing.assert_close(model.forward_features(x), expected, rtol=1e-4, atol=1e-4)

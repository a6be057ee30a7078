"""Small PoolFormers of transformers, timm, the original and our own, and how their blocks run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from original import PoolFormer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import poolformer_kernels as pk
from poolformer_kernels import stages

WIDTHS, DEPTHS = [8, 16, 24, 32], [1, 2, 3, 2]
BLOCKS = sum(DEPTHS)
HANDED = [place > 0 for depth in DEPTHS for place in range(depth)]
LONGEST = DEPTHS.index(3)


def hugging_face(drop_path: float = 0.0, **config: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = {"hidden_sizes": WIDTHS, "depths": DEPTHS, "num_labels": 5, **config}
    return transformers.PoolFormerForImageClassification(
        transformers.PoolFormerConfig(drop_path_rate=drop_path, **config)
    )


def timm(drop_path: float = 0.0) -> nn.Module:
    metaformer = pytest.importorskip("timm.models.metaformer")
    return metaformer.MetaFormer(
        depths=DEPTHS,
        dims=WIDTHS,
        token_mixers=metaformer.Pooling,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layers=metaformer.GroupNorm1,
        layer_scale_init_values=1e-5,
        res_scale_init_values=None,
        use_mlp_head=False,
        num_classes=5,
        drop_path_rate=drop_path,
        downsample_norm=None,
    )


def timm_v2(drop_path: float = 0.0) -> nn.Module:
    metaformer = pytest.importorskip("timm.models.metaformer")
    return metaformer.MetaFormer(
        depths=DEPTHS,
        dims=WIDTHS,
        norm_layers=metaformer.GroupNorm1NoBias,
        use_mlp_head=False,
        num_classes=5,
        drop_path_rate=drop_path,
    )


def original_poolformer(drop_path: float = 0.0) -> nn.Module:
    return PoolFormer(DEPTHS, WIDTHS, 5, drop_path)


def own(drop_path: float = 0.0) -> nn.Module:
    config = pk.PoolFormerConfig(
        hidden_sizes=WIDTHS, depths=DEPTHS, num_labels=5, drop_path_rate=drop_path
    )
    return pk.PoolFormerForImageClassification(config)


SOURCES = [hugging_face, timm, original_poolformer, own]


def make(source: Any, drop_path: float = 0.0) -> nn.Module:
    """A model whose scales hide no error of a block."""
    model = source(drop_path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                parameter.uniform_(0.5, 1.0)
            elif "norm" in name or parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def logits(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits


def loss_and_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(7)
    result = logits(model, x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [result.detach(), *torch.autograd.grad(result.square().mean(), parameters)]


def make_again(source: Any) -> nn.Module:
    torch.manual_seed(11)
    return make(source)


def first_block(model: nn.Module) -> nn.Module:
    name = (pk.report(model).fused or list(pk.report(model).left))[0]
    return model.get_submodule(name)


@contextmanager
def mixers_given_statistics() -> Iterator[list[bool]]:
    """For each pass of a mixer, whether it got statistics, and so read x once less."""
    module = importlib.import_module("poolformer_kernels.ops.pool_mixer")
    given: list[bool] = []
    forward, run_blocks = module._forward_op, stages.run_blocks

    def count(x: Tensor, stats: Tensor | None, *args: Any) -> Any:
        given.append(stats is not None)
        return forward(x, stats, *args)

    def count_blocks(x: Tensor, calls: Any) -> Tensor:
        given.extend(place > 0 for place in range(len(calls)))
        return run_blocks(x, calls)

    with (
        mock.patch.object(module, "_forward_op", count),
        mock.patch.object(stages, "run_blocks", count_blocks),
    ):
        yield given


@contextmanager
def block_by_block() -> Iterator[None]:
    """Within this context nothing is handed on: a hook on every module might look at it."""
    handle = register_module_forward_pre_hook(lambda module, args: None)
    try:
        yield
    finally:
        handle.remove()


def stages_of(model: Any) -> list[Any]:
    """What holds the blocks of each stage."""
    if hasattr(model, "poolformer"):
        return list(model.poolformer.encoder.block)
    return [s.blocks for s in model.stages] if hasattr(model, "stages") else [*model.network[::2]]


def given_in(run: Callable[[], Any]) -> list[bool]:
    with mixers_given_statistics() as given:
        run()
    return given


def images() -> Tensor:
    return torch.randn(3, 3, 64, 48)

"""The strided convolutions that begin stages: as a module, and in models of other libraries.

A convolution of another library's embedding is given a subclass of its own class, as its blocks are
(patch.py): hooks on it still run, and what LoRA or a quantiser puts in its place is left alone.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .ops.patch_embed import patch_embed
from .subclasses import original_class, restored_class, with_forward

_BACKEND = "_poolformer_embedding_backend"
_EMBEDDINGS = {  # class name: what its module path starts with
    "PoolFormerEmbeddings": "transformers.",
    "Stem": "timm.models.metaformer",
    "Downsampling": "timm.models.metaformer",
    "PatchEmbed": "",
}


class PatchEmbed(nn.Conv2d):
    """torch.nn.Conv2d as the op `patch_embed`. x: (B, C_in, H, W) → (B, C, H', W')."""

    backend: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        return _run(self, x, self.backend)


@torch.compiler.assume_constant_result
def is_plain(conv: nn.Conv2d) -> bool:
    """Whether `patch_embed` computes what `conv` does; a compiled model keeps the answer."""
    return (
        conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and type(conv.weight).__module__.split(".")[0] == "torch"
    )


def embedding_convolutions(model: nn.Module) -> list[nn.Conv2d]:
    """The convolutions of the embeddings in `model` that accelerate may change, or has changed."""
    return [
        child
        for module in model.modules()
        if any(
            base.__name__ in _EMBEDDINGS and base.__module__.startswith(_EMBEDDINGS[base.__name__])
            for base in type(module).__mro__
        )
        for child in module.children()
        if isinstance(child, nn.Conv2d) and original_class(type(child)) is nn.Conv2d
    ]


def accelerate_embeddings(model: nn.Module, backend: str | None) -> None:
    """Let the embeddings of other libraries in `model` run `patch_embed`."""
    for conv in embedding_convolutions(model):
        if type(conv) is nn.Conv2d:  # not accelerated yet
            conv.__class__ = _accelerated(nn.Conv2d)
        setattr(conv, _BACKEND, backend)


def restore_embeddings(model: nn.Module) -> None:
    """Undo `accelerate_embeddings`."""
    for conv in embedding_convolutions(model):
        if hasattr(conv, _BACKEND):
            cls: Any = type(conv)
            conv.__class__ = restored_class(cls)
            delattr(conv, _BACKEND)


def _run(conv: nn.Conv2d, x: Tensor, backend: str | None) -> Tensor:
    if not is_plain(conv):
        return nn.Conv2d.forward(conv, x)
    geometry: Any = {"stride": conv.stride, "padding": conv.padding}
    return patch_embed(x, conv.weight, conv.bias, **geometry, backend=backend)


@functools.cache
def _accelerated(cls: type[nn.Conv2d]) -> Any:
    def forward(self: nn.Conv2d, input: Tensor) -> Tensor:
        return _run(self, input, getattr(self, _BACKEND))

    return with_forward(cls, forward, _rebuild)


def _rebuild(cls: Any) -> nn.Module:
    return cls.__new__(_accelerated(cls))

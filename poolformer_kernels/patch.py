"""accelerate(model): run the PoolFormer blocks of a model that you already have on the fused ops.

A block is changed in place by giving it a subclass of its own class whose forward runs the fused
ops on the block's own parameters. What calls the blocks of a stage one after another is given such
a subclass too, so that they hand on statistics (stages.py), and so are the convolutions that begin
stages (embeddings.py). Nothing is added to the module tree, so names, parameters and state_dict
stay; isinstance, deepcopy, pickle and torch.save work; restore(model) puts the classes back.

Before each forward the block is looked at again. What the fused ops would skip (a hook on an inner
module, a convolution that LoRA or a quantiser has replaced) sends that block back to its own
forward.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import backends
from .blocks import FAMILIES, activation_name, call_in_chain, family_of, run_fused
from .embeddings import PatchEmbed, accelerate_embeddings, restore_embeddings
from .fitness import unchanged, why_not
from .modules import GroupNorm, Mlp, PoolFormerBlock, PoolMixer
from .ops.blocks import BlockCall
from .stages import link, unlink
from .subclasses import original_class, restored_class, with_forward

_BACKEND = "_poolformer_backend"
_SAVE_HIDDEN = "_poolformer_save_hidden"
_RESIDUAL = "_poolformer_residual_in_fp32"
_TYPES = "_poolformer_types"  # of the inner modules when accelerate found the block fit
_NATIVE = (PoolFormerBlock, PoolMixer, Mlp, GroupNorm, PatchEmbed)


@dataclass(frozen=True)
class Report:
    """Which blocks of a model run fused, and why the others do not."""

    fused: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{len(self.fused)} of {len(self.fused) + len(self.left)} PoolFormer blocks run fused"
        ]
        lines += [f"  {name} is left as it was: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def accelerate(
    model: nn.Module,
    backend: str = "auto",
    *,
    save_hidden: bool | None = None,
    residual_in_fp32: bool = True,
) -> nn.Module:
    """Let the PoolFormer blocks of `model` run on the fused ops, in place.

    Takes models of Hugging Face, timm (poolformer_*) and the original repository, and our own.
    Warns of blocks that it leaves as they are, with the reason; `report(model)` says it again at
    any time. Calling it again changes the options.

    Args:
        model: any module that holds PoolFormer blocks, or is one.
        backend: "torch", "cpu", "triton" or "cuda"; "auto" takes the best one for each call, and
            lets `use_backend` rule.
        save_hidden: in training, keep the MLPs' hiddens for the backward instead of computing them
            again: three times the memory, one product less. None leaves that to the backend (see
            `mlp`).
        residual_in_fp32: under torch.autocast, what blocks hand on and their norms stay in float32,
            as in eager where layer scales are float32. False: in autocast's dtype, which halves
            the bytes that blocks read, write and save, and rounds the sum once a half block.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: there is no PoolFormer block in it, or no such backend.
        BackendUnavailable: `backend` cannot run this model where it is now.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate: model is a {type(model).__name__}; it has to be a torch.nn.Module."
        )
    backends.check_name(backend)
    name = None if backend == "auto" else backend
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, _NATIVE) or family_of(module) is not None
    ]
    if not found:
        raise ValueError(
            f"accelerate: found no PoolFormer block in this {type(model).__name__}. It takes "
            "PoolFormer of transformers, timm (poolformer_*), the original repository, and ours."
        )
    for _, module in found:
        _check_backend(module, backend)
    for path, module in found:
        if isinstance(module, _NATIVE):
            module.backend = name
            if isinstance(module, (PoolFormerBlock, Mlp)):
                module.save_hidden = save_hidden
            if isinstance(module, PoolFormerBlock):
                module.residual_in_fp32 = residual_in_fp32
        elif (reason := _why_not_now(module)) is not None:
            _restore_block(module)
            where = path or "model"
            warnings.warn(f"accelerate left {where} as it was: {reason}", stacklevel=2)
        else:
            _accelerate_block(module, name, save_hidden, residual_in_fp32)
    accelerate_embeddings(model, name)
    for module in model.modules():
        link(module)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate` in place: foreign blocks run their own forward, ours the best backend."""
    for module in model.modules():
        if isinstance(module, _NATIVE):
            module.backend = None
            if isinstance(module, (PoolFormerBlock, Mlp)):
                module.save_hidden = None
            if isinstance(module, PoolFormerBlock):
                module.residual_in_fp32 = True
        else:
            _restore_block(module)
            unlink(module)
    restore_embeddings(model)
    return model


def report(model: nn.Module) -> Report:
    """Which PoolFormer blocks of `model` run fused now, and why the others do not."""
    result = Report()
    for path, module in model.named_modules():
        path = path or "model"
        if isinstance(module, PoolFormerBlock):
            result.fused.append(path)
        elif family_of(module) is not None:
            reason = _why_not_now(module)
            if reason is None and not hasattr(module, _BACKEND):
                reason = "accelerate has not been called on it"
            if reason is None:
                result.fused.append(path)
            else:
                result.left[path] = reason
    return result


def _check_backend(module: nn.Module, backend: str) -> None:
    """Raise now, not at the first forward, if `backend` cannot run where the parameters are."""
    parameter = next(module.parameters(), None)
    if backend == "auto" or parameter is None or parameter.device.type == "meta":
        return
    device, dtype = parameter.device.type, parameter.dtype
    if isinstance(module, GroupNorm):
        backends.resolve("group_norm", device, dtype, backend=backend)
        return
    backends.resolve("pool_mixer", device, dtype, backend=backend)
    family = None if isinstance(module, _NATIVE) else family_of(module)
    act = None if family is None else activation_name(family.parts(module).act)
    backends.resolve("mlp", device, dtype, act, backend=backend)


def _accelerate_block(
    module: nn.Module, backend: str | None, save_hidden: bool | None, residual_in_fp32: bool
) -> None:
    family = family_of(module)
    assert family is not None
    cls: Any = type(module)
    if original_class(cls) is cls:  # not accelerated yet, nor a base of it (FSDP2 derives a class)
        module.__class__ = _accelerated(cls)
    setattr(module, _BACKEND, backend)
    setattr(module, _SAVE_HIDDEN, save_hidden)
    setattr(module, _RESIDUAL, residual_in_fp32)
    setattr(module, _TYPES, tuple(map(type, family.parts(module).inner())))


def _restore_block(module: nn.Module) -> None:
    if hasattr(module, _BACKEND):
        cls: Any = type(module)
        module.__class__ = restored_class(cls)
        for name in (_BACKEND, _SAVE_HIDDEN, _RESIDUAL, _TYPES):
            delattr(module, name)


@torch.compiler.assume_constant_result
def _why_not_now(block: nn.Module) -> str | None:
    """Why `block` has to run its own forward; a compiled model keeps the answer."""
    family = family_of(block)
    if family is None:
        return None
    parts = family.parts(block)
    if "forward" not in block.__dict__ and unchanged(parts, block.__dict__.get(_TYPES, ())):
        return None
    return why_not(family, block, parts)


@functools.cache
def _accelerated(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `cls` under its own name whose forward runs the fused ops."""
    family = next(family for family in FAMILIES if family.base(cls) is not None)

    def forward(
        self: nn.Module,
        hidden_states: torch.Tensor,
        stats: torch.Tensor | None = None,
        return_stats: bool = False,
    ) -> Any:
        """With return_stats: (result, its statistics, or None where they are not known)."""
        if (reason := _why_not_now(self)) is not None:
            warnings.warn(f"a block runs its own forward: {reason}", stacklevel=2)
            result = cls.forward(self, hidden_states)
            return (result[0] if family.returns_tuple else result, None) if return_stats else result
        return run_fused(
            family,
            self,
            family.parts(self),
            hidden_states,
            save_hidden=getattr(self, _SAVE_HIDDEN),
            residual_in_fp32=getattr(self, _RESIDUAL),
            backend=getattr(self, _BACKEND),
            stats=stats,
            return_stats=return_stats,
        )

    def call(self: nn.Module) -> BlockCall | None:
        parts = family.parts(self)
        if "forward" in self.__dict__ or not unchanged(parts, self.__dict__.get(_TYPES, ())):
            return None
        return call_in_chain(family, self, parts, getattr(self, _BACKEND))

    return with_forward(cls, forward, _rebuild, call_in_chain=call)


def _rebuild(cls: Any) -> nn.Module:
    """An empty accelerated block, for pickle and deepcopy to fill."""
    return cls.__new__(_accelerated(cls))

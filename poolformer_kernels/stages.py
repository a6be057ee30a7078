"""A stage hands on statistics: each block's MLP returns those that the next block's mixer needs.

`links(container)` says what to call one after another: a block or module by itself, or a chain of
blocks through which statistics are handed. A chain has the result and the gradients of its blocks
called one by one, and one pass over the activation less for each block but its first. Blocks with
hooks of their own, and modules that are no blocks, are called as they always were.

accelerate() changes the class of what runs the blocks of other libraries: an nn.Sequential (timm,
the original repository), or transformers' encoder. Nothing is stored in them: what is linked is
found anew before each forward, so that blocks may be hooked, replaced and appended.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from .modules import PoolFormerBlock
from .ops.blocks import BlockCall, is_cpu_call, takes
from .ops.blocks import blocks as run_blocks
from .subclasses import is_called_directly, is_changed, original_class, with_forward

Container = nn.Sequential | nn.ModuleList


def links(container: Container) -> list[Callable[[Any], Any]]:
    """The modules of `container` in order, blocks that can hand on statistics as one callable."""
    modules, start = list(container), 0
    result: list[Callable[[Any], Any]] = []
    for length in _chain_lengths(container):
        chain = modules[start : start + length]
        result.append(chain[0] if length == 1 else functools.partial(_run_chain, chain))
        start += length
    return result


def _run_chain(blocks: list[nn.Module], x: Tensor) -> Any:
    """What the last block returns when it is called by itself."""
    if not is_compiling() and (calls := _calls_without_gradients(blocks, x)):
        y = run_blocks(x, calls)
        return (y,) if calls[-1].returns_tuple else y
    stats = None
    for block in blocks[:-1]:
        x, stats = block(x, stats, True)  # a keyword would cost two microseconds
    return blocks[-1](x, stats)


def _calls_without_gradients(blocks: list[Any], x: Tensor) -> list[BlockCall]:
    """The blocks as one call of an op, if there is no gradient and they all run on the CPU."""
    calls: list[BlockCall] = []
    if takes(x):
        for block in blocks:
            call = block.call_in_chain()
            if call is None or (calls and call[1:] != calls[0][1:]):
                return []
            calls.append(call)
    return calls if calls and is_cpu_call(x, calls[0]) else []


@torch.compiler.assume_constant_result
def _chain_lengths(container: Container) -> tuple[int, ...]:
    """How many modules each of `links` calls; a compiled model keeps the answer."""
    lengths: list[int] = []
    previous = 0
    for module in container._modules.values():
        groups = _groups_of_statistics(module)
        if groups and groups == previous:
            lengths[-1] += 1
        else:
            lengths.append(1)
        previous = groups
    return (1,) * len(container) if _has_any_global_hook() else tuple(lengths)


def _groups_of_statistics(module: Any) -> int:
    """num_groups of the statistics that a block takes and returns; 0 if it may be given none."""
    if type(module) is not PoolFormerBlock and not is_changed(module):
        return 0
    if not is_called_directly(module):
        return 0
    children = module._modules
    return getattr(children.get("before_norm") or children.get("norm1"), "num_groups", 0)


def link(module: nn.Module) -> None:
    """Let `module` hand on statistics if it runs accelerated blocks one after another."""
    if is_changed(module):
        return
    cls: Any = type(module)
    if isinstance(module, nn.Sequential) and cls.forward is nn.Sequential.forward:
        if any(map(is_changed, module)):
            module.__class__ = _linked_sequential(cls)  # type: ignore[assignment]
    elif _is_encoder(cls) and _sees_only_stages(cls.forward):
        blocks: Any = module.block
        if any(is_changed(block) for stage in blocks for block in stage):
            module.__class__ = _linked_encoder(cls)


def unlink(module: nn.Module) -> None:
    """Undo `link`."""
    cls = original_class(type(module))
    if is_changed(module) and (issubclass(cls, nn.Sequential) or _is_encoder(cls)):
        module.__class__ = cls


@functools.cache
def _linked_sequential(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Sequential, input: Any) -> Any:
        for part in links(self):
            input = part(input)
        return input

    return with_forward(cls, forward, _rebuild_sequential)


def _rebuild_sequential(cls: Any) -> nn.Module:
    return cls.__new__(_linked_sequential(cls))


class _Stages:
    """What the forward of transformers' encoder sees of it: lists of callables as its blocks."""

    def __init__(self, patch_embeddings: Iterable[Any], block: list[Any]) -> None:
        self.patch_embeddings, self.block = patch_embeddings, block


@functools.cache
def _linked_encoder(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        stages = _Stages(
            self.patch_embeddings,
            [links(s) if isinstance(s, Container) else s for s in self.block],
        )
        return cls.forward(stages, *args, **kwargs)

    return with_forward(cls, forward, _rebuild_encoder)


def _rebuild_encoder(cls: Any) -> nn.Module:
    return cls.__new__(_linked_encoder(cls))


def _is_encoder(cls: type[nn.Module]) -> bool:
    """Whether `cls` is transformers' encoder, or derived from it and runs its forward."""
    for base in cls.__mro__:
        if base.__name__ == "PoolFormerEncoder" and base.__module__.startswith("transformers."):
            return cls.forward is base.__dict__.get("forward")
    return False


@functools.cache
def _sees_only_stages(encoder_forward: Callable[..., Any]) -> bool:
    """Whether an encoder returns the same when several blocks of a stage are one callable.

    It is run over numbers: two stages, the first of them of two blocks and of their composition.
    A forward that would record what each block returns, call blocks with more than their input, or
    use more of the encoder than `_Stages` has, fails, and is left as it is.
    """

    def results(first_stage: list[Any]) -> str:
        encoder = _Stages([lambda x: x + 1, lambda x: 2 * x], [first_stage, [lambda x: (x + 3,)]])
        flags = itertools.product((False, True), repeat=2)
        return repr(
            [encoder_forward(encoder, 5, output_hidden_states=h, return_dict=r) for h, r in flags]
        )

    def double(x: int) -> tuple[int]:
        return (2 * x,)

    try:
        return results([double, double]) == results([lambda x: (4 * x,)])
    except Exception:
        return False

"""blocks: PoolFormer blocks in a row without gradients, on the CPU, as one op.

It has the bits of `pool_mixer` and `mlp` called one after another, and leaves out what they cost
beside their kernels: it is one call, and what blocks hand on stays in memory that is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import resolve
from . import _common as common

common.define(
    "blocks_fwd(Tensor x, Tensor?[] parameters, int pool_size, int num_groups, float eps, str act, "
    "str backend) -> Tensor"
)


def _fake_forward(x: Tensor, *args: object) -> Tensor:
    return common.empty_like_op_output(x)


common.register_fake("blocks_fwd", _fake_forward)

_forward_op = torch.ops.poolformer_kernels.blocks_fwd.default


class Settings(NamedTuple):
    """What the blocks of one call have in common. act: a name that kernels know."""

    pool_size: int
    num_groups: int
    eps: float
    act: str


class BlockParameters(NamedTuple):
    """The tensors of one block, in the order in which the op takes them."""

    norm1_weight: Tensor | None
    norm1_bias: Tensor | None
    layer_scale_1: Tensor | None
    norm2_weight: Tensor | None
    norm2_bias: Tensor | None
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    layer_scale_2: Tensor | None


class BlockCall(NamedTuple):
    """All that a block without gradients is made of."""

    parameters: BlockParameters
    settings: Settings
    backend: str | None
    returns_tuple: bool = False  # as blocks of transformers do


def takes(x: Tensor) -> bool:
    """Whether `blocks` may be called with x here and now, whatever backend is asked for."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


def is_cpu_call(x: Tensor, call: BlockCall) -> bool:
    """Whether both ops of a block run on backend "cpu" without gradients."""
    return all(
        resolve(op, "cpu", x.dtype, act, backend=call.backend) == "cpu"
        for op, act in (("pool_mixer", None), ("mlp", call.settings.act))
    )


def blocks(x: Tensor, calls: Sequence[BlockCall]) -> Tensor:
    """x through all blocks, which have the first one's settings. x: (B, C, H, W) → (B, C, H, W).

    No gradient flows. Raises what `pool_mixer` and `mlp` raise.
    """
    settings = calls[0].settings
    common.check_input("pool_mixer", x, settings.num_groups, settings.eps)
    return _forward_op(x, [t for call in calls for t in call.parameters], *settings, "cpu")

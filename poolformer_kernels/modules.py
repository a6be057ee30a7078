"""nn.Modules over the fused ops, with the parameter names that PoolFormer checkpoints have."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .drop_path import branch_dtypes, draw_block_drop_path, draw_drop_path
from .fused import Halves, block_call, fused_block
from .ops._common import canonical_act, check_pool_size
from .ops.blocks import BlockCall
from .ops.group_norm import group_norm
from .ops.mlp import mlp
from .ops.pool_mixer import pool_mixer


class GroupNorm(nn.GroupNorm):
    """torch.nn.GroupNorm as one fused op. x: (B, C, H, W) → (B, C, H, W)."""

    backend: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(
            x,
            self.weight,
            self.bias,
            num_groups=self.num_groups,
            eps=self.eps,
            backend=self.backend,
        )


class PoolMixer(nn.Module):
    """x + drop_path(layer_scale · (pool(norm(x)) − norm(x))). x: (B, C, H, W) → (B, C, H, W).

    Parameters, all (C): norm.weight, norm.bias; layer_scale unless layer_scale_init_value is None.
    """

    layer_scale: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        *,
        pool_size: int = 3,
        drop_path: float = 0.0,
        layer_scale_init_value: float | None = 1e-5,
        num_groups: int = 1,
        eps: float = 1e-5,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_pool_size("PoolMixer", pool_size)
        self.pool_size, self.drop_path, self.backend = pool_size, drop_path, backend
        self.norm = nn.GroupNorm(num_groups, channels, eps)
        self.register_parameter("layer_scale", _layer_scale(channels, layer_scale_init_value))

    def forward(self, x: Tensor) -> Tensor:
        k = None
        if self.training and self.drop_path > 0:
            k = draw_drop_path(x, self.drop_path, branch_dtypes(x, self.layer_scale)[0])
        return pool_mixer(
            x,
            self.norm.weight,
            self.norm.bias,
            self.layer_scale,
            k,
            pool_size=self.pool_size,
            num_groups=self.norm.num_groups,
            eps=self.norm.eps,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"pool_size={self.pool_size}, drop_path={self.drop_path}, backend={self.backend}"


class Mlp(nn.Module):
    """x + drop_path(layer_scale · fc2(act(fc1(norm(x))))). x: (B, C, H, W) → (B, C, H, W).

    Parameters: norm.weight, norm.bias (C); layer_scale (C) unless layer_scale_init_value is None;
    fc1.weight (hidden, C, 1, 1), fc1.bias (hidden), fc2.weight (C, hidden, 1, 1), fc2.bias (C).
    """

    layer_scale: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        hidden_channels: int | None = None,
        *,
        act: str | Callable[[Tensor], Tensor] = "gelu",
        drop_path: float = 0.0,
        layer_scale_init_value: float | None = 1e-5,
        num_groups: int = 1,
        eps: float = 1e-5,
        save_hidden: bool | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        canonical_act(act)
        hidden_channels = hidden_channels or 4 * channels
        self.act, self.drop_path, self.backend = act, drop_path, backend
        self.save_hidden = save_hidden
        self.norm = nn.GroupNorm(num_groups, channels, eps)
        self.fc1 = nn.Conv2d(channels, hidden_channels, 1)
        self.fc2 = nn.Conv2d(hidden_channels, channels, 1)
        self.register_parameter("layer_scale", _layer_scale(channels, layer_scale_init_value))

    def forward(self, x: Tensor) -> Tensor:
        k = None
        if self.training and self.drop_path > 0:
            k = draw_drop_path(x, self.drop_path, branch_dtypes(x, self.layer_scale)[0])
        return mlp(
            x,
            self.norm.weight,
            self.norm.bias,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            self.layer_scale,
            k,
            act=self.act,
            num_groups=self.norm.num_groups,
            eps=self.norm.eps,
            save_hidden=self.save_hidden,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"act={self.act}, drop_path={self.drop_path}, backend={self.backend}"


def _layer_scale(channels: int, init_value: float | None) -> nn.Parameter | None:
    return None if init_value is None else nn.Parameter(torch.full((channels,), float(init_value)))


class PoolFormerMlp(nn.Module):
    """The two 1×1 convolutions of a block under Hugging Face's names; the block's op runs them."""

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden_channels, 1)
        self.conv2 = nn.Conv2d(hidden_channels, channels, 1)


class PoolFormerBlock(nn.Module):
    """A PoolFormer block as two fused ops, under Hugging Face's parameter names.

    before_norm → pool − id → layer_scale_1 → drop path → add; after_norm → output.conv1 → act →
    output.conv2 → layer_scale_2 → drop path → add. x: (B, C, H, W) → (B, C, H, W).

    In training with drop_path > 0 it draws what Hugging Face's PoolFormerLayer draws, in its order:
    one factor an image for the mixer, one after the activation, one after conv2, one for the MLP's
    branch.

    Args:
        channels: C.
        hidden_channels: width of the MLP's hidden; 4 C if None.
        pool_size: odd window of the token mixer.
        hidden_act: "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "silu", or a callable.
        drop_path: rate in [0, 1).
        use_layer_scale, layer_scale_init_value: whether there are layer scales, and their first
            value.
        num_groups, eps: of both GroupNorms.
        save_hidden: keep the MLP's hidden for the backward instead of computing it again; None
            leaves that to the backend (see `mlp`).
        backend: "auto", "torch", "cpu", "triton" or "cuda"; None leaves the choice to
            `use_backend`.

    Raises:
        TypeError, ValueError: an argument that no block can be made of.
    """

    layer_scale_1: nn.Parameter | None
    layer_scale_2: nn.Parameter | None
    residual_in_fp32 = True  # under autocast; see `accelerate`

    def __init__(
        self,
        channels: int,
        hidden_channels: int | None = None,
        *,
        pool_size: int = 3,
        hidden_act: str | Callable[[Tensor], Tensor] = "gelu",
        drop_path: float = 0.0,
        use_layer_scale: bool = True,
        layer_scale_init_value: float = 1e-5,
        num_groups: int = 1,
        eps: float = 1e-5,
        save_hidden: bool | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_pool_size("PoolFormerBlock", pool_size)
        canonical_act(hidden_act)
        if not 0 <= drop_path < 1:
            raise ValueError(
                f"PoolFormerBlock: drop_path is {drop_path!r}; it has to be in [0, 1)."
            )
        self.pool_size, self.hidden_act = pool_size, hidden_act
        self.drop_path, self.save_hidden, self.backend = drop_path, save_hidden, backend
        self.output = PoolFormerMlp(channels, hidden_channels or 4 * channels)
        self.before_norm = nn.GroupNorm(num_groups, channels, eps)
        self.after_norm = nn.GroupNorm(num_groups, channels, eps)
        scale = layer_scale_init_value if use_layer_scale else None
        self.register_parameter("layer_scale_1", _layer_scale(channels, scale))
        self.register_parameter("layer_scale_2", _layer_scale(channels, scale))

    def forward(
        self, x: Tensor, stats: Tensor | None = None, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """`stats` and `return_stats` hand statistics of x and of the result from block to block.

        Returned statistics are None where the backend, "torch", would not use them.
        """
        k1 = k2 = hidden_drop_path = None
        if self.training and self.drop_path > 0:
            k1, hidden_drop_path, k2 = draw_block_drop_path(
                x, self.drop_path, self.layer_scale_1, self.layer_scale_2
            )
        return fused_block(
            x,
            self._halves(),
            (k1, hidden_drop_path, k2),
            save_hidden=self.save_hidden,
            residual_in_fp32=self.residual_in_fp32,
            backend=self.backend,
            stats=stats,
            return_stats=return_stats,
        )

    def call_in_chain(self) -> BlockCall | None:
        """What `stages` may run in place of `forward` where there are no gradients."""
        return None if self.training else block_call(self._halves(), backend=self.backend)

    def _halves(self) -> Halves:
        return Halves(
            self.before_norm,
            self.after_norm,
            self.output.conv1,
            self.output.conv2,
            self.layer_scale_1,
            self.layer_scale_2,
            self.pool_size,
            self.hidden_act,
        )

    def extra_repr(self) -> str:
        return (
            f"pool_size={self.pool_size}, hidden_act={self.hidden_act}, "
            f"drop_path={self.drop_path}, backend={self.backend}"
        )

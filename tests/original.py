"""A PoolFormer with the original repository's module structure and names, written from them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        kept = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep)
        return x * kept.div_(keep)


class GroupNorm(nn.GroupNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)


class Pooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) - x


class Mlp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, 4 * channels, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(4 * channels, channels, 1)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class PoolFormerBlock(nn.Module):
    def __init__(self, channels: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = GroupNorm(channels)
        self.token_mixer = Pooling()
        self.norm2 = GroupNorm(channels)
        self.mlp = Mlp(channels)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.use_layer_scale = True
        self.layer_scale_1 = nn.Parameter(1e-5 * torch.ones(channels))
        self.layer_scale_2 = nn.Parameter(1e-5 * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.token_mixer(self.norm1(x))
        x = x + self.drop_path(self.layer_scale_1[:, None, None] * mixed)
        return x + self.drop_path(self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, in_channels: int, channels: int, size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, size, stride, (size - 1) // 2 - size // 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class PoolFormer(nn.Module):
    """patch_embed, network (stages at even places, downsampling at odd ones), norm, head."""

    def __init__(
        self, depths: list[int], widths: list[int], num_classes: int, drop_path: float
    ) -> None:
        super().__init__()
        rates = iter(torch.linspace(0, drop_path, sum(depths)).tolist())
        self.patch_embed = PatchEmbed(3, widths[0], 7, 4)
        network: list[nn.Module] = []
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            if stage:
                network.append(PatchEmbed(widths[stage - 1], width, 3, 2))
            blocks = [PoolFormerBlock(width, next(rates)) for _ in range(depth)]
            network.append(nn.Sequential(*blocks))
        self.network = nn.ModuleList(network)
        self.norm = GroupNorm(widths[-1])
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for module in self.network:
            x = module(x)
        return self.head(self.norm(x).mean([-2, -1]))

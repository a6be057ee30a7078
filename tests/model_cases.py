"""What tests of models share: small configs, weights of trained size, the original's structure."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poolformer_kernels import _extension
from poolformer_kernels.models.poolformer import PoolFormerConfig, PoolFormerForImageClassification

BACKENDS = [
    "torch",
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            _extension.load() is None, reason=f"no CPU kernels: {_extension.why_not()}"
        ),
    ),
]


def tiny_config(**fields: Any) -> PoolFormerConfig:
    """A PoolFormer of four small stages, for what does not depend on size."""
    small = {"depths": [1, 2, 2, 1], "hidden_sizes": [8, 12, 16, 20], "num_labels": 5}
    if "id2label" in fields:
        del small["num_labels"]
    return PoolFormerConfig(**(small | fields))


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 1) -> Any:
    """Fill `model` with values of trained size: a layer scale of 1e-5 would hide every error."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.normal_(0, p[0].numel() ** -0.5, generator=generator)
        elif "bias" in name:
            p.normal_(0, 0.2, generator=generator)
        else:
            p.uniform_(0.5, 1.0, generator=generator)
    return model


def relative_error(result: Tensor, expected: Tensor) -> float:
    """max |result − expected| / max |expected|."""
    assert result.shape == expected.shape and result.dtype == expected.dtype
    return ((result - expected).abs().max() / expected.abs().max()).item()


def assert_same_tensors(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert result.keys() == expected.keys()
    for key, tensor in expected.items():
        assert result[key].dtype == tensor.dtype and torch.equal(result[key], tensor), key


def transformers_or_skip() -> ModuleType:
    """transformers, quiet."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def hf_model(config: PoolFormerConfig, name: str = "PoolFormerForImageClassification") -> Any:
    """transformers' model of `config`, in eval mode, with weights of trained size."""
    transformers = transformers_or_skip()
    with torch.device("meta"):  # no time for first values
        model = getattr(transformers, name)(transformers.PoolFormerConfig(**config.to_dict()))
    return randomize(model.to_empty(device="cpu")).eval()


def pair(config: PoolFormerConfig) -> tuple[Any, PoolFormerForImageClassification]:
    """transformers' classifier and ours, in eval mode, over the same memory of weights."""
    theirs = hf_model(config)
    with torch.device("meta"):
        ours = PoolFormerForImageClassification(config)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return theirs, ours.eval()


class OriginalBlock(nn.Module):
    """A block of sail-sg/poolformer: its names and its computation."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, channels), nn.GroupNorm(1, channels)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Conv2d(channels, hidden, 1), "fc2": nn.Conv2d(hidden, channels, 1)}
        )
        self.layer_scale_1 = nn.Parameter(torch.ones(channels))
        self.layer_scale_2 = nn.Parameter(torch.ones(channels))
        self.pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.layer_scale_1[:, None, None] * (self.pool(normed) - normed)
        hidden = nn.functional.gelu(self.mlp["fc1"](self.norm2(x)))
        return x + self.layer_scale_2[:, None, None] * self.mlp["fc2"](hidden)


class Original(nn.Module):
    """sail-sg/poolformer: its names and its computation, with a head or with fork_feat."""

    def __init__(self, config: PoolFormerConfig, fork_feat: bool = False) -> None:
        super().__init__()
        sizes = config.hidden_sizes
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, sizes[0], 7, 4, 2)})
        self.network = nn.ModuleList()
        for i, (size, depth) in enumerate(zip(sizes, config.depths, strict=True)):
            if i > 0:
                self.network.append(nn.ModuleDict({"proj": nn.Conv2d(sizes[i - 1], size, 3, 2, 1)}))
            blocks = [OriginalBlock(size, int(size * config.mlp_ratio)) for _ in range(depth)]
            self.network.append(nn.Sequential(*blocks))
        self.fork_feat = fork_feat
        if fork_feat:
            for i, size in enumerate(sizes):
                self.add_module(f"norm{2 * i}", nn.GroupNorm(1, size))
        else:
            self.norm = nn.GroupNorm(1, sizes[-1])
            self.head = nn.Linear(sizes[-1], config.num_labels)

    def forward(self, x: Tensor) -> Any:
        x = self.patch_embed["proj"](x)
        outputs = []
        for i, part in enumerate(self.network):
            x = part["proj"](x) if i % 2 else part(x)
            if self.fork_feat and i % 2 == 0:
                outputs.append(getattr(self, f"norm{i}")(x))
        return outputs if self.fork_feat else self.head(self.norm(x).mean((-2, -1)))

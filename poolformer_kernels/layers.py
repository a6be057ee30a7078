"""Layers for the Hugging Face package `kernels`, which gives modules the forward of another class.

    import kernels
    import poolformer_kernels.layers as layers
    from transformers.models.poolformer.modeling_poolformer import PoolFormerLayer

    kernels.replace_kernel_forward_from_hub(PoolFormerLayer, "PoolFormerLayer", layers.fits)
    with kernels.use_kernel_mapping(layers.MAPPING):
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE)

`accelerate` does more: it looks again before each forward, and blocks hand on statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .blocks import family_of, run_fused
from .fitness import why_not


class PoolFormerLayer(nn.Module):
    """The forward of transformers' PoolFormerLayer on the fused ops; it has no state of its own."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Any:
        """hidden_states: (B, C, H, W) → (result,) of its shape, dtype and layout."""
        family = family_of(self)
        assert family is not None, "kernelize gives this forward to PoolFormerLayers alone"
        return run_fused(family, self, family.parts(self), hidden_states)


@dataclass(frozen=True)
class Repository:
    """Where `kernels` finds a layer: this module."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        return globals()[self.layer_name]


MAPPING = {
    "PoolFormerLayer": {device: Repository("PoolFormerLayer") for device in ("cpu", "cuda", "rocm")}
}


def fits(block: nn.Module) -> bool:
    """Whether the fused ops compute what `block` does; `kernelize` leaves it as it is if not."""
    family = family_of(block)
    return family is not None and why_not(family, block, family.parts(block)) is None

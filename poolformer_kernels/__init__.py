"""PoolFormer with fused kernels: ops, modules, models, and `accelerate` for your models."""

from typing import TYPE_CHECKING, Any

from . import backends, ops, reference
from ._version import __version__
from .backends import BackendUnavailable, use_backend
from .embeddings import PatchEmbed
from .models.poolformer import (
    PoolFormerBackbone,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerModel,
    convert_state_dict,
)
from .modules import GroupNorm, Mlp, PoolFormerBlock, PoolMixer
from .ops import group_norm, mlp, patch_embed, pool_mixer
from .patch import accelerate, report, restore

if TYPE_CHECKING:
    from .models.poolformer import PoolFormerFeatureExtractor, PoolFormerImageProcessor

__all__ = [
    "BackendUnavailable",
    "GroupNorm",
    "Mlp",
    "PatchEmbed",
    "PoolFormerBackbone",
    "PoolFormerBlock",
    "PoolFormerConfig",
    "PoolFormerFeatureExtractor",
    "PoolFormerForImageClassification",
    "PoolFormerImageProcessor",
    "PoolFormerModel",
    "PoolMixer",
    "__version__",
    "accelerate",
    "backends",
    "convert_state_dict",
    "group_norm",
    "mlp",
    "ops",
    "patch_embed",
    "pool_mixer",
    "reference",
    "report",
    "restore",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """The image processors, imported when first used: only they need numpy and Pillow."""
    if name in ("PoolFormerFeatureExtractor", "PoolFormerImageProcessor"):
        from .models import poolformer

        return getattr(poolformer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

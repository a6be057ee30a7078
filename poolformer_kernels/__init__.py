"""PoolFormer with fused kernels: ops, modules, models, and `accelerate` for your models."""

from . import backends, ops, reference
from ._version import __version__
from .backends import BackendUnavailable, use_backend
from .models.poolformer import (
    PoolFormerBackbone,
    PoolFormerConfig,
    PoolFormerFeatureExtractor,
    PoolFormerForImageClassification,
    PoolFormerImageProcessor,
    PoolFormerModel,
    convert_state_dict,
)
from .modules import GroupNorm, Mlp, PoolFormerBlock, PoolMixer
from .ops import group_norm, mlp, pool_mixer
from .patch import accelerate, report, restore

__all__ = [
    "BackendUnavailable",
    "GroupNorm",
    "Mlp",
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
    "pool_mixer",
    "reference",
    "report",
    "restore",
    "use_backend",
]

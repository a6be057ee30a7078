"""PoolFormer with fused kernels: ops, modules, models, and `accelerate` for the models that you have."""

from . import backends, ops, reference
from ._version import __version__
from .backends import BackendUnavailable, use_backend
from .modules import GroupNorm, Mlp, PoolFormerBlock, PoolMixer
from .ops import group_norm, mlp, pool_mixer

__all__ = [
    "BackendUnavailable",
    "GroupNorm",
    "Mlp",
    "PoolFormerBlock",
    "PoolMixer",
    "__version__",
    "backends",
    "group_norm",
    "mlp",
    "ops",
    "pool_mixer",
    "reference",
    "use_backend",
]

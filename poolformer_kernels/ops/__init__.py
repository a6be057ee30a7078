"""The ops in functional form, with autograd, for every backend."""

from .group_norm import group_norm
from .mlp import mlp
from .pool_mixer import pool_mixer

__all__ = ["group_norm", "mlp", "pool_mixer"]

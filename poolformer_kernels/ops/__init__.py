"""The ops in functional form, with autograd, for every backend."""

from .group_norm import group_norm
from .mlp import mlp
from .patch_embed import patch_embed
from .pool_mixer import pool_mixer

__all__ = ["group_norm", "mlp", "patch_embed", "pool_mixer"]

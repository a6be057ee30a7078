"""PoolFormer, standing alone: configuration, models, checkpoints and image processing."""

from .configuration import PoolFormerConfig
from .image_processing import PoolFormerFeatureExtractor, PoolFormerImageProcessor
from .keys import convert_state_dict
from .modeling import PoolFormerBackbone, PoolFormerForImageClassification, PoolFormerModel

__all__ = [
    "PoolFormerBackbone",
    "PoolFormerConfig",
    "PoolFormerFeatureExtractor",
    "PoolFormerForImageClassification",
    "PoolFormerImageProcessor",
    "PoolFormerModel",
    "convert_state_dict",
]

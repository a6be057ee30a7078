"""PoolFormer, standing alone: configuration, models, checkpoints and image processing."""

from typing import TYPE_CHECKING, Any

from .configuration import PoolFormerConfig
from .keys import convert_state_dict
from .modeling import PoolFormerBackbone, PoolFormerForImageClassification, PoolFormerModel

if TYPE_CHECKING:
    from .image_processing import PoolFormerFeatureExtractor, PoolFormerImageProcessor

__all__ = [
    "PoolFormerBackbone",
    "PoolFormerConfig",
    "PoolFormerFeatureExtractor",
    "PoolFormerForImageClassification",
    "PoolFormerImageProcessor",
    "PoolFormerModel",
    "convert_state_dict",
]


def __getattr__(name: str) -> Any:
    """Image processing is imported when it is used: models need neither numpy nor Pillow."""
    if name in __all__:
        from . import image_processing

        return getattr(image_processing, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

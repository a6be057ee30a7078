"""A feature pyramid over an accelerated backbone, as OpenMMLab's detectors and segmenters have it.

    python -m examples.feature_pyramid photo.jpg --weights sail/poolformer_s12

`Pyramid` is backbone and neck in one module: what a torchvision detector takes as its backbone (see
`detector`), and what mmdetection builds of `backbone=dict(...)` and `neck=dict(type="FPN", ...)`.
The backbone alone, a tuple of maps with strides 4, 8, 16 and 32, is what mmsegmentation's heads
take. Prints the maps of a photograph.
"""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

import poolformer_kernels as pk


class Pyramid(nn.Module):
    """Maps of `out_channels` channels, one for each stage of the backbone that it returns.

    (B, 3, H, W) → {"0": (B, out_channels, H / 4, W / 4), …, "3": (B, out_channels, H / 32, W / 32)}
    """

    def __init__(self, backbone: pk.PoolFormerBackbone, out_channels: int = 256) -> None:
        super().__init__()
        self.backbone, self.out_channels = backbone, out_channels
        self.strides = backbone.strides
        self.neck = FeaturePyramidNetwork(list(backbone.channels), out_channels)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        maps = self.backbone(pixels)
        return self.neck(OrderedDict((str(i), x) for i, x in enumerate(maps)))


def detector(pyramid: Pyramid, num_classes: int) -> RetinaNet:
    """RetinaNet over a pyramid; its anchors are 8 strides wide, as in the paper."""
    anchors = AnchorGenerator(
        tuple((8 * stride,) for stride in pyramid.strides),
        ((0.5, 1.0, 2.0),) * len(pyramid.strides),
    )
    return RetinaNet(pyramid, num_classes, anchor_generator=anchors)


def build(weights: str | None, variant: str = "s12") -> Pyramid:
    """A pyramid over `weights` (folder, file or hub name), or over first values."""
    if weights is None:
        backbone = pk.PoolFormerBackbone(pk.PoolFormerConfig.from_variant(variant))
    else:
        backbone = pk.PoolFormerBackbone.from_pretrained(weights)
    return pk.accelerate(Pyramid(backbone)).eval()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", help="a photograph")
    parser.add_argument("--weights", help="folder, file or hub name; default: first values of s12")
    options = parser.parse_args(arguments)
    try:
        processor = pk.PoolFormerImageProcessor()
        pixels = processor(options.image, return_tensors="pt").pixel_values
        pyramid = build(options.weights)
    except (OSError, ValueError) as error:
        print(f"feature_pyramid: {error}", file=sys.stderr)
        return 2
    with torch.inference_mode():
        for stride, (name, x) in zip(pyramid.strides, pyramid(pixels).items(), strict=True):
            print(f"map {name}, stride {stride}: {tuple(x.shape)}, std {x.std():.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The five published PoolFormers and the names they go by."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Variant:
    """What distinguishes a published PoolFormer from another."""

    depths: tuple[int, ...]
    hidden_sizes: tuple[int, ...]
    layer_scale_init_value: float


_S, _M = (64, 128, 320, 512), (96, 192, 384, 768)
VARIANTS = {
    "s12": Variant((2, 2, 6, 2), _S, 1e-5),
    "s24": Variant((4, 4, 12, 4), _S, 1e-5),
    "s36": Variant((6, 6, 18, 6), _S, 1e-6),
    "m36": Variant((6, 6, 18, 6), _M, 1e-6),
    "m48": Variant((8, 8, 24, 8), _M, 1e-6),
}


def variant_name(name: str) -> str | None:
    """The variant of a name such as "s12", "sail/poolformer_s12" or "poolformer_s12.sail_in1k"."""
    short = name.lower().rsplit("/", 1)[-1].split(".")[0].replace("-", "_")
    short = short.removeprefix("poolformer_")
    return short if short in VARIANTS else None


def hub_name(source: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The hub repository of a variant's bare name; anything else is passed on."""
    if isinstance(source, str) and "/" not in source and not Path(source).exists():
        short = variant_name(source)
        if short is not None and "." not in source:
            return f"sail/poolformer_{short}"
        if short is not None and source.endswith(".sail_in1k"):
            return f"timm/{source}"
    return source

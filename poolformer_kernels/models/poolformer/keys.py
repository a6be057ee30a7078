"""Parameter names of the original, Hugging Face and timm, and what they tell of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .configuration import PoolFormerConfig
from .variants import VARIANTS

# One table. {i}: stage, {down}: stage from 1 on, {j}: block, {leaf}: weight or bias. {even} = 2i
# and {odd} = 2i − 1 are the places of blocks and downsampling in the original's one list. out_norm:
# the norms of a backbone (the original's fork_feat).
FORMATS: dict[str, dict[str, str]] = {
    "hf": {
        "embed": "poolformer.encoder.patch_embeddings.{i}.projection.{leaf}",
        "norm1": "poolformer.encoder.block.{i}.{j}.before_norm.{leaf}",
        "norm2": "poolformer.encoder.block.{i}.{j}.after_norm.{leaf}",
        "fc1": "poolformer.encoder.block.{i}.{j}.output.conv1.{leaf}",
        "fc2": "poolformer.encoder.block.{i}.{j}.output.conv2.{leaf}",
        "scale1": "poolformer.encoder.block.{i}.{j}.layer_scale_1",
        "scale2": "poolformer.encoder.block.{i}.{j}.layer_scale_2",
        "norm": "norm.{leaf}",
        "head": "classifier.{leaf}",
        "out_norm": "out_norms.{i}.{leaf}",
    },
    "original": {
        "stem": "patch_embed.proj.{leaf}",
        "embed": "network.{odd}.proj.{leaf}",
        "norm1": "network.{even}.{j}.norm1.{leaf}",
        "norm2": "network.{even}.{j}.norm2.{leaf}",
        "fc1": "network.{even}.{j}.mlp.fc1.{leaf}",
        "fc2": "network.{even}.{j}.mlp.fc2.{leaf}",
        "scale1": "network.{even}.{j}.layer_scale_1",
        "scale2": "network.{even}.{j}.layer_scale_2",
        "norm": "norm.{leaf}",
        "head": "head.{leaf}",
        "out_norm": "norm{even}.{leaf}",
    },
    "timm": {
        "stem": "stem.conv.{leaf}",
        "embed": "stages.{down}.downsample.conv.{leaf}",
        "norm1": "stages.{i}.blocks.{j}.norm1.{leaf}",
        "norm2": "stages.{i}.blocks.{j}.norm2.{leaf}",
        "fc1": "stages.{i}.blocks.{j}.mlp.fc1.{leaf}",
        "fc2": "stages.{i}.blocks.{j}.mlp.fc2.{leaf}",
        "scale1": "stages.{i}.blocks.{j}.layer_scale1.scale",
        "scale2": "stages.{i}.blocks.{j}.layer_scale2.scale",
        "norm": "head.norm.{leaf}",
        "head": "head.fc.{leaf}",
    },
}
_GROUPS = {
    "i": r"(?P<i>\d+)",
    "down": r"(?P<down>[1-9]\d*)",
    "even": r"(?P<even>\d*[02468])",
    "odd": r"(?P<odd>\d*[13579])",
    "j": r"(?P<j>\d+)",
    "leaf": "(?P<leaf>weight|bias)",
}
_PATTERNS = {
    layout: {
        part: re.compile(template.replace(".", r"\.").format(**_GROUPS))
        for part, template in templates.items()
    }
    for layout, templates in FORMATS.items()
}


def _parse(key: str, layout: str) -> tuple[str, dict[str, int], str] | None:
    """(part, its stage i and block j, leaf) of `key`, or None where `layout` has no such key."""
    if layout == "hf" and key.startswith("encoder."):  # the headless PoolFormerModel's own keys
        key = f"poolformer.{key}"
    for part, pattern in _PATTERNS[layout].items():
        if match := pattern.fullmatch(key):
            found = match.groupdict()
            leaf = found.pop("leaf", "")
            place = {name: int(digits) for name, digits in found.items()}
            if "odd" in place:
                stage = (place["odd"] + 1) // 2
            else:
                stage = place.get("i", place.get("down", place.get("even", 0) // 2))
            return part, {"i": stage, "j": place.get("j", 0)}, leaf
    return None


def _format(part: str, place: dict[str, int], leaf: str, layout: str) -> str | None:
    """The inverse of `_parse`; None where `layout` has no such part."""
    i, templates = place["i"], FORMATS[layout]
    if part in ("stem", "embed"):
        part = "stem" if i == 0 and "stem" in templates else "embed"
    if part not in templates:
        return None
    return templates[part].format(i=i, down=i, even=2 * i, odd=2 * i - 1, j=place["j"], leaf=leaf)


def detect_format(keys: Iterable[str]) -> str:
    """The one of "hf", "original" and "timm" that knows most of `keys`.

    Raises:
        ValueError: none knows any of them.
    """
    keys = list(keys)
    known = {layout: sum(_parse(key, layout) is not None for key in keys) for layout in FORMATS}
    best = max(known, key=lambda layout: known[layout])
    if known[best] == 0:
        raise ValueError(
            "These are no PoolFormer's parameters: got "
            f"{_listed(keys[:5])}{', …' * (len(keys) > 5)}; needed are the names of Hugging Face "
            "(poolformer.encoder.…), the original (network.…) or timm (stages.…)."
        )
    return best


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "no keys at all"


def convert_state_dict(
    state_dict: Mapping[str, Tensor], to: str = "hf", source: str | None = None
) -> dict[str, Tensor]:
    """Rename the parameters of a PoolFormer; the tensors themselves are passed on as they are.

    Args:
        to, source: "hf" (names of PoolFormerForImageClassification), "original"
            (sail-sg/poolformer) or "timm". source None: detected.

    timm's head pools before it normalises (a LayerNorm, eps 1e-6), the others' normalise before
    they pool (a GroupNorm, eps 1e-5): its two parameters have the same names and shapes, but a head
    converted to or from timm computes something else. Everything before the head is the same.

    Raises:
        ValueError: keys that one of the formats does not have; all are named.
    """
    for name in (to, source):
        if name is not None and name not in FORMATS:
            raise ValueError(f"There is no format {name!r}; there are {', '.join(FORMATS)}.")
    source = source or detect_format(state_dict)
    converted, unknown = rename(state_dict, to, source)
    if unknown:
        raise ValueError(
            f"From {source!r} to {to!r}: there is no name for {_listed(unknown)}; needed are the "
            f"parameters of a PoolFormer that both formats have. Leave them out.{hint(unknown)}"
        )
    return converted


def rename(
    state_dict: Mapping[str, Tensor], to: str, source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The parameters that both formats have, under their new names; and the names of all others."""
    converted: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, tensor in state_dict.items():
        parsed = _parse(key, source)
        target = _format(*parsed, layout=to) if parsed else None
        if target is None:
            unknown.append(key)
        else:
            converted[target] = tensor
    return converted, unknown


def hint(unknown: Iterable[str]) -> str:
    """What parameters that no PoolFormer has tell of the model that has them."""
    if any("res_scale" in key or ".act." in key or "token_mixer" in key for key in unknown):
        return " They look like those of a PoolFormerV2 or another MetaFormer: other models."
    return ""


def infer_config(state_dict: Mapping[str, Tensor]) -> PoolFormerConfig:
    """The config, read from shapes, of the model that has these parameters (names of Hugging Face).

    What shapes do not show is taken from the published models: pool_size 3, GELU, strides and
        padding.

    Raises:
        ValueError: parameters are missing, or strides cannot be known as the convolutions are not
            7, 3, 3, 3.
    """
    found = {
        (parsed[0], parsed[1]["i"], parsed[1]["j"]): tensor
        for key, tensor in state_dict.items()
        if (parsed := _parse(key, "hf")) is not None and parsed[2] != "bias"
    }
    convs = [
        t
        for (part, _, _), t in sorted(found.items(), key=lambda e: e[0])
        if part == "embed" and t.dim() == 4
    ]
    blocks = [key for key in found if key[0] not in ("embed", "norm", "head", "out_norm")]
    depths = [1 + max((j for _, i, j in blocks if i == stage), default=-1) for stage in range(4)]
    fc1 = found.get(("fc1", 0, 0))
    if len(convs) != 4 or [conv.shape[-1] for conv in convs] != [7, 3, 3, 3] or fc1 is None:
        raise ValueError(
            "The architecture cannot be read from these shapes: needed are four stages that begin "
            f"with convolutions of size 7, 3, 3, 3, got {[tuple(conv.shape) for conv in convs]}. "
            "Pass config=PoolFormerConfig(…)."
        )
    fields: dict[str, Any] = {
        "num_channels": convs[0].shape[1],
        "depths": depths,
        "hidden_sizes": [conv.shape[0] for conv in convs],
        "mlp_ratio": fc1.shape[0] / convs[0].shape[0],
        "use_layer_scale": ("scale1", 0, 0) in found,
        "num_labels": found["head", 0, 0].shape[0] if ("head", 0, 0) in found else 0,
    }
    for variant in VARIANTS.values():
        if [*variant.depths] == depths and [*variant.hidden_sizes] == fields["hidden_sizes"]:
            fields["layer_scale_init_value"] = variant.layer_scale_init_value
    return PoolFormerConfig(**fields)

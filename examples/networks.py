"""The models that examples.train can train, and what is written when it has."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import poolformer_kernels as pk
from poolformer_kernels.models.poolformer.variants import variant_name

DROP_PATH = {"s12": 0.1, "s24": 0.1, "s36": 0.2, "m36": 0.3, "m48": 0.4}
CROP_PCT = {"s12": 0.9, "s24": 0.9, "s36": 0.9, "m36": 0.95, "m48": 0.95}


def split_name(model: str) -> tuple[str, str]:
    """(library, name) of --model: "own", "transformers" or "timm"."""
    library, colon, name = model.partition(":")
    if not colon:
        return "own", model
    if library not in ("transformers", "timm"):
        raise ValueError(
            f"--model is {model!r}; before the colon there has to be transformers or timm."
        )
    return library, name


def crop_pct(options: argparse.Namespace) -> float:
    """The part of an image's edge that validation looks at."""
    variant = variant_name(split_name(options.model)[1])
    return options.crop_pct or CROP_PCT.get(variant or "s12", 0.9)


def build(options: argparse.Namespace, classes: list[str]) -> nn.Module:
    """The model of --model with a head for `classes`, on the CPU, not accelerated.

    Raises:
        FileNotFoundError, ValueError: there is no such model or checkpoint, or they do not fit.
    """
    library, name = split_name(options.model)
    drop_path = options.drop_path
    if drop_path is None:
        drop_path = DROP_PATH.get(variant_name(name) or "s12", 0.1)
    if library == "timm":
        return _timm_model(name, options.weights, drop_path, len(classes))
    config = _config(name, classes, drop_path_rate=drop_path)
    if library == "transformers":
        return _transformers_model(config, options.weights)
    if options.weights is None:
        return pk.PoolFormerForImageClassification(config)
    return pk.PoolFormerForImageClassification.from_pretrained(
        options.weights, config=config, ignore_mismatched_sizes=True
    )


def _config(name: str, classes: list[str], **fields: Any) -> pk.PoolFormerConfig:
    labels = {label: index for index, label in enumerate(classes)}
    fields |= {"id2label": dict(enumerate(classes)), "label2id": labels}
    if Path(name).exists():
        return pk.PoolFormerConfig.from_pretrained(name, **fields)
    return pk.PoolFormerConfig.from_variant(name, **fields)


def _transformers_model(config: pk.PoolFormerConfig, weights: str | None) -> nn.Module:
    import transformers

    theirs = transformers.PoolFormerConfig(**config.to_dict())
    if weights is None:
        return transformers.PoolFormerForImageClassification(theirs)
    return transformers.PoolFormerForImageClassification.from_pretrained(
        weights, config=theirs, ignore_mismatched_sizes=True
    )


def _timm_model(name: str, weights: str | None, drop_path: float, classes: int) -> nn.Module:
    import timm

    try:
        return timm.create_model(
            name,
            pretrained=weights is not None,
            pretrained_cfg_overlay={"file": weights} if weights else None,
            num_classes=classes,
            drop_path_rate=drop_path,
        )
    except RuntimeError as error:
        raise ValueError(f"--model timm:{name}: {error}") from None


def choose_ops(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    """Put `model` on the fused ops of --backend, or with --no-fused on plain PyTorch, in place."""
    if not options.no_fused:
        return pk.accelerate(model, options.backend)
    if split_name(options.model)[0] == "own":
        return pk.accelerate(model, "torch")
    return model


def logits_of(model: nn.Module, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) → (B, classes), for models that return logits and models that return outputs."""
    result = model(pixels)
    return result if isinstance(result, Tensor) else result.logits


def save(
    folder: Path, state: dict[str, Tensor], options: argparse.Namespace, classes: list[str]
) -> None:
    """Write weights where from_pretrained (or, of timm's models, create_model) reads them."""
    library, name = split_name(options.model)
    if library == "timm":
        folder.mkdir(parents=True, exist_ok=True)
        contiguous = {key: tensor.contiguous() for key, tensor in state.items()}
        safetensors.torch.save_file(contiguous, folder / "model.safetensors")
        return
    with torch.device("meta"):
        model = pk.PoolFormerForImageClassification(_config(name, classes))
    model.load_state_dict(state, assign=True)
    model.save_pretrained(folder)

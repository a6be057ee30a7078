"""Counts the bytes that training keeps for the backward of one image, beside plain PyTorch.

    python -m benchmarks.saved_bytes                  # every variant, bfloat16, 224²

Needs no GPU, only a PyTorch that was built for one: the tensors are fake, their sizes exact. Each
storage counts once, parameters not at all. Writes benchmarks/results/saved_bytes.csv.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from poolformer_kernels import PoolFormerConfig, PoolFormerForImageClassification
from poolformer_kernels.models.poolformer.variants import VARIANTS

from . import models
from .op_cases import DTYPES
from .plans import PLANS
from .report import RESULTS, environment, table, write_csv

BLOCKS, WHOLE = "blocks", "whole model"
CONTENDERS = tuple(name for name in PLANS if name != "cuda")  # it saves what triton saves
COLUMNS = {
    "variant": "variant|<",
    "dtype": "dtype|<8",
    "part": "part|<11",
    "contender": "backend|<7",
    "saved_mb": "MB an image|8.2f",
    "tensors": "tensors|d",
    "source": "model|<",
}


def why_not() -> str | None:
    """None where the bytes can be counted, else what is missing and what to do."""
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"the kernels' tensors are on a GPU, and torch {torch.__version__} was built without; "
            "install a build for CUDA or ROCm. It needs no GPU."
        )
    return None


@contextmanager
def saved_storages(model: nn.Module) -> Iterator[dict[int, torch.UntypedStorage]]:
    """The storages that autograd saves in this context, but for those of `model`'s parameters."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # kept alive, so that no other takes its address
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield saved


def build(config: PoolFormerConfig, contender: str) -> nn.Module:
    """A model without memory: transformers' for plain PyTorch where it is installed, else ours."""
    with torch.device("meta"):
        if contender == "torch" and models.transformers is not None:
            return models.TheirModel(models.TheirConfig.from_dict(config.to_dict()))
        return PoolFormerForImageClassification(config)


def run_blocks(model: Any, stage: int, x: Tensor) -> None:
    for block in model.poolformer.encoder.block[stage]:
        output = block(x)
        x = output[0] if isinstance(output, tuple) else output


def saved_bytes(
    config: PoolFormerConfig,
    part: str,
    contender: str,
    dtype: torch.dtype = torch.bfloat16,
    image_size: int = 224,
) -> list[int]:
    """The sizes of what is saved for one image: by the blocks of all stages, or the whole model."""
    model = build(config, contender).to(dtype, memory_format=torch.channels_last).train()
    with FakeTensorMode(allow_non_fake_inputs=True), PLANS[contender].chosen():
        model = model.to_empty(device="cuda")
        with saved_storages(model) as saved:
            if part == WHOLE:
                model(torch.empty((1, 3, image_size, image_size), dtype=dtype, device="cuda"))
            else:
                for stage, channels in enumerate(config.hidden_sizes):
                    edge = -(-image_size // math.prod(config.strides[: stage + 1]))
                    x = torch.empty((1, channels, edge, edge), dtype=dtype, device="cuda")
                    x = x.contiguous(memory_format=torch.channels_last)
                    run_blocks(model, stage, x.requires_grad_())
        return [storage.nbytes() for storage in saved.values()]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=list(DTYPES)[:3])
    parser.add_argument("--image-size", type=int, default=224)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if (reason := why_not()) is not None:
        print(reason, file=sys.stderr)
        return 2
    rows = []
    for variant in options.variants:
        config = PoolFormerConfig.from_variant(variant)
        for dtype in options.dtypes:
            for part in (BLOCKS, WHOLE):
                for contender in CONTENDERS:
                    sizes = saved_bytes(config, part, contender, DTYPES[dtype], options.image_size)
                    row = {
                        "variant": variant,
                        "image_size": options.image_size,
                        "dtype": dtype,
                        "part": part,
                        "contender": contender,
                        "saved_bytes": sum(sizes),
                        "saved_mb": sum(sizes) / 1e6,
                        "tensors": len(sizes),
                        "source": models.EAGER_SOURCE if contender == "torch" else "own model",
                    }
                    print(table([row], COLUMNS, header=not rows))
                    rows.append(row)
    known = environment()
    versions = {key: known[key] for key in ("torch", "package", "commit", "date")}
    print(f"wrote {write_csv(options.out / 'saved_bytes.csv', rows, versions)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

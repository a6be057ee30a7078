"""Trains a PoolFormer on fused ops, on one process or many.

    torchrun --nproc-per-node 8 -m examples.train /data/imagenet --workers 8 --dtype bfloat16
    torchrun --nproc-per-node 8 -m examples.train /data/imagenet --fsdp --model m48 --resume
    python -m examples.train hfds/beans --val-split validation --batch-size 64 --weights s12

/data/imagenet holds train/ and val/, each with a folder of images for every class; hfds/NAME is a
data set of the Hugging Face hub. The defaults are the recipe of the original repository: AdamW,
0.001 for 1024 images a step, cosine with five epochs of warmup, RandAugment, mixup, cutmix, random
erasing, label smoothing and drop path. The learning rate follows the cosine step by step, where the
original's changed once an epoch, and all rates are scaled by the batch's size.

--out holds steps.csv, epochs.csv, TensorBoard's files if it is installed, checkpoints, and the
models `best` and `last` for from_pretrained. With --resume a run that was killed goes on from its
last checkpoint, in the middle of an epoch, and does what it would have done: see seeding.py.
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --max-restarts 3 does so by itself.

The parts are timm's (transforms, mixup, averaged weights, optimizer groups, schedule), because the
released weights were trained with them, and the Hugging Face Trainer has no such recipe for images;
and PyTorch's (DataLoader, DDP, FSDP2, torch.distributed.checkpoint).

The exit code is 2 if data, options or a checkpoint cannot be used.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .options import parse
from .parallel import process_group
from .trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    with process_group(options.device) as place:
        try:
            trainer = Trainer(options, place)
        except (OSError, ValueError, ModuleNotFoundError) as error:
            if place.leads:
                print(f"train: {error}", file=sys.stderr)
            return 2
        trainer.fit()
    return 0


if __name__ == "__main__":
    sys.exit(main())

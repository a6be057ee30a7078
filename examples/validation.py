"""How good a model is on the validation images."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from .images import NO_IMAGE, Sample
from .networks import logits_of
from .parallel import Place


@torch.no_grad()
def validate(
    model: nn.Module, batches: Any, place: Place, autocast: AbstractContextManager[Any]
) -> tuple[dict[str, float], set[int]]:
    """({"loss", "top1", "top5"} over the images of all processes, corrupt ones of this process).

    model: put in eval mode; not in DDP, for processes need not have as many images each.
    batches: of `Sample`; images with NO_IMAGE as their label do not count.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=place.device)
    corrupt: set[int] = set()
    batch: Sample
    for batch in batches:
        corrupt |= batch.corrupt_indices()
        pixels, labels = batch.placed(place.device)
        counted = labels != NO_IMAGE
        with autocast:
            logits = logits_of(model, pixels)[counted].float()
        labels = labels[counted]
        hits = logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss, hits[:, 0].sum(), hits.sum(), counted.sum()])
    loss_sum, first, among, count = place.total(sums).tolist()
    count = max(count, 1)
    return {"loss": loss_sum / count, "top1": first / count, "top5": among / count}, corrupt

"""The ways to run a block whose launches and bytes are compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from poolformer_kernels import fused, ops, use_backend


@dataclass(frozen=True)
class Plan:
    """A backend, and whether the MLP keeps its hidden for the backward or computes it again."""

    backend: str
    save_hidden: bool = False

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """In this context the ops in `poolformer_kernels.fused`, and so blocks, follow it."""

        def mlp(*args: Any, **options: Any) -> Any:
            return ops.mlp(*args, **{**options, "save_hidden": self.save_hidden})

        with mock.patch.object(fused, "mlp", mlp), use_backend(self.backend):
            yield


PLANS = {
    "torch": Plan("torch"),
    "cuda": Plan("cuda"),
    "triton": Plan("triton"),
    "triton, hidden kept": Plan("triton", save_hidden=True),
}

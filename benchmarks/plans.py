"""The ways to run a block whose launches and bytes are compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from poolformer_kernels import backends, modules, ops, use_backend


@dataclass(frozen=True)
class Plan:
    """A backend, and whether the MLP keeps its hidden for the backward or computes it again.

    otherwise: what runs the MLP where the backend cannot.
    """

    backend: str
    save_hidden: bool = False
    otherwise: str | None = None

    def of_mlp(self, x: Tensor, act: str) -> str:
        """The backend of a call of the MLP."""
        if self.otherwise is None:
            return self.backend
        call = backends.Call("mlp", x.device.type, x.dtype, act, torch.is_grad_enabled())
        return self.backend if backends.BACKENDS[self.backend](call) is None else self.otherwise

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """In this context the ops in `poolformer_kernels.modules`, and so blocks, follow it."""

        def mlp(x: Tensor, *args: Any, **options: Any) -> Any:
            options["save_hidden"] = self.save_hidden
            options["backend"] = self.of_mlp(x, options.get("act", "gelu"))
            return ops.mlp(x, *args, **options)

        chosen = mock.patch.object(modules, "mlp", mlp)
        with use_backend(self.backend), chosen:
            yield


PLANS = {
    "torch": Plan("torch"),
    "cuda": Plan("cuda", otherwise="triton"),
    "triton": Plan("triton"),
    "triton, hidden kept": Plan("triton", save_hidden=True),
}

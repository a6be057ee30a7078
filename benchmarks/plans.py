"""The ways to run a block whose launches and bytes are compared."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

from poolformer_kernels import modules, use_backend


@dataclass(frozen=True)
class Plan:
    """A backend, and whether the MLP keeps its hidden for the backward or computes it again."""

    backend: str
    save_hidden: bool = False

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """In this context the ops in `poolformer_kernels.modules`, and so blocks, follow it."""
        options = {"save_hidden": True} if self.save_hidden else {}
        chosen = mock.patch.object(modules, "mlp", partial(modules.mlp, **options))
        with use_backend(self.backend), chosen:
            yield


PLANS = {"torch": Plan("torch"), "triton": Plan("triton")}
if "save_hidden" in inspect.signature(modules.mlp).parameters:
    PLANS["triton, hidden kept"] = Plan("triton", save_hidden=True)

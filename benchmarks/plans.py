"""The ways to run a block whose launches and bytes are compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from poolformer_kernels import backends, modules, ops, use_backend


@dataclass(frozen=True)
class Plan:
    """A backend, and whether the MLP keeps its hidden for the backward or computes it again.

    otherwise: what runs the calls that the backend cannot.
    """

    backend: str
    save_hidden: bool = False
    otherwise: str | None = None

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """In this context the ops in `poolformer_kernels.modules`, and so blocks, follow it."""
        choose = backends._choose

        def mlp(*args: Any, **options: Any) -> Any:
            return ops.mlp(*args, **{**options, "save_hidden": self.save_hidden})

        def choose_possible(name: str, call: backends.Call) -> str:
            possible = name == "auto" or backends.BACKENDS[name](call) is None
            return choose(name if possible else self.otherwise or name, call)

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(modules, "mlp", mlp))
            stack.enter_context(mock.patch.object(backends, "_choose", choose_possible))
            stack.enter_context(mock.patch.dict(backends._resolved, clear=True))
            stack.enter_context(use_backend(self.backend))
            yield


PLANS = {
    "torch": Plan("torch"),
    "cuda": Plan("cuda", otherwise="triton"),
    "triton": Plan("triton"),
    "triton, hidden kept": Plan("triton", save_hidden=True),
}

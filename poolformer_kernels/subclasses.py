"""Modules that keep their place and their class's name, and run another forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_ORIGINAL = "_poolformer_original"


def original_class(cls: type[nn.Module]) -> Any:
    """The class that `cls` stands in for, or `cls` itself."""
    return getattr(cls, _ORIGINAL, cls)


def is_changed(module: nn.Module) -> bool:
    """Whether the class of `module` is one of `with_forward`, not one derived from it."""
    return _ORIGINAL in type(module).__dict__


def with_forward(
    cls: type[nn.Module],
    forward: Callable[..., Any],
    rebuild: Callable[[type[nn.Module]], nn.Module],
) -> type[nn.Module]:
    """A subclass of `cls` under its own name. pickle and deepcopy start from `rebuild(cls)`."""

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        return rebuild, (cls,), self.__dict__

    members = {"forward": forward, "__reduce_ex__": reduce_ex, _ORIGINAL: cls}
    members |= {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (cls,), members)

"""Modules that keep their place and their class's name, and run another forward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

_ORIGINAL = "_poolformer_original"


def original_class(cls: type[nn.Module]) -> Any:
    """The class that `cls` stands in for, or `cls` itself."""
    return getattr(cls, _ORIGINAL, cls)


def is_called_directly(module: nn.Module) -> bool:
    """Whether a call of `module` runs its class's forward and no hook: quick, for every forward."""
    attributes = module.__dict__
    return not (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
    )


@functools.cache
def restored_class(cls: Any) -> Any:
    """`cls` with the forward of the class that it, or a base of it, stands in for.

    Only a class that something else (FSDP2) has derived from a changed one is made anew.
    """
    if _ORIGINAL in cls.__dict__:
        return cls.__dict__[_ORIGINAL]
    bases = tuple(map(restored_class, cls.__bases__))
    if bases == cls.__bases__:
        return cls
    return type(cls)(cls.__name__, bases, dict(cls.__dict__))


def is_changed(module: nn.Module) -> bool:
    """Whether the class of `module` is one of `with_forward`, not one derived from it."""
    return _ORIGINAL in type(module).__dict__


def with_forward(
    cls: type[nn.Module],
    forward: Callable[..., Any],
    rebuild: Callable[[type[nn.Module]], nn.Module],
    **methods: Callable[..., Any],
) -> type[nn.Module]:
    """A subclass of `cls` under its own name. pickle and deepcopy start from `rebuild(cls)`."""

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        return rebuild, (cls,), self.__dict__

    members = {"forward": forward, "__reduce_ex__": reduce_ex, _ORIGINAL: cls, **methods}
    members |= {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (cls,), members)

"""What the models return: dicts whose entries are attributes too, as Hugging Face's ModelOutput."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree


class ModelOutput(OrderedDict):
    """The outputs that are not None, in the order of the class's annotations.

    Read as attributes (None where absent), by name, by number or slice, or all at once with
    to_tuple(). Iterating gives the names, as of any dict. Nested containers of torch (DataParallel,
    compile, export) look into it. FSDP2 makes a plain dict of any dict that is no OrderedDict.
    """

    def __init_subclass__(cls) -> None:
        _pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output.keys())),
            lambda values, names: cls(zip(names, values, strict=True)),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def __init__(
        self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), **outputs: Any
    ) -> None:
        given = dict(values, **outputs)
        names = type(self).__annotations__
        if unknown := given.keys() - names.keys():
            raise TypeError(f"{type(self).__name__} has no {', '.join(sorted(unknown))}.")
        super().__init__({name: given[name] for name in names if given.get(name) is not None})

    def __getattr__(self, name: str) -> Any:
        if name in type(self).__annotations__:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in type(self).__annotations__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        if value is None:
            self.pop(name, None)
        else:
            self[name] = value

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The outputs that are not None."""
        return tuple(self.values())


class BaseModelOutput(ModelOutput):
    """last_hidden_state: (B, C4, H / 32, W / 32); hidden_states: one (B, C, H, W) a stage."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None


class ImageClassifierOutput(ModelOutput):
    """loss: (); logits: (B, num_labels); hidden_states: one (B, C, H, W) a stage."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None

"""PoolFormerConfig: fields, defaults and config.json of Hugging Face, without transformers."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...ops._common import ALIASES
from ...reference import ACTIVATIONS
from .checkpoints import CONFIG, find, read_json, write_json
from .variants import VARIANTS, hub_name, variant_name

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


class PoolFormerConfig:
    """The architecture and the task of a PoolFormer; the defaults are S12's.

    `depths`, `hidden_sizes`, `patch_sizes`, `strides` and `padding` hold one number for each of
    `num_encoder_blocks` stages. `patch_size` and `stride` are fields of Hugging Face's that nothing
    uses. `num_labels` is the length of `id2label`: give either, both only where they agree; 2 if
    neither, as in transformers. Fields of a config.json that are not PoolFormer's are kept as
    attributes.

    Raises:
        TypeError: a field of the wrong type, or an unknown field.
        ValueError: a value out of range, an even pool_size, lists of different lengths.

    Source: transformers, models/poolformer/configuration_poolformer.py.
    """

    model_type = "poolformer"

    def __init__(
        self,
        *,
        num_channels: int = 3,
        patch_size: int = 16,
        stride: int = 16,
        pool_size: int = 3,
        mlp_ratio: float = 4.0,
        depths: list[int] | tuple[int, ...] = (2, 2, 6, 2),
        hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 320, 512),
        patch_sizes: list[int] | tuple[int, ...] = (7, 3, 3, 3),
        strides: list[int] | tuple[int, ...] = (4, 2, 2, 2),
        padding: list[int] | tuple[int, ...] = (2, 1, 1, 1),
        num_encoder_blocks: int = 4,
        drop_path_rate: float = 0.0,
        hidden_act: str | Callable[[Tensor], Tensor] = "gelu",
        use_layer_scale: bool = True,
        layer_scale_init_value: float = 1e-5,
        initializer_range: float = 0.02,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        label2id: Mapping[str, int] | None = None,
        problem_type: str | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        dtype: str | torch.dtype | None = None,
        architectures: list[str] | None = None,
    ) -> None:
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.stride = stride
        self.pool_size = pool_size
        self.mlp_ratio = mlp_ratio
        self.depths = depths
        self.hidden_sizes = hidden_sizes
        self.patch_sizes = patch_sizes
        self.strides = strides
        self.padding = padding
        self.num_encoder_blocks = num_encoder_blocks
        self.drop_path_rate = drop_path_rate
        self.hidden_act = hidden_act
        self.use_layer_scale = use_layer_scale
        self.layer_scale_init_value = layer_scale_init_value
        self.initializer_range = initializer_range
        self.problem_type = problem_type
        self.output_hidden_states = output_hidden_states
        self.return_dict = return_dict
        self.dtype = str(dtype).removeprefix("torch.") if dtype is not None else None
        self.architectures = architectures
        self._set_labels(num_labels, id2label, label2id)
        self.validate()

    def _set_labels(
        self,
        num_labels: int | None,
        id2label: Mapping[int, str] | None,
        label2id: Mapping[str, int] | None,
    ) -> None:
        if id2label is None:
            self.id2label: dict[int, str] = {}
            self.num_labels = 2 if num_labels is None else num_labels
        else:
            self.id2label = {int(index): label for index, label in id2label.items()}
            if num_labels not in (None, len(self.id2label)):
                raise ValueError(
                    f"PoolFormerConfig: num_labels is {num_labels}, but id2label names "
                    f"{len(self.id2label)} labels; give one of them, or make them agree."
                )
        if label2id is None:
            label2id = {label: index for index, label in self.id2label.items()}
        self.label2id = {label: int(index) for label, index in label2id.items()}

    @property
    def num_labels(self) -> int:
        """The number of labels. Setting another number names them LABEL_0, LABEL_1, …"""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, num_labels: int) -> None:
        if type(num_labels) is not int or num_labels < 0:
            raise ValueError(
                f"PoolFormerConfig: num_labels is {num_labels!r}; it has to be an int that is not "
                "negative (0: no classifier)."
            )
        if num_labels != len(self.id2label):
            self.id2label = {i: f"LABEL_{i}" for i in range(num_labels)}
            self.label2id = {label: i for i, label in self.id2label.items()}

    @property
    def use_return_dict(self) -> bool:
        """Hugging Face's older name of `return_dict`."""
        return self.return_dict

    def validate(self) -> None:
        """Refuse values that no model can be built from; models call it again."""
        for name in ("depths", "hidden_sizes", "patch_sizes", "strides", "padding"):
            values, least = getattr(self, name), 0 if name in ("padding", "depths") else 1
            if not isinstance(values, (list, tuple)) or any(type(v) is not int for v in values):
                raise TypeError(
                    f"PoolFormerConfig: {name} is {values!r}; it has to be a list of ints, one a "
                    "stage."
                )
            if any(v < least for v in values):
                raise ValueError(
                    f"PoolFormerConfig: {name} is {values!r}; each has to be at least {least}."
                )
            setattr(self, name, list(values))
        for name in ("num_channels", "num_encoder_blocks", "pool_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"PoolFormerConfig: {name} is {value!r}; it has to be a positive int."
                )
        if self.pool_size % 2 == 0:
            raise ValueError(
                f"PoolFormerConfig: pool_size is {self.pool_size}; it has to be odd, because an "
                f"even window changes the image's size. Use {self.pool_size - 1} or "
                f"{self.pool_size + 1}."
            )
        self._validate_lengths()
        self._validate_numbers()
        self._validate_names()

    def _validate_lengths(self) -> None:
        names = ("depths", "hidden_sizes", "patch_sizes", "strides", "padding")
        lengths = {name: len(getattr(self, name)) for name in names}
        if set(lengths.values()) != {self.num_encoder_blocks}:
            listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ValueError(
                f"PoolFormerConfig: num_encoder_blocks is {self.num_encoder_blocks}, and the lists "
                f"have these lengths: {listed}. All have to be equal: one number a stage."
            )

    def _validate_numbers(self) -> None:
        for name, low, high in (
            ("mlp_ratio", 0.0, float("inf")),
            ("drop_path_rate", 0.0, 1.0),
            ("initializer_range", 0.0, float("inf")),
            ("layer_scale_init_value", -float("inf"), float("inf")),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"PoolFormerConfig: {name} is {value!r}; it has to be a number.")
            if not low <= value < high:
                raise ValueError(
                    f"PoolFormerConfig: {name} is {value}; it has to be at least {low} and below "
                    f"{high}."
                )
        if any(int(size * self.mlp_ratio) < 1 for size in self.hidden_sizes):
            raise ValueError(
                f"PoolFormerConfig: mlp_ratio {self.mlp_ratio} times hidden_sizes "
                f"{self.hidden_sizes} has to be at least 1 everywhere."
            )

    def _validate_names(self) -> None:
        known_acts = (*ACTIVATIONS, *ALIASES)
        if isinstance(self.hidden_act, str) and self.hidden_act not in known_acts:
            raise ValueError(
                f"PoolFormerConfig: hidden_act is {self.hidden_act!r}; it has to be one of "
                f"{', '.join(map(repr, known_acts))}, or a callable."
            )
        if not isinstance(self.hidden_act, str) and not callable(self.hidden_act):
            raise TypeError(
                f"PoolFormerConfig: hidden_act is a {type(self.hidden_act).__name__}; it has to be "
                "a name or a callable."
            )
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            raise ValueError(
                f"PoolFormerConfig: problem_type is {self.problem_type!r}; it has to be None or "
                f"one of {', '.join(map(repr, PROBLEM_TYPES))}."
            )
        if self.dtype is not None and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"PoolFormerConfig: dtype is {self.dtype!r}; torch has no such dtype.")

    @classmethod
    def from_variant(cls, name: str, **fields: Any) -> PoolFormerConfig:
        """The config of "s12", "s24", "s36", "m36" or "m48" with 1000 labels (ImageNet).

        Names such as "poolformer_s12" and "sail/poolformer_s12" work too. `fields` override.
        """
        short = variant_name(name)
        if short is None:
            raise ValueError(
                f"PoolFormerConfig: there is no variant {name!r}; there are {', '.join(VARIANTS)}."
            )
        chosen = vars(VARIANTS[short]) | fields
        if "id2label" not in fields:
            chosen.setdefault("num_labels", 1000)
        return cls(**chosen)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as transformers' `PoolFormerConfig(**fields)` takes them.

        Raises:
            TypeError: hidden_act is a callable, which has no name to write down.
        """
        if not isinstance(self.hidden_act, str):
            raise TypeError(
                "PoolFormerConfig: hidden_act is a callable, which cannot be written down; set a "
                f"name: {', '.join(map(repr, (*ACTIVATIONS, *ALIASES)))}."
            )
        return copy.deepcopy(vars(self)) | {"model_type": self.model_type}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], **overrides: Any) -> PoolFormerConfig:
        """The config of a Hugging Face or timm config.json; `overrides` go first.

        Raises:
            ValueError: the config of another model, or values that are refused by the constructor.
        """
        if "model_type" not in fields and "architecture" in fields:
            config = cls.from_variant(
                fields["architecture"], num_labels=fields.get("num_classes", 1000)
            )
            fields = config.to_dict()
        kind = fields.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"PoolFormerConfig: this is the config of a model of type {kind!r}; it has to be "
                f"{cls.model_type!r}."
            )
        fields = {name: value for name, value in fields.items() if name != "model_type"} | overrides
        if "num_labels" in overrides and "id2label" not in overrides:
            if len(fields.get("id2label") or (0, 0)) != overrides["num_labels"]:
                fields |= {"id2label": None, "label2id": None}
            else:
                fields.pop("num_labels")
        if (older := fields.pop("torch_dtype", None)) is not None and fields.get("dtype") is None:
            fields["dtype"] = older
        known = inspect.signature(cls.__init__).parameters
        config = cls(**{name: value for name, value in fields.items() if name in known})
        for name in sorted(fields.keys() - known.keys()):
            if not hasattr(cls, name):
                setattr(config, name, copy.deepcopy(fields[name]))
        return config

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **overrides: Any,
    ) -> PoolFormerConfig:
        """Read a JSON file, or config.json of a folder or hub repository; `overrides` go first.

        Raises:
            FileNotFoundError: no such folder, file or repository, no config.json in it, or an
                offline hub.
            ValueError: a corrupt file, the config of another model, refused values.
        """
        path = Path(source).expanduser()
        if not path.is_file():
            path = find(
                hub_name(source),
                [CONFIG],
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                token=token,
            )
        return cls.from_dict(read_json(path), **overrides)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json, as Hugging Face does, into `folder`, which is made if need be."""
        content = self.to_dict()
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / CONFIG, content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PoolFormerConfig) and vars(self) == vars(other)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({fields})"

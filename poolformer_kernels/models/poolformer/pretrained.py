"""What every model has beside its forward: first values, checkpoints, its size."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ...modules import PoolFormerBlock
from .checkpoints import read_weights, write_weights
from .configuration import PoolFormerConfig
from .keys import detect_format, hint, infer_config, rename
from .variants import hub_name

Model = TypeVar("Model", bound="PoolFormerPreTrainedModel")
_TIMM_HEAD = (
    "This checkpoint was trained in timm, whose head pools before it normalises (LayerNorm, eps "
    "1e-6). This model's head normalises before it pools (GroupNorm, eps 1e-5), so its logits "
    "differ from timm's although all parameters are loaded. Fine-tune the head, use timm's model "
    "with accelerate(), or load the release in the original's or Hugging Face's format."
)


class PoolFormerPreTrainedModel(nn.Module):
    """The base of the models. state_dict() has the names of Hugging Face."""

    left_out: ClassVar[tuple[str, ...]] = ()  # prefixes of other models' heads in a checkpoint
    may_lack: ClassVar[tuple[str, ...]] = ()  # prefixes of what a checkpoint need not have

    def __init__(self, config: PoolFormerConfig) -> None:
        if not isinstance(config, PoolFormerConfig):
            raise TypeError(
                f"{type(self).__name__}: config is a {type(config).__name__}; it has to be a "
                "PoolFormerConfig. PoolFormerConfig.from_dict(config.to_dict()) converts that of "
                "transformers."
            )
        config.validate()
        super().__init__()
        self.config = config

    @torch.no_grad()
    def init_weights(self, module: nn.Module) -> None:
        """First values as Hugging Face's: normal weights, zero biases, norms that do nothing."""
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm) and module.affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, PoolFormerBlock):
            for scale in (module.layer_scale_1, module.layer_scale_2):
                if isinstance(scale, Tensor):
                    nn.init.constant_(scale, self.config.layer_scale_init_value)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters (of the first one)."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters (of the first one)."""
        return next(self.parameters()).device

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the parameters hold."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def get_input_embeddings(self) -> nn.Module:
        """The convolution that reads the image."""
        return self._encoder.patch_embeddings[0]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the convolution that reads the image."""
        self._encoder.patch_embeddings[0] = value

    def gradient_checkpointing_enable(self) -> None:
        """In training, recompute each block in backward instead of keeping what it saved."""
        self._encoder.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep what backward needs, as by default."""
        self._encoder.gradient_checkpointing = False

    @property
    def _encoder(self) -> Any:
        return getattr(self, "poolformer", self).encoder

    @classmethod
    def from_pretrained(
        cls: type[Model],
        source: str | os.PathLike[str],
        *,
        config: PoolFormerConfig | None = None,
        num_labels: int | None = None,
        ignore_mismatched_sizes: bool = False,
        strict: bool = True,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **model_options: Any,
    ) -> Model:
        """A model in eval mode, with the weights of a checkpoint.

        Args:
            source: a folder with config.json and model.safetensors (or pytorch_model.bin, or either
                split into files), a hub repository ("sail/poolformer_s12",
                "timm/poolformer_s12.sail_in1k"), a variant's name ("s12": sail's release), or one
                weights file in the format of Hugging Face, the original or timm, whose architecture
                is then read from the shapes.
            config: instead of the checkpoint's.
            num_labels: another number than the checkpoint's needs ignore_mismatched_sizes.
            ignore_mismatched_sizes: give parameters of another shape than the checkpoint's new
                first values, and say which in a warning.
            strict: False gives missing parameters new first values and leaves unexpected ones out,
                and says which in a warning.
            dtype: None keeps the checkpoint's; else parameters are converted.
            revision, cache_dir, local_files_only, token: for the hub.
            model_options: further arguments of the model's constructor.

        A model without a classifier leaves out the checkpoint's head. Only tensors are read:
        pickled files go through torch.load(weights_only=True).

        Raises:
            FileNotFoundError: no such file, folder or repository, or an offline hub.
            ValueError: a corrupt or truncated file, or parameters that do not fit: all are named.
        """
        hub: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "token": token,
        }
        source = hub_name(source)
        is_file = Path(source).expanduser().is_file()
        if config is None and not is_file:
            config = PoolFormerConfig.from_pretrained(source, **hub)
        state = read_weights(source, **hub)
        layout = detect_format(state)
        state, unknown = rename(state, to="hf", source=layout)
        config = infer_config(state) if config is None else copy.deepcopy(config)
        if num_labels is not None:
            config.num_labels = num_labels
        if layout == "timm" and "norm." not in cls.left_out:
            warnings.warn(_TIMM_HEAD, stacklevel=2)
        with torch.device("meta"):
            model = cls(config, **model_options)
        fit = _Fit(model, state, unknown)
        fit.check(str(source), strict, ignore_mismatched_sizes)
        fit.load(dtype)
        return model.eval()

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, safe_serialization: bool = True
    ) -> None:
        """Write config.json and model.safetensors (or pytorch_model.bin) for us and transformers.

        Each file is written beside its place and then put there, so that no reader sees half of
        one.

        Raises:
            FileExistsError: `folder` is a file, or holds weights that would be loaded instead.
            TypeError: the config holds a callable hidden_act, which has no name to write down.
        """
        folder = Path(folder)
        self.config.architectures = [type(self).__name__]
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        self.config.to_dict()
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder, self.state_dict(), safe_serialization)
        self.config.save_pretrained(folder)


class _Fit:
    """How the parameters of a checkpoint (Hugging Face's names) fit a model on the meta device."""

    def __init__(
        self, model: PoolFormerPreTrainedModel, state: Mapping[str, Tensor], unknown: list[str]
    ) -> None:
        self.model = model
        prefix = "" if hasattr(model, "poolformer") else "poolformer."
        state = {
            key.removeprefix(prefix): tensor
            for key, tensor in state.items()
            if not key.startswith(model.left_out)
        }
        shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        self.loaded = {k: t for k, t in state.items() if shapes.get(k) == t.shape}
        self.fresh = shapes.keys() - self.loaded.keys()
        resized = {k for k in state if k not in self.loaded and k in shapes}
        if "norm.weight" in state:  # a head with a classifier on one side only: another num_labels
            resized |= {k for k in state.keys() ^ shapes.keys() if k.startswith("classifier.")}
        self.resized = [
            f"{key} ({_shape(state.get(key))} there, {_shape(shapes.get(key))} in the model)"
            for key in sorted(resized)
        ]
        lacking = [p for p in model.may_lack if not any(k.startswith(p) for k in state)]
        self.missing = [
            k
            for k in shapes
            if k not in state and k not in resized and not k.startswith(tuple(lacking))
        ]
        self.unexpected = [k for k in state if k not in shapes and k not in resized] + unknown

    def check(self, source: str, strict: bool, ignore_mismatched_sizes: bool) -> None:
        """Raise for what does not fit, warn of what is to be tolerated."""
        found = [
            (self.missing, "missing", strict),
            (self.unexpected, "unexpected", strict),
            (self.resized, "of another shape", not ignore_mismatched_sizes),
        ]
        text = "".join(f"\n  {label}: {', '.join(names)}" for names, label, _ in found if names)
        if not text:
            return
        name = type(self.model).__name__
        if not any(names and refused for names, _, refused in found):
            kept = f"\nNew first values: {', '.join(sorted(self.fresh)) or 'none'}."
            warnings.warn(f"{source} does not fit {name} wholly:{text}{kept}", stacklevel=3)
            return
        cures = ["Pass config= if the architecture is another one."]
        if self.missing or self.unexpected:
            cures.append(
                "strict=False leaves unexpected parameters out and gives missing ones new values."
            )
        if self.resized:
            cures.append("ignore_mismatched_sizes=True gives those of another shape new values.")
        raise ValueError(
            f"{source} does not fit {name} with num_labels {self.model.config.num_labels} (names "
            f"of Hugging Face):{text}\n{' '.join(cures)}{hint(self.unexpected)}"
        )

    def load(self, dtype: torch.dtype | str | None) -> None:
        """Put the model on the CPU with the checkpoint's values, and new ones where it has none."""
        model, dtypes = self.model, {tensor.dtype for tensor in self.loaded.values()}
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, None) or dtype
        if dtype is None and len(dtypes) > 1:
            listed = ", ".join(sorted(map(str, dtypes)))
            raise ValueError(f"The checkpoint mixes {listed}; pass dtype= to have all in one.")
        chosen = dtype or next(iter(dtypes), torch.float32)
        if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
            raise TypeError(
                f"from_pretrained: dtype is {chosen}; it has to be a floating point torch.dtype, "
                "such as torch.float32."
            )
        model.to(chosen).to_empty(device="cpu")
        for name, module in model.named_modules():
            if any(key.rpartition(".")[0] == name for key in self.fresh):
                model.init_weights(module)
        model.load_state_dict(self.loaded, strict=False)
        model.config.dtype = str(chosen).removeprefix("torch.")


def _shape(value: Tensor | torch.Size | None) -> str:
    if value is None:
        return "absent"
    return str(tuple(value.shape if isinstance(value, Tensor) else value))

"""From images to PoolFormer's pixel_values, as Hugging Face's PoolFormerImageProcessor does it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from .checkpoints import find, read_json
from .image_inputs import load_images
from .image_transforms import OPTION_NAMES, Options, in_unit_range, transform, without_defaults
from .variants import hub_name

CONFIG_NAME = "preprocessor_config.json"
# Keys of published configs that are no options: who wrote them, and defaults of the call.
_IGNORED_KEYS = {
    "_processor_class",
    "_valid_processor_keys",
    "data_format",
    "default_to_square",
    "device",
    "disable_grouping",
    "feature_extractor_type",
    "image_processor_type",
    "input_data_format",
    "model_input_names",
    "processor_class",
    "return_tensors",
}


class BatchFeature(dict):
    """A dict whose keys are attributes too: `inputs.pixel_values`, `model(**inputs)`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} here; the keys are {list(self)}") from None

    def to(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Moves the tensors in place as torch.Tensor.to does; a dtype casts only floating ones."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        for key, value in self.items():
            if isinstance(value, torch.Tensor):
                cast = dtype if value.is_floating_point() else None
                self[key] = value.to(device=device, dtype=cast, non_blocking=non_blocking)
        return self


class PoolFormerImageProcessor:
    """Resizes, centre-crops, rescales and normalises images for PoolFormer.

    Options (all may also be given to a single call):
        do_resize: resize, bicubic by default, before cropping.
        size: an int or {"shortest_edge": n} keeps the aspect; {"height": h, "width": w} does not.
        crop_pct: the resize aims at int(size / crop_pct); equal height and width then mean the
            shortest edge, as in Hugging Face's processor. None resizes to `size` itself.
            Released models: 0.9 for s12, s24 and s36; 0.95 for m36 and m48.
        resample: a PIL.Image.Resampling or its number.
        do_center_crop, crop_size: an int or {"height": h, "width": w}; a smaller image is padded
            with zeros (before rescaling and normalising).
        do_rescale, rescale_factor: multiplies by 1/255.
        do_normalize, image_mean, image_std: (x - mean) / std, one number or one per channel.
        do_convert_rgb: None and True make every image RGB (image_inputs.py says how); False keeps
            the image's own channels, and mean and std must fit them.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(
        self,
        do_resize: bool = True,
        size: int | tuple[int, int] | Mapping[str, int] | None = None,
        crop_pct: float | None = 0.9,
        resample: int = Image.Resampling.BICUBIC,
        do_center_crop: bool = True,
        crop_size: int | tuple[int, int] | Mapping[str, int] | None = None,
        rescale_factor: float = 1 / 255,
        do_rescale: bool = True,
        do_normalize: bool = True,
        image_mean: float | list[float] | None = None,
        image_std: float | list[float] | None = None,
        do_convert_rgb: bool | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in OPTION_NAMES}
        self.__dict__.update(asdict(Options(**without_defaults(given))))

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: Any,
        *,
        return_tensors: str | None = None,
        data_format: str = "channels_first",
        input_data_format: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """pixel_values of `images`, one (C, crop height, crop width) float32 image each.

        images: a PIL image, numpy array or CPU tensor ((H, W), (H, W, C), (C, H, W), or a 4-D batch
            of the latter two), encoded bytes, a file's path, or a list of them, nested or not.
            Floating arrays hold 0..255 in whole numbers or [0, 1]; the latter need
            do_rescale=False, and a warning says so.
        return_tensors: "pt" or "np" stacks the batch to (B, C, H, W); None gives a list of arrays.
        data_format: "channels_first", or "channels_last" for (H, W, C).
        input_data_format: the same, or "none", for arrays whose layout cannot be told.
        options: overrides of the processor's own; None means the processor's own value, except
            crop_pct=None.

        pixel_values are uint8 where neither rescaling nor normalising applies to an 8-bit image.
        Raises TypeError for what is no image or no option, ValueError for what cannot be used.
        """
        if unknown := set(options) - OPTION_NAMES:
            raise TypeError(f"unknown options {sorted(unknown)}; known: {sorted(OPTION_NAMES)}")
        layout = getattr(data_format, "value", data_format)
        if layout not in ("channels_first", "channels_last"):
            raise ValueError(
                f'data_format is {data_format!r}; pass "channels_first" or "channels_last"'
            )
        return_tensors = getattr(return_tensors, "value", return_tensors)
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f'return_tensors is {return_tensors!r}; pass "pt", "np" or None')
        chosen = Options(**{**self._options(), **without_defaults(options)})
        arrays = load_images(images, input_data_format, chosen.do_convert_rgb is not False)
        if chosen.do_rescale and any(map(in_unit_range, arrays)):
            warnings.warn(
                "a floating image has values in [0, 1] and is rescaled once more; "
                "pass do_rescale=False for images that are scaled already",
                stacklevel=3,
            )
        pixel_values = [transform(array, chosen, layout) for array in arrays]
        if return_tensors is None:
            return BatchFeature(pixel_values=pixel_values)
        shapes = sorted({pixels.shape for pixels in pixel_values})
        if len(shapes) > 1:
            raise ValueError(
                f"the processed images have {len(shapes)} different shapes, {shapes[0]} and "
                f"{shapes[1]} among them, and cannot be stacked; use do_center_crop=True (and "
                "images of equal channels), or return_tensors=None"
            )
        stacked = np.stack(pixel_values)
        return BatchFeature(
            pixel_values=torch.from_numpy(stacked) if return_tensors == "pt" else stacked
        )

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in OPTION_NAMES}

    def to_dict(self) -> dict[str, Any]:
        """The options as they stand in preprocessor_config.json."""
        options = asdict(Options(**self._options()))
        if options["do_convert_rgb"] is None:
            del options["do_convert_rgb"]
        return {**options, "image_processor_type": "PoolFormerImageProcessor"}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], **options: Any) -> PoolFormerImageProcessor:
        """From a config of this library or of transformers, old feature extractors included."""
        config = dict(config)
        if (both := config.pop("do_resize_and_center_crop", None)) is not None:
            config = {"do_resize": both, "do_center_crop": both, **config}
            config.setdefault("crop_size", config.get("size"))
        unknown = set(config) - OPTION_NAMES - _IGNORED_KEYS
        if any(config[key] is not None for key in unknown):
            warnings.warn(
                f"{CONFIG_NAME} has keys without meaning here: {sorted(unknown)}", stacklevel=3
            )
        config = {key: value for key, value in config.items() if key in OPTION_NAMES}
        return cls(**{**without_defaults(config), **options})

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **options: Any,
    ) -> PoolFormerImageProcessor:
        """Reads preprocessor_config.json from a folder, a file, or a repository of the hub.

        Args:
            name_or_path: a folder, the file itself, a hub repository ("sail/poolformer_s12") or a
                variant's name ("s12": sail's release).
            revision, cache_dir, local_files_only, token: for the hub.
            options: override the file's.

        Raises:
            FileNotFoundError: no such file, folder or repository, or an offline hub.
            ValueError: a file that is no valid config.
        """
        source = hub_name(name_or_path)
        path = Path(source).expanduser()
        if not path.is_file():
            path = find(
                source,
                [CONFIG_NAME],
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                token=token,
            )
        return cls.from_dict(read_json(path), **options)

    def save_pretrained(self, folder: str | os.PathLike) -> list[str]:
        """Writes `folder`/preprocessor_config.json, as transformers reads it; returns its path."""
        path = Path(folder)
        if path.is_file():
            raise ValueError(f"{str(folder)!r} is a file; pass a folder")
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG_NAME).write_text(self.to_json_string(), encoding="utf-8")
        return [str(path / CONFIG_NAME)]


class PoolFormerFeatureExtractor(PoolFormerImageProcessor):
    """The older name of PoolFormerImageProcessor."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        warnings.warn(
            "PoolFormerFeatureExtractor is deprecated; use PoolFormerImageProcessor",
            FutureWarning,
            stacklevel=2,
        )
        super().__init__(*args, **kwargs)

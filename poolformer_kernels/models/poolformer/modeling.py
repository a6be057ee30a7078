"""PoolFormer: encoder, classifier and backbone, with the parameter names of Hugging Face."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...embeddings import PatchEmbed
from ...modules import GroupNorm, PoolFormerBlock
from ...ops._common import is_autocast
from ...stages import links
from .configuration import PoolFormerConfig
from .losses import classification_loss
from .outputs import BaseModelOutput, ImageClassifierOutput
from .pretrained import PoolFormerPreTrainedModel


class PoolFormerEmbeddings(nn.Module):
    """The convolution that begins a stage. (B, C_in, H, W) → (B, C, H / stride, W / stride)."""

    def __init__(
        self, in_channels: int, channels: int, kernel_size: int, stride: int, padding: int
    ) -> None:
        super().__init__()
        self.projection = PatchEmbed(in_channels, channels, kernel_size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x)


class PoolFormerEncoder(nn.Module):
    """Stages of a convolution and blocks. (B, num_channels, H, W) → one (B, C, H, W) a stage."""

    def __init__(self, config: PoolFormerConfig) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        sizes = config.hidden_sizes
        inputs = [config.num_channels, *sizes[:-1]]
        self.patch_embeddings = nn.ModuleList(
            PoolFormerEmbeddings(*arguments)
            for arguments in zip(
                inputs, sizes, config.patch_sizes, config.strides, config.padding, strict=True
            )
        )
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        self.block = nn.ModuleList(
            nn.ModuleList(
                PoolFormerBlock(
                    size,
                    int(size * config.mlp_ratio),
                    pool_size=config.pool_size,
                    hidden_act=config.hidden_act,
                    drop_path=rates.pop(0),
                    use_layer_scale=config.use_layer_scale,
                    layer_scale_init_value=config.layer_scale_init_value,
                )
                for _ in range(depth)
            )
            for size, depth in zip(sizes, config.depths, strict=True)
        )
        self.smallest = 1
        for kernel, stride, padding in reversed(
            list(zip(config.patch_sizes, config.strides, config.padding, strict=True))
        ):
            self.smallest = max(1, (self.smallest - 1) * stride + kernel - 2 * padding)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        stages: list[Tensor] = []
        for embedding, blocks in zip(self.patch_embeddings, self.block, strict=True):
            x = self._run_blocks(cast(nn.ModuleList, blocks), embedding(x))
            stages.append(x)
        return tuple(stages)

    def _run_blocks(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            for block in blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x
        for part in links(blocks):
            x = part(x)
        return x


class PoolFormerModel(PoolFormerPreTrainedModel):
    """The encoder without a head; the last stage is returned as it is, without a norm.

    Source: transformers, models/poolformer/modeling_poolformer.py.
    """

    left_out = ("norm.", "classifier.", "out_norms.")

    def __init__(self, config: PoolFormerConfig) -> None:
        super().__init__(config)
        self.encoder = PoolFormerEncoder(config)
        self.apply(self.init_weights)

    def forward_features(self, pixel_values: Tensor | None) -> tuple[Tensor, ...]:
        """What every stage returns, the first one first: the input of a feature pyramid.

        pixel_values: (B, num_channels, H, W) → (B, C_i, H / s_i, W / s_i) with s = 4, 8, 16, 32.
        """
        return self.encoder(self._checked(pixel_values))

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple:
        """
        Args:
            pixel_values: (B, num_channels, H, W), floating point, in the model's dtype.
            output_hidden_states: also return what every stage returns; None: as the config says.
            return_dict: False returns (last_hidden_state, None[, hidden_states]).

        Raises:
            ValueError: pixel_values are missing, have a wrong shape or are too small.
            TypeError: pixel_values are no tensor, or of another dtype than the model.
        """
        stages = self.forward_features(pixel_values)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = stages if output_hidden_states else None
        if self.config.return_dict if return_dict is None else return_dict:
            return BaseModelOutput(last_hidden_state=stages[-1], hidden_states=hidden_states)
        return (stages[-1], None) if hidden_states is None else (stages[-1], None, hidden_states)

    def _checked(self, pixel_values: Tensor | None) -> Tensor:
        """`pixel_values` itself, if it is a batch of images that fits the model."""
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values: (B, num_channels, H, W).")
        if not isinstance(pixel_values, Tensor):
            raise TypeError(
                f"pixel_values is a {type(pixel_values).__name__}; it has to be a torch.Tensor, as "
                'PoolFormerImageProcessor returns with return_tensors="pt".'
            )
        channels, smallest = self.config.num_channels, self.encoder.smallest
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != channels:
            raise ValueError(
                f"pixel_values has shape {shape}; it has to be (B, {channels}, H, W). Add the "
                "batch dimension with unsqueeze(0), or put the channels second with permute(0, 3, "
                "1, 2)."
            )
        if shape[2] < smallest or shape[3] < smallest:
            raise ValueError(
                f"pixel_values has shape {shape}; H and W have to be at least {smallest}, or a "
                "stage is left without a pixel. Enlarge the images."
            )
        weight = next(self.parameters(), pixel_values)  # DataParallel's replicas have none
        if not pixel_values.is_floating_point():
            raise TypeError(
                f"pixel_values is {pixel_values.dtype}; it has to be floating point. Preprocess "
                "images with PoolFormerImageProcessor, which scales and normalises them."
            )
        if pixel_values.device != weight.device:
            raise ValueError(
                f"pixel_values is on {pixel_values.device} and the model on {weight.device}; move "
                "one of them with .to(device)."
            )
        if pixel_values.dtype != weight.dtype and not is_autocast(pixel_values):
            raise TypeError(
                f"pixel_values is {pixel_values.dtype} and the model {weight.dtype}; nothing is "
                "cast silently. Use pixel_values.to(model.dtype), or torch.autocast."
            )
        return pixel_values


class PoolFormerForImageClassification(PoolFormerPreTrainedModel):
    """logits = classifier(mean over H and W of norm(last stage)); num_labels 0: no classifier.

    Source: transformers, models/poolformer/modeling_poolformer.py.
    """

    def __init__(self, config: PoolFormerConfig) -> None:
        super().__init__(config)
        self.poolformer = PoolFormerModel(config)
        self.norm = GroupNorm(1, config.hidden_sizes[-1])
        self.reset_classifier(config.num_labels)

    def reset_classifier(self, num_labels: int) -> None:
        """Put a new classifier in place; 0: none. Another number of labels is named LABEL_0, …"""
        weight = self.norm.weight
        self.config.num_labels = num_labels
        self.classifier: nn.Module = nn.Identity()
        if num_labels > 0:
            size = self.config.hidden_sizes[-1]
            self.classifier = nn.Linear(size, num_labels, device=weight.device, dtype=weight.dtype)
            self.init_weights(self.classifier)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple:
        """
        Args:
            pixel_values: (B, num_channels, H, W), floating point, in the model's dtype.
            labels: for a loss: class indices (B), int; or targets (B, num_labels), float, of a
                regression or multi-label classification. config.problem_type says which; None
                infers it.
            output_hidden_states: also return what every stage returns; None: as the config says.
            return_dict: False returns ([loss, ]logits[, hidden_states]).

        Raises:
            ValueError, TypeError: as PoolFormerModel, and for labels that do not fit.
        """
        if return_dict is None:
            return_dict = self.config.return_dict
        outputs = self.poolformer(pixel_values, output_hidden_states, return_dict=True)
        logits = self.classifier(self.norm(outputs.last_hidden_state).mean((-2, -1)))
        loss = None if labels is None else classification_loss(logits, labels, self.config)
        result = ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states
        )
        return result if return_dict else result.to_tuple()


class PoolFormerBackbone(PoolFormerPreTrainedModel):
    """Normalised maps of chosen stages, for detection and segmentation (the original's fork_feat).

    Attributes:
        out_indices: the stages, 0 to 3; from the constructor, the config, or all of them.
        channels, strides: of each map.
        out_norms: a GroupNorm each; "norm0", "norm2", "norm4", "norm6" in the original. A
            checkpoint of a classifier has none of them: they then start as the identity on
            normalised features.

    Source: sail-sg/poolformer, models/poolformer.py with fork_feat=True.
    """

    left_out = ("norm.", "classifier.")
    may_lack = ("out_norms.",)

    def __init__(self, config: PoolFormerConfig, out_indices: Sequence[int] | None = None) -> None:
        super().__init__(config)
        stages = range(config.num_encoder_blocks)
        if out_indices is None:
            out_indices = getattr(config, "out_indices", stages)
        if list(out_indices) != sorted(set(out_indices) & set(stages)) or not out_indices:
            raise ValueError(
                f"PoolFormerBackbone: out_indices is {out_indices!r}; it has to be one or more of "
                f"{list(stages)}, in ascending order."
            )
        self.out_indices = tuple(out_indices)
        vars(config)["out_indices"] = list(out_indices)
        self.channels = tuple(config.hidden_sizes[i] for i in out_indices)
        self.strides = tuple(math.prod(config.strides[: i + 1]) for i in out_indices)
        self.poolformer = PoolFormerModel(config)
        self.out_norms = nn.ModuleDict(
            {str(i): GroupNorm(1, config.hidden_sizes[i]) for i in out_indices}
        )

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """(B, num_channels, H, W) → maps (B, channels[i], H / strides[i], W / strides[i])."""
        stages = self.poolformer.forward_features(pixel_values)
        return tuple(self.out_norms[str(i)](stages[i]) for i in self.out_indices)

"""What a PoolFormer block looks like in each library: its parts, and what it drops in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .drop_path import branch_dtypes
from .fused import Halves, Product, block_call, fused_block
from .ops.blocks import BlockCall
from .reference import accumulate_dtype
from .subclasses import original_class

Factors = tuple[Tensor | None, Tensor | None, Tensor | None]


class Parts(NamedTuple):
    """What the fused ops need of a block, and the inner modules that they would not call."""

    norm1: nn.GroupNorm
    norm2: nn.GroupNorm
    pool: nn.AvgPool2d
    fc1: nn.Conv2d
    fc2: nn.Conv2d
    act: Any
    layer_scale_1: Tensor | None
    layer_scale_2: Tensor | None
    drop_paths: tuple[nn.Module, ...]
    dropouts: tuple[nn.Module, ...]
    containers: tuple[nn.Module, ...]
    scales: tuple[nn.Module, ...] = ()
    residual_scales: tuple[Tensor | None, Tensor | None] = (None, None)

    def inner(self) -> tuple[nn.Module, ...]:
        """Every module inside the block whose call the fused ops replace."""
        act: tuple[nn.Module, ...] = ()
        if isinstance(self.act, nn.Module):
            act = (self.act, *self.act._modules.values())  # type: ignore[arg-type]
        stock = (self.norm1, self.norm2, self.pool, self.fc1, self.fc2)
        return *stock, *act, *self.drop_paths, *self.dropouts, *self.containers, *self.scales


@dataclass(frozen=True)
class Family:
    """How one library's blocks are recognised and taken apart, and which factors they draw."""

    name: str
    block: str  # the class's name
    library: str  # the module path that it starts with, "" for any
    parts: Callable[[Any], Parts]
    factors: Callable[[Any, Tensor], Factors]
    returns_tuple: bool = False

    def base(self, cls: type[nn.Module]) -> type[nn.Module] | None:
        """The library's own class among `cls` and its bases."""
        for base in original_class(cls).__mro__:
            if base.__name__ == self.block and base.__module__.startswith(self.library):
                return base
        return None


def _draw(drop_path: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The factors (B) that the block's own drop-path module would apply to a branch in `dtype`.

    It is asked with ones in that dtype, so that it draws the random numbers that it always does.
    """
    rate = getattr(drop_path, "drop_prob", None)
    if not rate or not drop_path.training:
        return None
    factor = drop_path(x.new_ones((x.shape[0], 1, 1, 1), dtype=dtype)).view(-1)
    if dtype in (torch.bfloat16, torch.float16) and getattr(drop_path, "scale_by_keep", True):
        return factor.ne(0).float() / (1 - rate)  # 1 / keep without the rounding of `dtype`
    return factor if dtype == torch.float64 else factor.float()


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b


def _hugging_face_parts(block: Any) -> Parts:
    output, scaled = block.output, block.use_layer_scale
    return Parts(
        block.before_norm,
        block.after_norm,
        block.pooling.pool,
        output.conv1,
        output.conv2,
        output.act_fn,
        block.layer_scale_1 if scaled else None,
        block.layer_scale_2 if scaled else None,
        (block.drop_path, output.drop),
        (),
        (block.pooling, output),
    )


def _hugging_face_factors(block: Any, x: Tensor) -> Factors:
    scaled = block.use_layer_scale
    mixer, lower = branch_dtypes(x, block.layer_scale_1 if scaled else None)
    branch = torch.promote_types(lower, block.layer_scale_2.dtype) if scaled else lower
    k1 = _draw(block.drop_path, x, mixer)
    after_act = _draw(block.output.drop, x, lower)
    after_conv2 = _draw(block.output.drop, x, lower)
    return k1, after_act, _product(after_conv2, _draw(block.drop_path, x, branch))


def _timm_parts(block: Any) -> Parts:
    mlp = block.mlp
    scales = (block.layer_scale1, block.layer_scale2, block.res_scale1, block.res_scale2)
    vectors = [getattr(scale, "scale", None) for scale in scales]
    return Parts(
        block.norm1,
        block.norm2,
        getattr(block.token_mixer, "pool", block.token_mixer),
        mlp.fc1,
        mlp.fc2,
        mlp.act,
        vectors[0],
        vectors[1],
        (block.drop_path1, block.drop_path2),
        (mlp.drop1, mlp.drop2, mlp.norm),
        (block.token_mixer, mlp),
        scales,
        (vectors[2], vectors[3]),
    )


def _timm_factors(block: Any, x: Tensor) -> Factors:
    mixer, lower = branch_dtypes(x, None)
    return _draw(block.drop_path1, x, mixer), None, _draw(block.drop_path2, x, lower)


def _original_parts(block: Any) -> Parts:
    mlp, scaled = block.mlp, block.use_layer_scale
    return Parts(
        block.norm1,
        block.norm2,
        getattr(block.token_mixer, "pool", block.token_mixer),
        mlp.fc1,
        mlp.fc2,
        mlp.act,
        block.layer_scale_1 if scaled else None,
        block.layer_scale_2 if scaled else None,
        (block.drop_path,),
        (mlp.drop,),
        (block.token_mixer, mlp),
    )


def _original_factors(block: Any, x: Tensor) -> Factors:
    scaled = block.use_layer_scale
    mixer, lower = branch_dtypes(x, block.layer_scale_1 if scaled else None)
    branch = torch.promote_types(lower, block.layer_scale_2.dtype) if scaled else lower
    return _draw(block.drop_path, x, mixer), None, _draw(block.drop_path, x, branch)


FAMILIES = (
    Family(
        "transformers",
        "PoolFormerLayer",
        "transformers.",
        _hugging_face_parts,
        _hugging_face_factors,
        returns_tuple=True,
    ),
    Family("timm", "MetaFormerBlock", "timm.", _timm_parts, _timm_factors),
    Family("original", "PoolFormerBlock", "", _original_parts, _original_factors),
)


def family_of(module: nn.Module) -> Family | None:
    """The library that `module` is a PoolFormer block of; None for any other module."""
    for family in FAMILIES:
        if family.base(type(module)) is not None:
            mixer = getattr(module, "token_mixer", None)
            return family if mixer is None or hasattr(mixer, "pool") else None
    return None


_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_pytorch_tanh",
    "PytorchGELUTanh": "gelu_pytorch_tanh",
    "GELUTanh": "gelu_pytorch_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
    "SquaredReLU": "relu2",
    "StarReLU": "relu2",  # its scalars go into the product behind it
    "SiLU": "silu",
    "SiLUActivation": "silu",
}


def activation_name(act: Any) -> str | None:
    """The kernels' name of an activation of torch, timm or transformers; None if it has none."""
    cls = type(act)
    if cls.__module__.split(".")[0] not in ("torch", "timm", "transformers"):
        return None
    if cls.__name__ == "GELU":
        return "gelu_pytorch_tanh" if getattr(act, "approximate", "none") == "tanh" else "gelu"
    if type(getattr(act, "relu", None)) not in (nn.ReLU, type(None)):
        return None
    return _ACTIVATIONS.get(cls.__name__)


def second_product(parts: Parts) -> nn.Conv2d | Product:
    """fc2 as it follows the kernels' activation.

    After timm's StarReLU, s·relu(h)² + b, it takes both scalars: W2' = s·W2 and b2' = b2 + b·W2·1,
    so that autograd gives their gradients. Both are computed in float32 (float64) and rounded once.
    """
    fc2, act = parts.fc2, parts.act
    if type(act).__name__ != "StarReLU":
        return fc2
    dtype, acc = fc2.weight.dtype, accumulate_dtype(fc2.weight.dtype)
    weight = fc2.weight.to(acc)
    bias = act.bias.to(acc) * weight.sum((1, 2, 3))
    if fc2.bias is not None:
        bias = bias + fc2.bias
    return Product((act.scale.to(acc) * weight).to(dtype), bias.to(dtype))


def pool_size(pool: nn.AvgPool2d) -> int:
    """The edge of a square window; 0 if it is not square."""
    sizes = {pool.kernel_size} if isinstance(pool.kernel_size, int) else {*pool.kernel_size}
    return sizes.pop() if len(sizes) == 1 else 0


def halves(parts: Parts) -> Halves:
    """What the fused ops compute with."""
    return Halves(
        parts.norm1,
        parts.norm2,
        parts.fc1,
        second_product(parts),
        parts.layer_scale_1,
        parts.layer_scale_2,
        pool_size(parts.pool),
        activation_name(parts.act) or parts.act,
    )


def run_fused(
    family: Family,
    block: Any,
    parts: Parts,
    x: Tensor,
    *,
    save_hidden: bool | None = None,
    residual_in_fp32: bool = True,
    backend: str | None = None,
    stats: Tensor | None = None,
    return_stats: bool = False,
) -> Any:
    """What the forward of `block` returns, on the fused ops.

    With return_stats: (result, its statistics, or None where they are not known).
    """
    result = fused_block(
        x,
        halves(parts),
        family.factors(block, x) if block.training else (None, None, None),
        parts.residual_scales,
        save_hidden=save_hidden,
        residual_in_fp32=residual_in_fp32,
        backend=backend,
        stats=stats,
        return_stats=return_stats,
    )
    return (result,) if family.returns_tuple and not return_stats else result


def call_in_chain(
    family: Family, block: Any, parts: Parts, backend: str | None
) -> BlockCall | None:
    """What `stages` may run in place of the forward of `block` where there are no gradients."""
    if block.training or parts.residual_scales != (None, None):
        return None
    return block_call(halves(parts), backend=backend, returns_tuple=family.returns_tuple)

"""What a PoolFormer block looks like in each library: its parts, and what it drops in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .drop_path import branch_dtypes
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

    def inner(self) -> tuple[nn.Module, ...]:
        """Every module inside the block whose call the fused ops replace."""
        act = (self.act,) if isinstance(self.act, nn.Module) else ()
        stock = (self.norm1, self.norm2, self.pool, self.fc1, self.fc2)
        return *stock, *act, *self.drop_paths, *self.dropouts, *self.containers


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
    identities = (block.res_scale1, block.res_scale2, mlp.norm)
    return Parts(
        block.norm1,
        block.norm2,
        getattr(block.token_mixer, "pool", block.token_mixer),
        mlp.fc1,
        mlp.fc2,
        mlp.act,
        getattr(block.layer_scale1, "scale", None),
        getattr(block.layer_scale2, "scale", None),
        (block.drop_path1, block.drop_path2),
        (mlp.drop1, mlp.drop2, *identities),
        (block.token_mixer, mlp, block.layer_scale1, block.layer_scale2),
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
    return _ACTIVATIONS.get(cls.__name__)


def why_not(family: Family, block: nn.Module, parts: Parts) -> str | None:
    """Why `block` has to run its own forward; None if the fused ops compute the same."""
    cls = type(block)
    base = family.base(cls)
    own_forward = original_class(cls).forward
    if "forward" in block.__dict__:
        return "its forward has been replaced on the instance"
    if base is not None and own_forward is not base.forward:
        return f"{cls.__name__} overrides the forward of {base.__name__}"
    for module in parts.inner():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"there is a forward hook on its {_name(block, module)}"
        if module._backward_hooks or module._backward_pre_hooks:
            return f"there is a backward hook on its {_name(block, module)}"
        if "forward" in module.__dict__:
            return f"the forward of its {_name(block, module)} has been replaced on the instance"
    if activation_name(parts.act) is None:
        return f"there is no kernel for its activation {type(parts.act).__name__}"
    return (
        _why_not_norm(block, parts.norm1)
        or _why_not_norm(block, parts.norm2)
        or _why_not_pool(parts.pool)
        or _why_not_product(block, parts.fc1)
        or _why_not_product(block, parts.fc2)
        or _why_not_dropped(block, parts)
    )


def unchanged(parts: Parts, types: tuple[type, ...]) -> bool:
    """Whether the inner modules are still of these types and unhooked: quick, for every forward."""
    modules = parts.inner()
    if tuple(map(type, modules)) != types:
        return False
    for module in modules:
        attributes = module.__dict__
        if (
            attributes["_forward_hooks"]
            or attributes["_forward_pre_hooks"]
            or attributes["_backward_hooks"]
            or attributes["_backward_pre_hooks"]
            or "forward" in attributes
        ):
            return False
    return True


def _name(block: nn.Module, module: nn.Module) -> str:
    return next((n for n, m in block.named_modules() if m is module), type(module).__name__)


def _why_not_norm(block: nn.Module, norm: nn.Module) -> str | None:
    cls = type(norm)
    stock = isinstance(norm, nn.GroupNorm) and (
        cls.forward is nn.GroupNorm.forward or cls.__module__.startswith("timm.")
    )
    return None if stock else f"its {_name(block, norm)} is a {cls.__name__}, not a GroupNorm"


def _why_not_pool(pool: nn.Module) -> str | None:
    if type(pool) is not nn.AvgPool2d:
        return f"its pooling is a {type(pool).__name__}, not an AvgPool2d"
    size = pool_size(pool)
    if size % 2 == 0:
        return f"its pool size is {pool.kernel_size}, and kernels take odd squares"
    expected = (1, size // 2, False, False, None)
    found = (
        pool.stride,
        pool.padding,
        pool.ceil_mode,
        pool.count_include_pad,
        pool.divisor_override,
    )
    if tuple(v[0] if isinstance(v, tuple) and len({*v}) == 1 else v for v in found) != expected:
        return f"its pooling is {pool}, not stride 1 with padding {size // 2} that is not counted"
    return None


def pool_size(pool: nn.AvgPool2d) -> int:
    """The edge of a square window; 0 if it is not square."""
    sizes = {pool.kernel_size} if isinstance(pool.kernel_size, int) else {*pool.kernel_size}
    return sizes.pop() if len(sizes) == 1 else 0


def _why_not_product(block: nn.Module, fc: nn.Module) -> str | None:
    if type(fc) is not nn.Conv2d:
        kind = f"{type(fc).__module__}.{type(fc).__qualname__}"
        return f"its {_name(block, fc)} is a {kind}, not a torch.nn.Conv2d"
    plain = fc.kernel_size == fc.stride == fc.dilation == (1, 1) and fc.groups == 1
    if not plain or fc.padding not in ((0, 0), "valid", "same"):
        return f"its {_name(block, fc)} is {fc}, not a plain 1×1 convolution"
    weight = type(fc.weight)
    if weight.__module__.split(".")[0] != "torch" or not fc.weight.is_floating_point():
        return f"the weight of its {_name(block, fc)} is a {weight.__name__} of {fc.weight.dtype}"
    return None


def _why_not_dropped(block: nn.Module, parts: Parts) -> str | None:
    for module in parts.drop_paths:
        if type(module) is not nn.Identity and not hasattr(module, "drop_prob"):
            return f"its {_name(block, module)} is a {type(module).__name__}, not a DropPath"
    for module in parts.dropouts:
        if isinstance(module, nn.Dropout) and module.p == 0:
            continue
        if type(module) is not nn.Identity:
            return f"its {_name(block, module)} is a {module}, which the fused op leaves out"
    return None

"""What keeps a block from the fused ops: whatever would make them compute something else."""

from __future__ import annotations

from torch import nn

from .blocks import Family, Parts, activation_name, pool_size
from .subclasses import is_called_directly, original_class


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
        or _why_not_scales(block, parts)
    )


def unchanged(parts: Parts, types: tuple[type, ...]) -> bool:
    """Whether the inner modules are still of these types and unhooked: quick, for every forward."""
    modules = parts.inner()
    return tuple(map(type, modules)) == types and all(map(is_called_directly, modules))


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


def _why_not_scales(block: nn.Module, parts: Parts) -> str | None:
    for module in parts.scales:
        cls = type(module)
        stock = cls.__name__ == "Scale" and cls.__module__.startswith("timm.")
        if cls is not nn.Identity and not stock:
            return f"its {_name(block, module)} is a {cls.__name__}, not a Scale"
    return None

"""What Triton makes of the launches of this package, for GPUs that need not be there.

`recorded()` notes launches in place of making them, so launchers run on meta tensors;
`compiled()` compiles one of them for a target and tells registers, spills and shared memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

# (target, bytes of shared memory a block may have)
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """A launch: the kernel, its grid, and what its specialisation depends on."""

    kernel: JITFunction
    grid: tuple[int, ...]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible_by_16: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def compiles_as(self) -> tuple[Any, ...]:
        """Equal for two launches that run the same machine code."""
        return (
            self.name, self.signature, self.constants, self.divisible_by_16, self.options
        )  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """assembly: PTX or AMDGCN. ttir: Triton's own. stack: bytes of a thread, spills among them."""

    name: str
    registers: int
    stack: int
    shared: int
    assembly: str
    ttir: str


def _launch(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """The specialisation that Triton's own launch makes: 1 is a constant, 16-divisible is noted."""
    grid = kwargs.pop("grid")
    kwargs.pop("warmup")
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: kwargs.pop(name) for name in kernel.arg_names if name in kwargs}
    signature, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif specialise and value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialise and value % 16 == 0:
                divisible.append(name)
    grid = grid(values) if callable(grid) else grid
    return Launch(
        kernel,
        tuple(grid),
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(divisible),
        tuple(sorted(kwargs.items())),
    )


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches made inside the `with`, none of which happens."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        launches.append(_launch(self, args, kwargs))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of the one kernel of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def compiled(launch: Launch, target: str) -> Compiled:
    """The machine code of `launch` on one of TARGETS."""
    names = [name for name, _ in launch.signature]
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs={(names.index(name),): value for name, value in launch.constants},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible_by_16},
    )
    kernel = triton.compile(source, target=TARGETS[target][0], options=dict(launch.options))
    if target.startswith("sm_"):
        registers, stack = _resources(kernel.asm["cubin"])
        assembly = kernel.asm["ptx"]
    else:
        assembly = kernel.asm["amdgcn"]

        def number(key: str) -> int:
            found = re.search(rf"\.{key}:\s+(\d+)", assembly)
            assert found, key
            return int(found.group(1))

        registers, stack = number("vgpr_count"), number("private_segment_fixed_size")
    return Compiled(
        launch.name, registers, stack, kernel.metadata.shared, assembly, kernel.asm["ttir"]
    )


def assert_fits(launch: Launch, target: str) -> Compiled:
    """Nothing spilled, and shared memory within what a block may have."""
    code = compiled(launch, target)
    assert code.stack == 0, f"{code.name} on {target}: {code.stack} bytes of a thread are spilled"
    limit = TARGETS[target][1]
    assert code.shared <= limit, f"{code.name} on {target}: {code.shared} of {limit} shared bytes"
    return code


def offsets_of(code: Compiled, tensors: tuple[str, ...]) -> set[str]:
    """The integer types that are added to these arguments of a kernel."""
    pattern = rf"tt\.addptr %({'|'.join(tensors)})(?:_\w+)?, .*, (?:tensor<[\dx]*)?(i\d+)>?"
    return {found.group(2) for found in re.finditer(pattern, code.ttir)}

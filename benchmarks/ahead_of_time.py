"""What Triton makes of the launches of this package, for GPUs that need not be there.

`recorded()` notes launches in place of making them, so launchers run on meta tensors;
`compiled()` compiles one of them for a target and tells what its machine code needs.
"""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import tempfile
import tokenize
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

from . import targets

TARGETS = {name: targets.TARGETS[name] for name in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
MATRIX = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "v_mfma", "v_smfmac")


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
        return f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__}"

    @property
    def compiles_as(self) -> tuple[Any, ...]:
        """Equal for two launches that run the same machine code."""
        return (
            self.name, self.signature, self.constants, self.divisible_by_16, self.options
        )  # fmt: skip

    @property
    def warps(self) -> int:
        return dict(self.options).get("num_warps", 4)


@dataclass(frozen=True)
class Compiled:
    """assembly: PTX or AMDGCN. ttir: Triton's own. stack: bytes of a thread, spills among them.

    load_bytes, store_bytes: the widest access of a thread to global memory. matrix: the matrix
    instruction that is used, or "". occupancy: 0 to 1.
    """

    name: str
    registers: int
    stack: int
    shared: int
    occupancy: float
    matrix: str
    load_bytes: int
    store_bytes: int
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


def _words(source: str) -> list[str]:
    """The tokens of Python code, without comments, docstrings and layout."""
    words: list[str] = []
    begins, in_docstring = True, False
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in skipped:
            continue
        in_docstring = token.type == tokenize.STRING if begins else in_docstring
        begins = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        if not in_docstring:
            words.append(tokenize.tok_name[token.type] if begins else token.string)
    return words


def source_digest(kernel: JITFunction) -> str:
    """What a kernel and everything that it calls say; comments and places do not count.

    Triton's own cache_key also holds line numbers, so that a comment above a kernel changes it.
    """
    functions, pending = {}, [kernel]
    while pending:
        function = pending.pop()
        name = f"{function.fn.__module__}.{function.fn.__name__}"
        if name in functions:
            continue
        functions[name] = " ".join(_words(function.src))
        named = (function.fn.__globals__.get(n) for n in sorted(function.fn.__code__.co_names))
        pending += [value for value in named if isinstance(value, JITFunction)]
    return hashlib.sha256(repr(sorted(functions.items())).encode()).hexdigest()[:12]


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


def widest_accesses(assembly: str) -> tuple[int, int]:
    """Bytes of the widest load from and the widest store to global memory, in PTX or AMDGCN."""
    loads, stores = [0], [0]
    for kind, modifiers in re.findall(r"\b(ld|st)\.global((?:\.[\w:]+)*)", assembly):
        vector = re.search(r"\.v(\d)", modifiers)
        bits = re.search(r"\.[bfus](\d+)$", modifiers)
        assert bits, modifiers
        size = int(bits.group(1)) // 8 * int(vector.group(1) if vector else 1)
        (loads if kind == "ld" else stores).append(size)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\],\s*(0x[\da-f]+|\d+)", assembly)
    loads += [int(size, 0) for size in copies]
    sizes = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
    for kind, size in re.findall(r"\b(?:global|buffer)_(load|store)_(dword(?:x\d)?)\b", assembly):
        (loads if kind == "load" else stores).append(sizes[size])
    if re.search(r"\b(?:global|buffer)_load_[us]?(?:short|byte)", assembly):
        loads.append(2)
    if re.search(r"\b(?:global|buffer)_store_(?:short|byte)", assembly):
        stores.append(2)
    return max(loads), max(stores)


def compiled(launch: Launch, target: str) -> Compiled:
    """The machine code of `launch` on one of TARGETS."""
    names = [name for name, _ in launch.signature]
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs={(names.index(name),): value for name, value in launch.constants},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible_by_16},
    )
    gpu = TARGETS[target]
    compiler = GPUTarget(gpu.platform, gpu.arch, gpu.warp_size)
    kernel = triton.compile(source, target=compiler, options=dict(launch.options))
    if gpu.platform == "cuda":
        registers, stack = _resources(kernel.asm["cubin"])
        assembly = kernel.asm["ptx"]
    else:
        assembly = kernel.asm["amdgcn"]

        def number(key: str) -> int:
            found = re.search(rf"\.{key}:\s+(\d+)", assembly)
            assert found, key
            return int(found.group(1))

        registers = number("vgpr_count")
        stack = number("private_segment_fixed_size") + 4 * number("vgpr_spill_count")
    metadata = kernel.metadata
    columns = getattr(metadata, "tmem_size", 0) or 0
    loads, stores = widest_accesses(assembly)
    return Compiled(
        launch.name,
        registers,
        stack,
        metadata.shared,
        gpu.occupancy(metadata.num_warps, registers, metadata.shared, columns),
        next((name for name in MATRIX if name in assembly), ""),
        loads,
        stores,
        assembly,
        kernel.asm["ttir"],
    )


def offsets_of(code: Compiled, tensors: tuple[str, ...]) -> set[str]:
    """The integer types that are added to these arguments of a kernel."""
    pattern = rf"tt\.addptr %({'|'.join(tensors)})(?:_\w+)?, .*, (?:tensor<[\dx]*)?(i\d+)>?"
    return {found.group(2) for found in re.finditer(pattern, code.ttir)}

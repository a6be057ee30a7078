"""Compiles the CUDA C++ kernels for every GPU: results/cuda_resources.csv.

    python -m benchmarks.cuda_resources             # what is new or changed; --all: everything
    python -m benchmarks.cuda_resources --targets sm_90 --jobs 4

Needs nvcc and no GPU. A row is one instantiation of a kernel on one target: what ptxas says that it
needs, and the instructions in its machine code (SASS) that decide whether it is quick. Rows stay as
long as the source, the headers that it includes, and nvcc stay. Threads and dynamic shared memory
are those of launches, from results/cuda_launches.csv (benchmarks/cuda_launches.py).
tests/test_cuda_resources.py holds the table to limits.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import build_plan

from .cuda_launches import CudaLaunch, read_launches, short_name
from .report import RESULTS
from .targets import TARGETS
from .typed_csv import read_rows, write_rows

TABLE = RESULTS / "cuda_resources.csv"
FOLDER = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
GPUS = tuple(name for name, target in TARGETS.items() if target.platform == "cuda")
FLAGS = ("-cubin", "-O3", "-std=c++17", "-Xptxas", "-v")
# Columns of instructions, and what they are called in SASS.
INSTRUCTIONS = {
    "matrix": r"[HIDQO]MMA\b|HGMMA\b|UTC\w*MMA\b",
    "ldmatrix": r"LDSM\b",
    "copies_16": r"LDGSTS\b[.\w]*\.128",
    "loads_16": r"LDG\b[.\w]*\.128",
    "stores_16": r"STG\b[.\w]*\.128",
    "loads": r"LDG\b",
    "stores": r"STG\b",
    "local": r"LDL\b|STL\b",
}


@dataclass(frozen=True)
class Row:
    """An instantiation of a kernel on a target.

    registers: of a thread. stack: its bytes of local memory; spilled: those that hold what
    registers could not. bound: threads of a block at most, 0 where nothing says. threads,
    dynamic_shared: of the launch that leaves most of a multiprocessor empty, 0 where there is none;
    occupancy: that launch's resident warps ÷ the most there can be. From `matrix` on: instructions
    in the machine code; loads_16 and so on move 16 bytes a thread. digest: of the source and its
    headers.
    """

    source: str
    kernel: str
    target: str
    registers: int
    stack: int
    spilled: int
    static_shared: int
    bound: int
    threads: int
    dynamic_shared: int
    occupancy: float
    matrix: int
    ldmatrix: int
    copies_16: int
    loads_16: int
    stores_16: int
    loads: int
    stores: int
    local: int
    digest: str
    nvcc: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.source, self.kernel, self.target


def sources() -> list[Path]:
    return sorted(FOLDER.glob("*.cu"))


@cache
def code_of(path: Path) -> str:
    """C++ without comments and layout."""
    pattern = r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/'
    text = path.read_text(encoding="utf-8")
    kept = re.sub(pattern, lambda m: m[0] if m[0][0] == '"' else " ", text, flags=re.DOTALL)
    return "\n".join(words for line in kept.splitlines() if (words := " ".join(line.split())))


def digest_of(source: Path) -> str:
    """What a source and all that it includes of ours say, and how it is compiled."""
    found: dict[Path, str] = {}
    pending = [source]
    while pending:
        path = pending.pop()
        if path not in found:
            found[path] = code_of(path)
            named = re.findall(r'^#include "([^"]+)"', found[path], re.MULTILINE)
            pending += [(path.parent / name).resolve() for name in named]
    codes = [code for _, code in sorted(found.items())]
    return hashlib.sha256(repr((FLAGS, codes)).encode()).hexdigest()[:12]


@cache
def _demangler() -> ctypes._CFuncPtr:  # type: ignore[name-defined]
    function = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    function.restype = ctypes.c_void_p
    return function


def readable(mangled: str) -> str:
    """As it is written in the source: "reduce_kernel<float, 4>(GroupNormBackwardArgs, long)"."""
    status = ctypes.c_int()
    pointer = _demangler()(mangled.encode(), None, None, ctypes.byref(status))
    name = mangled if status.value else ctypes.string_at(pointer).decode()
    return short_name(name)


def find_tools() -> tuple[str, str, str, tuple[str, ...]] | str:
    """(nvcc, its version, cuobjdump, targets that it compiles for), or what is missing."""
    home, version, capabilities = build_plan.find_cuda()
    if home is None or version is None:
        return "nvcc was not found: install the CUDA toolkit and put nvcc on PATH, or set CUDA_HOME"
    known = tuple(name for name in GPUS if f"{name[3:-1]}.{name[-1]}" in capabilities)
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or "nvcc"
    triton = find_spec("triton")
    folders = [f"{home}/bin"]
    if triton is not None and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    dump = shutil.which("cuobjdump", path=":".join(folders))
    if dump is None:
        return f"cuobjdump was not found in {' or '.join(folders)}: install the CUDA toolkit's"
    return nvcc, version, dump, known


def instructions(sass: str) -> dict[str, Counter[str]]:
    """How often each instruction is in each function, by mangled name."""
    found: dict[str, Counter[str]] = {}
    for part in re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:]:
        name, _, code = part.partition("\n")
        pattern = r"^\s*/\*[\da-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
        found[name.strip()] = Counter(re.findall(pattern, code, re.MULTILINE))
    return found


def bounds(elf: str) -> dict[str, int]:
    """Threads of a block at most, by mangled name, where the code says it."""
    found = {}
    for name, info in re.findall(
        r"^\.nv\.info\.(\S+)(.*?)(?=^\.\w)", elf, re.DOTALL | re.MULTILINE
    ):
        threads = re.search(r"EIATTR_MAX_THREADS\s.*?Value:\s+(\w+) (\w+) (\w+)", info, re.DOTALL)
        if threads:
            sizes = [int(size, 0) for size in threads.groups()]
            found[name] = sizes[0] * sizes[1] * sizes[2]
    return found


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compiled(source: Path, target: str) -> list[Row]:
    """The rows of a source on a target, without what launches say."""
    tools = find_tools()
    if isinstance(tools, str):
        raise RuntimeError(tools)
    nvcc, version, dump, _ = tools
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/{source.stem}.cubin"
        said = _output(nvcc, *FLAGS, f"-arch={target}", str(source), "-o", cubin)
        counted, limits = instructions(_output(dump, "-sass", cubin)), _output(dump, "-elf", cubin)
    threads, rows = bounds(limits), []
    pattern = (
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\s+.*?Used (\d+) registers([^\n]*)"
    )
    for name, stack, *spills, registers, rest in re.findall(pattern, said):
        if name not in counted:
            continue  # a function that kernels call
        shared = re.search(r"(\d+) bytes smem", rest)
        counts = {
            column: sum(n for word, n in counted[name].items() if re.match(names, word))
            for column, names in INSTRUCTIONS.items()
        }
        rows.append(
            Row(
                source.name, readable(name), target, int(registers), int(stack),
                sum(map(int, spills)), int(shared[1]) if shared else 0, threads.get(name, 0),
                0, 0, 0.0, **counts, digest=digest_of(source), nvcc=version,
            )
        )  # fmt: skip
    return rows


def launched(row: Row, launches: Sequence[CudaLaunch]) -> Row:
    """`row` with its emptiest launch, or else a block of as many threads as it may have.

    Launches are recorded on some targets; another has those of the one whose shared memory is the
    most that it has too.
    """
    limits = {name: TARGETS[name].shared for name in {launch.target for launch in launches}}
    target = TARGETS[row.target]
    within = {name: size for name, size in limits.items() if size <= target.shared}
    alike = max(within, key=lambda name: (name == row.target, within[name]), default="")
    configurations = [
        (launch.threads, max(launch.shared - row.static_shared, 0))
        for launch in launches
        if (launch.kernel, launch.target) == (row.kernel, alike)
    ] or [(row.bound, 0)]

    def occupancy(configuration: tuple[int, int]) -> float:
        threads, dynamic = configuration
        warps = -(-threads // target.warp_size)
        shared = row.static_shared + dynamic
        return target.occupancy(warps, row.registers, shared) if warps else 0.0

    emptiest = min(configurations, key=lambda c: (occupancy(c), c))
    return replace(
        row,
        threads=emptiest[0],
        dynamic_shared=emptiest[1],
        occupancy=round(occupancy(emptiest), 4),
    )


def read(path: Path = TABLE) -> list[Row]:
    return read_rows(path, Row)


def stale(rows: Iterable[Row], nvcc: str | None = None) -> list[tuple[Path, str]]:
    """(source, target) of what the table lacks, or has of other code or, if given, another nvcc."""
    known = {(row.source, row.target, row.digest, row.nvcc if nvcc else None) for row in rows}
    return [
        (source, target)
        for source, target in product(sources(), GPUS)
        if (source.name, target, digest_of(source), nvcc) not in known
    ]


def renew(options: argparse.Namespace) -> list[Row]:
    """Compiles what the table lacks; rows of what is gone go."""
    tools = find_tools()
    if isinstance(tools, str):
        raise SystemExit(tools)
    _, version, _, known = tools
    table = {source.name: digest_of(source) for source in sources()}
    rows = [row for row in read(options.out) if row.source in table]
    pending = [
        (source, target)
        for source, target in (product(sources(), GPUS) if options.all else stale(rows, version))
        if target in options.targets and target in known
    ]
    launches = read_launches()

    def save() -> None:
        current = [launched(row, launches) for row in rows]
        write_rows(options.out, Row, sorted(current, key=lambda row: row.key))

    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = {pool.submit(compiled, *job): job for job in pending}
        for done, job in enumerate(as_completed(jobs), 1):
            source, target = jobs[job]
            new = job.result()
            rows = [row for row in rows if (row.source, row.target) != (source.name, target)] + new
            save()  # an interrupted run goes on from here
            print(f"{done}/{len(pending)} {source.name} {target}: {len(new)} kernels", flush=True)
    save()
    print(f"{options.out}: {len(rows)} rows, {len(pending)} files compiled")
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--targets", nargs="+", default=GPUS, choices=GPUS)
    parser.add_argument("--jobs", type=int, default=1, help="files compiled at once")
    parser.add_argument("--all", action="store_true", help="also what has not changed")
    parser.add_argument("--out", type=Path, default=TABLE)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    spilling = [row.key for row in renew(parse(arguments)) if row.spilled or row.local]
    for key in spilling:
        print("spills:", *key, file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())

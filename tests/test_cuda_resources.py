"""What nvcc makes of the CUDA C++ kernels for every GPU: benchmarks/results/cuda_resources.csv.

`make compile` renews the table.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import counting, cuda_launches, cuda_resources
from benchmarks.cuda_launches import CudaLaunch, Use
from benchmarks.cuda_resources import GPUS, Row
from benchmarks.targets import TARGETS

RENEW = "python -m benchmarks.cuda_resources"
RECORD = "python -m benchmarks.cuda_launches, on the simulated GPU"
# Of a thread, by the start of a file's name. The MLP's sums and operands of all channels: one block
# of 8 warps has 255.
MOST_REGISTERS = {"mlp": 255, "": 128}
MOST_STATIC_SHARED = 16 << 10
# Kernels for several groups, which PoolFormer does not have: no launch of them is recorded.
SEVERAL_GROUPS = ("merge_saved_kernel", "merge_moments_kernel", "norm_gradient_kernel")
# Kernels of the MLP that multiply no matrices.
WITHOUT_PRODUCTS = ("fold_kernel", "weights_kernel", "vectors_kernel", *SEVERAL_GROUPS)
# They read no tensor of x's size, or are for several groups.
SMALL = ("parameters_kernel", *WITHOUT_PRODUCTS)


@pytest.fixture(scope="module")
def table() -> list[Row]:
    return cuda_resources.read()


def name_of(row: Row) -> str:
    return row.kernel.partition("<")[0].partition("(")[0]


def first_argument(row: Row) -> str:
    """Of a kernel's template: "float" of hidden_kernel<float, 64>(MlpForward)."""
    return row.kernel.partition("<")[2].partition(",")[0].rstrip(">")


def has_vectors(row: Row) -> bool:
    """Whether its threads have 16 bytes of x each: <float, 4>, <__half, 8>."""
    parts = row.kernel.partition("(")[0].replace(">", ",").split(",")
    return any(part.strip() in ("4", "8") for part in parts)


def faults(row: Row) -> list[str]:
    """What a row says that it must not."""
    most = next(most for start, most in MOST_REGISTERS.items() if row.source.startswith(start))
    shared, limit = row.static_shared + row.dynamic_shared, TARGETS[row.target].shared
    found = []
    if row.spilled or row.stack or row.local:
        found.append(f"{row.spilled} bytes spilled, a stack of {row.stack}, {row.local} accesses")
    if row.registers > most:
        found.append(f"{row.registers} registers, more than {most}")
    if shared > limit or row.static_shared > MOST_STATIC_SHARED:
        found.append(f"{shared} bytes of shared memory of {limit}, {row.static_shared} static")
    known = row.threads > 0 or name_of(row) in SEVERAL_GROUPS
    if not known or (row.threads and not 0 < row.occupancy <= 1):
        found.append(f"{row.threads} threads, occupancy {row.occupancy}")
    if row.bound and row.threads > row.bound:
        found.append(f"{row.threads} threads of {row.bound}")
    return found


def narrow(row: Row) -> list[str]:
    """Accesses that are narrower than they are meant to be.

    In NCHW all go by way of shared memory, but for the windows other than 3×3.
    """
    name, in_planes = name_of(row), "planes_kernel" in row.kernel
    if name in SMALL or not (row.source.startswith("mlp") or has_vectors(row) or in_planes):
        return []
    found = []
    if not row.loads_16 + row.copies_16 and not (in_planes and "WholePool" in row.kernel):
        found.append("no 16 bytes are loaded at once")
    if not row.stores_16 and not name.startswith(("reduce", "statistics")):
        found.append("no 16 bytes are stored at once")
    return found


def without_products(row: Row) -> list[str]:
    """Products that do not run on matrix units. Those of float32 are exact, on FMA units."""
    if not row.source.startswith("mlp") or name_of(row) in WITHOUT_PRODUCTS:
        return []
    if first_argument(row) == "float":
        return []
    # Both operands of parts_kernel are transposed, which ldmatrix cannot do with 32 bits.
    loads = row.ldmatrix or (name_of(row), first_argument(row)) == ("parts_kernel", "Tf32")
    if row.matrix and loads:
        return []
    return [f"{row.matrix} matrix instructions, {row.ldmatrix} loads of matrices"]


def test_the_table_is_that_of_the_kernels(table) -> None:
    lines = [f"{source.name} on {target}" for source, target in cuda_resources.stale(table)]
    assert not lines, f"{len(lines)} stale, such as {lines[:5]}; renew them: {RENEW}"
    gone = {row.source for row in table} - {source.name for source in cuda_resources.sources()}
    assert not gone, f"rows of {gone}, which are not there; drop them: {RENEW}"


def test_every_kernel_is_there_on_every_target(table) -> None:
    kernels = {target: {r.key[:2] for r in table if r.target == target} for target in GPUS}
    assert all(found == kernels["sm_80"] for found in kernels.values())
    for source in cuda_resources.sources():
        code = cuda_resources.code_of(source)
        written = set(re.findall(r"__global__[^{;]*?\b(\w+_kernel)\(", code))
        assert written and written <= {name_of(r) for r in table if r.source == source.name}


CHECKS: list[Callable[[Row], list[str]]] = [faults, narrow, without_products]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_limits_are_kept(table, check: Callable[[Row], list[str]]) -> None:
    assert len(table) > 500
    bad = {row.key: check(row) for row in table if check(row)}
    assert not bad, bad


def test_every_launch_is_of_a_kernel_of_the_table(table) -> None:
    launches = cuda_launches.read_launches()
    assert {launch.target for launch in launches} == {"sm_80", "sm_120"}
    gone = {launch.kernel for launch in launches} - {row.kernel for row in table}
    assert not gone, f"{gone} are no kernels any more; record launches again: {RECORD}"
    again = [cuda_resources.launched(row, launches) for row in table]
    assert again == table, f"launches changed; renew the table: {RENEW}"


def test_faults_are_found(table) -> None:
    row = next(row for row in table if "fused_kernel" in row.kernel)
    assert not faults(row) + narrow(row) + without_products(row)
    for change in (
        {"spilled": 8},
        {"stack": 8},
        {"local": 1},
        {"registers": 256},
        {"dynamic_shared": 1 << 20},
        {"occupancy": 0.0},
        {"threads": 0},
        {"threads": 1024},
    ):
        assert len(faults(replace(row, **change))) == 1, change
    assert len(narrow(replace(row, loads_16=0, copies_16=0, stores_16=0))) == 2
    assert without_products(replace(row, matrix=0)) and without_products(replace(row, ldmatrix=0))
    planes = next(row for row in table if row.kernel.startswith("planes_kernel<RollingPool"))
    assert len(narrow(replace(planes, copies_16=0, stores_16=0))) == 2 and not narrow(planes)
    mixer = next(row for row in table if row.kernel.startswith("pool_mixer_kernel<RollingPool<flo"))
    assert len(faults(replace(mixer, registers=129))) == 1


def test_a_stale_table_is_found(table) -> None:
    first = table[0]
    path = next(path for path in cuda_resources.sources() if path.name == first.source)
    others = [row for row in table if (row.source, row.target) != (first.source, first.target)]
    assert cuda_resources.stale(others) == [(path, first.target)]
    assert cuda_resources.stale([*others, replace(first, digest="0")]) == [(path, first.target)]
    newer = [replace(row, nvcc="13.0") for row in table]
    assert not cuda_resources.stale(newer, "13.0") and cuda_resources.stale(newer, "99.0")


def test_digests_follow_code_and_what_it_includes(tmp_path: Path) -> None:
    def digest(kernel: str, header: str) -> str:
        (tmp_path / "a.cu").write_text(kernel)
        (tmp_path / "b.cuh").write_text(header)
        cuda_resources.code_of.cache_clear()
        return cuda_resources.digest_of(tmp_path / "a.cu")

    kernel, header = '#include "b.cuh"\nint f() { return g(); }', "int g() { return 1; }"
    before = digest(kernel, header)
    assert digest(kernel + "  // why\n", "/* a\nb */\n" + header) == before
    assert digest(kernel, header.replace("1", "2")) != before
    assert digest(kernel.replace("g()", "-g()"), header) != before
    assert digest(kernel + ' const char* s = "// a";', header) != digest(
        kernel + ' const char* s = "// b";', header
    )


SASS = """
\t\tFunction : _Z1fPf
        /*0000*/                   MOV R1, c[0x0][0x28] ;      /* 0x00000a0000017a02 */
        /*0010*/                   LDG.E.128.CONSTANT R4, [R2.64] ;  /* 0x000fe200078e00ff */
        /*0020*/              @!P0 HMMA.16816.F32.BF16 R4, R4, R8, R4 ; /* 0x1 */
        /*0030*/              @UP1 LDG.E R4, [R2.64] ;  /* 0x000fe200078e00ff */
\t\tFunction : _Z1gv
        /*0000*/                   STG.E.128 desc[UR4][R2.64], R4 ;
"""
ELF = """
.nv.info._Z1fPf
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x80 0x2 0x1
.nv.info._Z1gv
\tAttribute:\tEIATTR_REGCOUNT
.text
"""


def test_what_is_read_from_machine_code() -> None:
    found = cuda_resources.instructions(SASS)
    assert found["_Z1fPf"] == {
        "MOV": 1, "LDG.E.128.CONSTANT": 1, "HMMA.16816.F32.BF16": 1, "LDG.E": 1
    }  # fmt: skip
    assert found["_Z1gv"] == {"STG.E.128": 1}
    assert cuda_resources.bounds(ELF) == {"_Z1fPf": 256}


def test_names_are_readable() -> None:
    if shutil.which("c++") is None:
        pytest.skip("there may be no libstdc++")
    mangled = "_ZN10poolformer4cuda12_GLOBAL__N_112apply_kernelI6__halfLi8EEEvNS0_4ArgsEl"
    assert cuda_resources.readable(mangled) == "apply_kernel<__half, 8>(Args, long)"
    assert cuda_resources.readable("main") == "main"


def test_occupancy_is_that_of_the_emptiest_launch(table) -> None:
    row = next(r for r in table if "fused_kernel<__half, 96" in r.kernel and r.target == "sm_90")
    launch = CudaLaunch(row.kernel, "sm_80", 128, 40 << 10, "mlp", "", "", "")
    more = replace(launch, shared=100 << 10)
    row = replace(row, registers=64)
    assert cuda_resources.launched(row, [launch]).occupancy == 5 * 4 / 64
    chosen = cuda_resources.launched(
        row, [launch, more, replace(more, target="sm_120", threads=32)]
    )
    assert (chosen.threads, chosen.dynamic_shared, chosen.occupancy) == (128, 100 << 10, 8 / 64)
    small = cuda_resources.launched(
        replace(row, target="sm_86"), [replace(launch, target="sm_120")]
    )
    assert small.occupancy == pytest.approx(2 * 4 / 48, abs=1e-4)
    assert cuda_resources.launched(row, []).threads == row.bound


def test_the_smallest_file_is_what_the_compiler_says(table) -> None:
    tools = cuda_resources.find_tools()
    if isinstance(tools, str) or "sm_90" not in tools[3]:
        pytest.skip("there is no nvcc that compiles for sm_90")
    source = min(cuda_resources.sources(), key=lambda path: path.stat().st_size)
    rows = [row for row in table if (row.source, row.target) == (source.name, "sm_90")]
    if rows[0].nvcc != tools[1]:
        pytest.skip(f"the table is nvcc {rows[0].nvcc}'s, and this is {tools[1]}")
    launches = cuda_launches.read_launches()
    found = [
        cuda_resources.launched(row, launches) for row in cuda_resources.compiled(source, "sm_90")
    ]
    assert sorted(found, key=lambda row: row.key) == rows


def test_only_what_changed_is_compiled_again(table, monkeypatch, tmp_path, capsys) -> None:
    path, old = tmp_path / "cuda_resources.csv", table[0]
    cuda_resources.write_rows(
        path, Row, [replace(r, digest="0") if r.key[::2] == old.key[::2] else r for r in table]
    )
    asked = []

    def compiled(source: Path, target: str) -> list[Row]:
        asked.append((source.name, target))
        return [row for row in table if (row.source, row.target) == (source.name, target)]

    tools = ("nvcc", old.nvcc, "cuobjdump", GPUS)
    monkeypatch.setattr(cuda_resources, "find_tools", lambda: tools)
    monkeypatch.setattr(cuda_resources, "compiled", compiled)
    assert cuda_resources.main(["--out", str(path)]) == 0
    assert asked == [(old.source, old.target)] and cuda_resources.read(path) == table
    assert "1 files compiled" in capsys.readouterr().out


def test_the_missing_compiler_is_named(monkeypatch) -> None:
    monkeypatch.setattr(cuda_resources.build_plan, "find_cuda", lambda: (None, None, ()))
    with pytest.raises(SystemExit, match="nvcc was not found: install the CUDA toolkit"):
        cuda_resources.main([])


@pytest.mark.gpu
@pytest.mark.skipif(
    counting.why_not() is not None, reason="only the simulated GPU records launches"
)
def test_launches_are_those_recorded(run_python, tmp_path: Path) -> None:
    path = tmp_path / "launches.csv"
    done = run_python("-m", "benchmarks.cuda_launches", "--quick", "--out", str(path))
    assert done.returncode == 0, done.stderr
    known = {launch.key for launch in cuda_launches.read_launches()}
    found = cuda_launches.read_launches(path)
    assert len(found) >= 10
    if found[0].target in ("sm_80", "sm_120"):
        new = [launch for launch in found if launch.key not in known]
        assert not new, f"{new} are not in the table; record launches again: {RECORD}"
    assert {use.dtype for use in cuda_launches.uses()} == set(cuda_launches.KINDS)
    assert Use("mlp", (1, 64, 56, 56), "float16", "nchw") in set(cuda_launches.uses())

"""What GPUs' compilers make of the Triton kernels at every width: benchmarks/results/resources.csv.

`make compile` renews the table.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("tqdm")
pytest.importorskip("triton")
import triton

from benchmarks import ahead_of_time, resources
from benchmarks.ahead_of_time import TARGETS, Launch
from benchmarks.resources import Row

RENEW = "python -m benchmarks.resources"
MATRIX = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync",
    "gfx942": "v_mfma",
}
# Kernels that read, and those that write, a tensor of x's or the hidden's size. The others move
# parameters, partial sums and statistics.
READ = {
    "statistics.statistics_kernel",
    "pool_mixer.forward_kernel",
    "pool_mixer_backward.reduce_kernel",
    "pool_mixer_backward.apply_kernel",
    "group_norm.forward_kernel",
    "group_norm.reduce_kernel",
    "group_norm.apply_kernel",
    "mlp_fused.fused_kernel",
    "mlp_gemm.hidden_kernel",
    "mlp_gemm.residual_kernel",
    "mlp_backward.hidden_gradient_kernel",
    "mlp_backward.input_gradient_kernel",
    "mlp_weight_gradients.weight_parts_kernel",
}
WRITTEN = READ - {
    "statistics.statistics_kernel",
    "pool_mixer_backward.reduce_kernel",
    "group_norm.reduce_kernel",
    "mlp_weight_gradients.weight_parts_kernel",
}


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str], Row]:
    return resources.read()


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, str], tuple[Row, Launch]]:
    return {row.key: (row, launch) for row, launch in resources.expected()}


def stale(table: dict[tuple[str, str], Row], rows: list[Row]) -> list[str]:
    """The rows that the table lacks, or has of another source; each once a kernel and target."""
    lines = [
        f"{row.kernel} on {row.target}"
        for row in rows
        if row.key not in table or table[row.key].source != row.source
    ]
    return sorted(set(lines))


def faults(row: Row) -> list[str]:
    """What a row says that it must not."""
    found = []
    if row.spilled:
        found.append(f"{row.spilled} bytes of a thread are spilled")
    if row.shared > row.shared_limit:
        found.append(f"{row.shared} of {row.shared_limit} bytes of shared memory")
    if not 0 < row.occupancy <= 1:
        found.append(f"occupancy {row.occupancy}")
    return found


def test_the_table_is_that_of_the_kernels(table, expected) -> None:
    lines = stale(table, [row for row, _ in expected.values()])
    assert not lines, f"{len(lines)} stale, such as {lines[:5]}; renew them: {RENEW}"
    assert not table.keys() - expected.keys(), f"rows that nothing launches; drop them: {RENEW}"


def test_every_target_width_dtype_and_layout_is_there(table) -> None:
    for target in TARGETS:
        rows = [row for row in table.values() if row.target == target]
        for op in resources.OPS:
            used = [row for row in rows if op in row.op.split()]
            kinds = {kind for kind in resources.KINDS if op == "mlp" or "+" not in kind}
            assert {d for row in used for d in row.dtype.split()} >= kinds
            assert {d for row in used for d in row.layout.split()} == {"nchw", "nhwc"}
            assert {d for row in used for d in row.direction.split()} == {"forward", "backward"}
            shapes = {"x".join(map(str, shape[1:])) for shape in resources.SHAPES}
            assert {d for row in used for d in row.shape.split()} == shapes


def test_nothing_spills_and_everything_fits(table) -> None:
    assert len(table) > 1000
    bad = {row.key: (row.kernel, faults(row)) for row in table.values() if faults(row)}
    assert not bad, bad


def test_faults_are_found(table) -> None:
    row = next(iter(table.values()))
    assert faults(row) == []
    assert "8 bytes" in faults(replace(row, spilled=8))[0]
    assert "shared" in faults(replace(row, shared=row.shared_limit + 1))[0]
    assert "occupancy" in faults(replace(row, occupancy=0.0))[0]


def test_products_run_on_matrix_units(table, expected) -> None:
    """float32 products are exact: on FMA units, but for AMD's, which multiply float32 matrices."""
    seen = set()
    for key, row in table.items():
        if "tl.dot" in expected[key][1].kernel.src and (
            row.dtype != "float32" or row.target == "gfx942"
        ):
            seen.add(row.target)
            assert row.matrix == MATRIX[row.target], row
    assert seen == set(TARGETS)


def narrow(row: Row) -> list[str]:
    """Accesses that are narrower than they are meant to be, in channels_last.

    In NCHW rows of 14² and 7² are not aligned, and windows are shifted. A lane of AMD's matrix
    units has four neighbours of a result, and stores these: 8 bytes.
    """
    if row.layout == "nchw":
        return []
    least = 8 if row.target == "gfx942" and row.matrix else 16
    found = []
    if row.kernel in READ and row.load_bytes < least:
        found.append(f"{row.kernel} on {row.target} reads {row.load_bytes} bytes")
    if row.kernel in WRITTEN and row.store_bytes < least:
        found.append(f"{row.kernel} on {row.target} writes {row.store_bytes} bytes")
    return found


def test_tensors_are_read_and_written_16_bytes_at_a_time(table) -> None:
    assert not [line for row in table.values() for line in narrow(row)]
    assert {row.kernel for row in table.values() if row.layout != "nchw"} >= READ
    row = next(row for row in table.values() if row.kernel in WRITTEN and row.layout == "nhwc")
    assert len(narrow(replace(row, load_bytes=4, store_bytes=4))) == 2


def test_a_stale_table_is_found(table, expected) -> None:
    rows = [row for row, _ in expected.values()]
    first = rows[0]
    other = replace(table[first.key], source="0")
    assert stale(table | {first.key: other}, rows) == [f"{first.kernel} on {first.target}"]
    assert stale({k: v for k, v in table.items() if k != first.key}, rows)


@pytest.mark.parametrize("target", ["sm_90", "sm_120", "gfx942"])
def test_the_tightest_rows_are_what_the_compiler_says(
    target: str, table, expected, monkeypatch, tmp_path
) -> None:
    rows = [row for row in table.values() if row.target == target]
    tightest = max(rows, key=lambda row: (row.registers, row.shared, row.key))
    if tightest.triton != triton.__version__:
        pytest.skip(f"the table is Triton {tightest.triton}'s, and this is {triton.__version__}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert resources.measured(*expected[tightest.key]) == tightest


def test_only_what_changed_is_compiled_again(table, monkeypatch, tmp_path, capsys) -> None:
    path = tmp_path / "resources.csv"
    rows = dict(table)
    gone, changed = sorted(rows)[:2]
    changed_row = replace(rows[changed], source="0", registers=1)
    del rows[gone]
    resources.write([*rows.values(), changed_row, replace(changed_row, specialisation="0")], path)
    compiled = []

    def measured(row: Row, launch: Launch) -> Row:
        compiled.append(row.key)
        return table[row.key]

    monkeypatch.setattr(resources, "measured", measured)
    assert resources.main(["--out", str(path)]) == 0
    assert sorted(compiled) == [gone, changed]
    assert resources.read(path) == table
    assert "2 of them new" in capsys.readouterr().out


def test_digests_follow_code_and_not_comments() -> None:
    words = ahead_of_time._words
    code = 'def f(x):\n    """Doc."""\n    y = x + 1  # one\n\n    return y\n'
    same = "def f(x):\n    # More.\n    y = x + 1\n    return y\n"
    assert words(code) == words(same)
    assert words(code) != words(code.replace("+", "-"))
    assert words(code) != words(code.replace("    return", "    if x:\n        return"))


def test_a_digest_holds_what_a_kernel_calls(monkeypatch) -> None:
    from poolformer_kernels.kernels import _common, pool_mixer

    before = ahead_of_time.source_digest(pool_mixer.forward_kernel)
    assert before == ahead_of_time.source_digest(pool_mixer.forward_kernel)
    source = _common.per_channel.src
    monkeypatch.setattr(_common.per_channel, "_src", source.replace("1.0", "2.0"), raising=False)
    assert _common.per_channel.src != source
    assert ahead_of_time.source_digest(pool_mixer.forward_kernel) != before


def test_occupancy() -> None:
    sm_80, sm_120, amd = TARGETS["sm_80"], TARGETS["sm_120"], TARGETS["gfx942"]
    assert sm_80.occupancy(4, 32, 0) == 1
    assert sm_80.occupancy(8, 255, 0) == 8 / 64  # 65536 registers: one block of 256 threads
    assert sm_80.occupancy(4, 128, 0) == 16 / 64
    assert sm_80.occupancy(4, 32, 80 << 10) == 8 / 64  # two blocks fit the 164 KB
    assert sm_120.occupancy(4, 32, 57344) == 4 / 48  # one fits the 100 KB
    assert TARGETS["sm_100"].occupancy(4, 32, 0, 512) == 4 / 64  # all the tensor memory
    assert amd.occupancy(4, 265, 0) == 4 / 32 and amd.occupancy(4, 64, 0) == 1


def test_widest_accesses() -> None:
    ptx = """
        ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
        @%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        st.global.v2.b32 [ %rd1 + 0 ], { %r1, %r2 };
    """
    assert ahead_of_time.widest_accesses(ptx) == (16, 8)
    copy = "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;"
    assert ahead_of_time.widest_accesses(copy) == (16, 0)
    amd = "global_load_dwordx2 v[0:1], v2, s[0:1]\n buffer_store_dwordx4 v[0:3], v4\n"
    assert ahead_of_time.widest_accesses(amd) == (8, 16)
    assert ahead_of_time.widest_accesses("global_load_ushort v1, v2, s[0:1]") == (2, 0)

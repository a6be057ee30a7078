"""Launches, bytes moved and bytes saved, and the programs that count them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_checks import NO_CUDA

pytest.importorskip("matplotlib")

from benchmarks import counting, plots, saved_bytes, traffic
from benchmarks.counting import Counts
from benchmarks.plans import PLANS, Plan
from benchmarks.report import RESULTS, read_csv
from poolformer_kernels import PoolFormerConfig, backends, modules, ops

ON_SIMULATOR = pytest.mark.skipif(
    counting.why_not() is not None, reason="only the simulated GPU counts bytes"
)
FAKES_GPU = pytest.mark.skipif(
    saved_bytes.why_not() is not None or not backends._has_triton(),
    reason="needs Triton and a PyTorch for GPUs",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the program writes for a fused stage and one of two products."""
    folder = tmp_path_factory.mktemp("traffic")
    small = ["--variants", "s12", "--stages", "1", "3", "--image-size", "96", "--ops", "stage"]
    assert traffic.main([*small, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def stage_rows(folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """(stage, direction, contender) → row."""
    rows = read_csv(folder / "traffic.csv")
    return {(row["stage"], row["direction"], row["contender"]): row for row in rows}


@pytest.mark.gpu
@ON_SIMULATOR
@pytest.mark.parametrize(("stage", "launches", "passes"), [(1, 2, 4.3), (3, 3, 13.4)])
def test_a_block_in_a_stage(stage_rows: Any, stage: int, launches: int, passes: float) -> None:
    row = stage_rows[stage, "forward", "triton"]
    assert row["launches"] <= launches and row["passes"] <= passes
    assert row["launches_once"] == 1  # the statistics of the stage's input
    row = stage_rows[stage, "backward", "triton"]
    assert row["launches"] <= 10 and row["passes"] <= 32.1 and row["launches_once"] == 0


@pytest.mark.gpu
@ON_SIMULATOR
@pytest.mark.skipif(NO_CUDA, reason="CUDA kernels are not built here")
@pytest.mark.parametrize("stage", [1, 3])
def test_cuda_moves_no_more_than_triton(stage_rows: Any, stage: int) -> None:
    for direction in ("forward", "backward"):
        cuda, triton = (stage_rows[stage, direction, name] for name in ("cuda", "triton"))
        assert cuda["passes"] <= triton["passes"] + 0.1
        assert cuda["launches"] <= triton["launches"]


@pytest.mark.gpu
@ON_SIMULATOR
def test_plain_pytorch_is_counted_as_by_hand(stage_rows: Any) -> None:
    # Mixer: norm 2, pool 2, minus 3, scale 2, plus 3. MLP: norm 2, fc1 5, gelu 8, fc2 5, 2, 3.
    for stage, channels in ((1, 64), (3, 320)):
        row = stage_rows[stage, "forward", "torch"]
        assert row["launches"] == 11 and row["passes"] == pytest.approx(12 + 25, abs=1e-2)
        parameters = 2 * channels * (2 * 4 * channels + 2 * 2 + 1 + 4 + 1 + 1)
        assert row["parameter_bytes"] == parameters
        assert stage_rows[stage, "backward", "torch"]["passes"] == pytest.approx(59, abs=1e-2)


@pytest.mark.gpu
@ON_SIMULATOR
def test_what_the_program_writes(folder: Path, stage_rows: Any) -> None:
    assert (folder / "traffic.png").read_bytes().startswith(b"\x89PNG")
    row = stage_rows[1, "forward", "triton"]
    moved = row["load_bytes"] + row["store_bytes"]
    assert moved == row["activation_bytes"] + row["parameter_bytes"] <= row["requested_bytes"]
    assert row["modelled_us_h100"] == pytest.approx(moved / 3.35e6, rel=1e-4)
    assert row["gpu"] and row["triton"] and row["shape"] == "1x64x24x24"


def kernel(**values: Any) -> dict[str, Any]:
    bytes_moved = dict.fromkeys(("load_bytes", "store_bytes"), 900)
    return {"kind": "triton", **bytes_moved, **values}


def test_rows_of_a_trace() -> None:
    buffers = [
        {"bytes": 100, "read": 100, "written": 0},
        {"bytes": 400, "read": 0, "written": 400},
        {"bytes": 64, "read": 64, "written": 0},
    ]
    rows = [
        kernel(unique_load_bytes=164, unique_store_bytes=400, buffers=buffers),
        {"kind": "memset", "bytes": 7},
        {"kind": "aten", "load_bytes": 0, "store_bytes": 64},
        {"kind": "aten", "load_bytes": 60, "store_bytes": 60},
    ]
    counts = counting.counts_of(rows, (100, 400))
    assert counts == Counts(3, 164 + 60, 400 + 64 + 60, 1800 + 64 + 120, 500 + 120)
    assert counts.moved == 748 and counts - counts == Counts()


@pytest.mark.parametrize("gpu", [None, "H100"])
def test_what_is_needed_to_count(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    gpu: str | None,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    assert traffic.main(["--out", str(tmp_path)]) == 2
    said = f"here is {gpu or 'no CUDA device'} without the module simgpu. Start this program"
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_shapes_whose_tensors_cannot_be_told_apart_are_refused() -> None:
    for edge in (8, 16):
        with pytest.raises(ValueError, match="take another --image-size"):
            traffic.row_of(traffic.Setting("mlp", "forward", (1, 64, edge, edge)))
    for _, setting in traffic.grid(traffic.parse([])):
        setting.check()


def test_a_plan_that_keeps_the_hidden_asks_the_mlp_to(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(ops, "mlp", lambda *args, **options: asked.append(options) or args[0])
    block, x = modules.PoolFormerBlock(8), torch.randn(1, 8, 4, 4)
    for plan in (Plan("torch"), Plan("torch", save_hidden=True)):
        with plan.chosen():
            block(x)
    assert [options["save_hidden"] for options in asked] == [False, True]


def test_cuda_is_shown_beside_triton(capsys: pytest.CaptureFixture[str]) -> None:
    assert traffic.main(["--show"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    rows = read_csv(RESULTS / "traffic.csv")
    contenders = {row["contender"] for row in rows}
    assert contenders == set(PLANS)
    assert len(lines) == len([row for row in rows if row["contender"] == "cuda"])
    names = ("cuda passes", "cuda launches", "triton passes", "triton launches")
    places = [header.index(name) + len(name) for name in names]
    cells = [lines[0][:place].split()[-1] for place in places]
    first = [next(row for row in rows if row["contender"] == name) for name in ("cuda", "triton")]
    expected = [
        f(row[key])
        for row in first
        for key, f in (("passes", "{:.2f}".format), ("launches", "{:.0f}".format))
    ]
    assert cells == expected


@FAKES_GPU
def test_s12_saves_a_seventh_of_what_plain_pytorch_does() -> None:
    config = PoolFormerConfig.from_variant("s12")
    sizes = {
        (part, contender): saved_bytes.saved_bytes(config, part, contender)
        for part in (saved_bytes.BLOCKS, saved_bytes.WHOLE)
        for contender in ("torch", "triton")
    }
    ours, eager = (sizes["blocks", name] for name in ("triton", "torch"))
    assert sum(ours) <= 4.5e6 and sum(eager) > 28e6
    x = [2 * c * (56 >> i) ** 2 for i, c in enumerate(config.hidden_sizes)]
    inputs = 2 * sum(depth * size for depth, size in zip(config.depths, x, strict=True))
    assert sum(ours) == inputs + 8 * 2 * sum(config.depths)  # (mean, 1/std) a norm
    assert max(ours) == max(x)
    for name in ("torch", "triton"):
        pixels = 2 * 3 * 224**2
        assert sum(sizes["whole model", name]) > sum(sizes["blocks", name]) + pixels


@FAKES_GPU
def test_a_hidden_that_is_kept_is_counted() -> None:
    sizes = saved_bytes.saved_bytes(
        PoolFormerConfig.from_variant("s12"), saved_bytes.BLOCKS, "triton, hidden kept"
    )
    assert 12.3e6 <= sum(sizes) <= 12.5e6


@FAKES_GPU
def test_saved_bytes_as_a_program(tmp_path: Path) -> None:
    small = ["--variants", "s12", "--image-size", "64", "--out", str(tmp_path)]
    assert saved_bytes.main(small) == 0
    rows = read_csv(tmp_path / "saved_bytes.csv")
    assert len(rows) == 2 * len(saved_bytes.CONTENDERS) and all(
        row["saved_bytes"] > 0 for row in rows
    )


def test_saved_bytes_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert saved_bytes.main([]) == 2
    assert "install a build for CUDA or ROCm" in capsys.readouterr().err


def test_results_are_complete(tmp_path: Path) -> None:
    rows = read_csv(RESULTS / "traffic.csv")
    found = [
        (row["variant"], row["stage"], row["op"], row["direction"], row["contender"])
        for row in rows
    ]
    expected = [
        (labels["variant"], labels["stage"], setting.op, setting.direction, setting.contender)
        for labels, setting in traffic.grid(traffic.parse([]))
    ]
    assert found == expected
    for row in rows:
        empty = [key for key, value in row.items() if value is None]
        assert empty == ([] if row["op"] == "stage" else ["launches_once"]), row
    copy = tmp_path / "traffic.csv"
    copy.write_bytes((RESULTS / "traffic.csv").read_bytes())
    assert plots.main([str(copy)]) == 0
    assert (tmp_path / "traffic.png").read_bytes().startswith(b"\x89PNG")
    saved = read_csv(RESULTS / "saved_bytes.csv")
    assert len(saved) == 5 * 2 * len(saved_bytes.CONTENDERS)
    assert all(row["saved_bytes"] for row in saved)

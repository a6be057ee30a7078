"""Tiles by architecture: which one is chosen for, and that every entry of the tables is right."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("tqdm")

from benchmarks import ahead_of_time, resources, tune
from poolformer_kernels.kernels import _pooling, architecture, mlp, mlp_config, pool_mixer
from poolformer_kernels.kernels.architecture import ARCHITECTURES, tiles_for
from poolformer_kernels.kernels.mlp_config import GemmConfig

BF16 = torch.bfloat16
TABLES = {
    "fused": mlp_config.FUSED,
    "fused mixed": mlp_config.FUSED_MIXED,
    "product": mlp_config.PRODUCT,
    "hidden gradient": mlp_config.HIDDEN_GRADIENT,
    "weight gradient": mlp_config.WEIGHT_GRADIENT,
}


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_120"),  # 99 KB of shared memory, as much as sm_120
        ((8, 9), "sm_120"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_120"),
        ((7, 5), "sm_120"),
        ((13, 0), "sm_120"),
    ],
)
def test_architecture_of_a_capability(capability: tuple[int, int], name: str) -> None:
    assert architecture.of_capability(*capability) == name


@pytest.mark.parametrize(
    ("devices", "name"),
    [([], "sm_120"), ([(9, 0)], "sm_90"), ([(9, 0)] * 2, "sm_90"), ([(8, 0), (9, 0)], "sm_120")],
)
def test_one_architecture_a_process(devices: list[tuple[int, int]], name: str) -> None:
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: bool(devices)),
        mock.patch.object(torch.cuda, "device_count", lambda: len(devices)),
        mock.patch.object(torch.cuda, "get_device_capability", devices.__getitem__),
        mock.patch.object(torch.version, "hip", None),
    ):
        assert architecture._of_devices.__wrapped__() == name


def test_tiles_are_chosen_for_a_named_architecture() -> None:
    before = architecture.architecture()
    with tiles_for("gfx942"):
        assert architecture.architecture() == "gfx942" and architecture.warps_for(128) == 2
        with tiles_for("sm_90"):
            assert architecture.architecture() == "sm_90" and architecture.warps_for(128) == 4
        assert architecture.is_amd()
    assert architecture.architecture() == before
    with pytest.raises(ValueError, match="architecture is 'sm_89', but must be one of sm_80"):
        tiles_for("sm_89").__enter__()


def test_register_limits_are_for_nvidia_alone() -> None:
    tile, exact = _pooling.Tile(4, 16, 64, 128), GemmConfig(64, 32, 16, 8, 2, 128)
    with tiles_for("sm_80"):
        assert _pooling.options(tile) == {"num_warps": 4, "maxnreg": 128}
        assert exact.options["maxnreg"] == 128
    with tiles_for("gfx942"):
        assert _pooling.options(tile) == {"num_warps": 2}
        assert "maxnreg" not in exact.options


def test_tables_name_known_architectures() -> None:
    for table in TABLES.values():
        for tiles in table.values():
            assert "any" in tiles and tiles.keys() <= {"any", *ARCHITECTURES}
            # An entry of its own that is the common one would be noise.
            assert all(tile != tiles["any"] for name, tile in tiles.items() if name != "any")


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_fakes_tell_the_statistics_that_kernels_return(name: str, channels_last: bool) -> None:
    layout = "nhwc" if channels_last else "nchw"
    with tiles_for(name):
        for shape in resources.SHAPES:
            for dtype in resources.KINDS:
                x_dtype, kind = (resources.DTYPES[dtype.split("+")[i]] for i in (0, -1))
                for op, module in (("mlp", mlp), ("pool_mixer", pool_mixer)):
                    if op != "mlp" and x_dtype != kind:
                        continue
                    use = resources.Use(op, "forward", shape, dtype, layout)
                    last = resources.call_on_meta(use)[-1]
                    mixed = (x_dtype,) if x_dtype != kind else ()
                    told = module.stats_partials(shape, 1, channels_last, kind, *mixed)
                    programs = last.grid[0] // shape[0]
                    if op == "mlp" and last.name.endswith("fused_kernel"):
                        programs *= 2 if dict(last.constants)["BLOCK_B"] else 1
                    assert told == programs, (op, shape, dtype)


def entries() -> list[Any]:
    return [
        pytest.param(part, key, tile, id=f"{part}-{key}-{name}")
        for part, table in TABLES.items()
        for key, tiles in table.items()
        for name, tile in tiles.items()
        if tile is not None
    ]


@pytest.mark.gpu
@pytest.mark.parametrize(("part", "key", "tile"), entries())
def test_every_entry_is_right(part: str, key: Any, tile: Any) -> None:
    """Tiles of other architectures too: the source is the same, and so is what they compute."""
    part = part.removesuffix(" mixed")  # right or wrong does not depend on x's dtype
    edge = {"small image": 7, "large image": 9}.get(key, 9)
    channels = (
        key
        if part == "fused"
        else {"128 | columns": 256, "64 columns": 208, "NCHW": 208}.get(key, 48)
    )
    dtype = "float32" if key == "float32" else "bfloat16"
    layout = "nchw" if key == "NCHW" else "nhwc"
    with tune.using(TABLES[part][key], tile):
        assert tune.refused((1, channels, edge, edge), dtype, "cuda", layout) is None


@pytest.mark.gpu
def test_a_wrong_tile_is_refused() -> None:
    with mock.patch.object(mlp_config, "_two_parts", lambda channels: (16, 0)):
        reason = tune.refused((1, 48, 5, 5), "bfloat16", "cuda")
    assert reason is not None and "off by" in reason


@pytest.mark.gpu
def test_tune_on_one_tiny_case(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--channels", "16", "--edge", "5", "--batch", "1"]
    tiles = ["--tiles", "32,16,4,2", "64,32,4,2"]
    assert tune.main(["--parts", "fused", *sizes, *tiles, "--check-only"]) == 0
    out = capsys.readouterr().out
    assert out.count(": right") == 3 and "FusedConfig(64, 32, 4, 2): right" in out
    assert out.splitlines()[-1].strip() == tune.entry(64, mlp_config.FUSED[64], now()).strip()


def now() -> Any:
    tiles = mlp_config.FUSED[64]
    return tiles.get(architecture.architecture(), tiles["any"])


@pytest.mark.gpu
def test_launches_are_timed_alone() -> None:
    """The launches of one kernel, made again, write what they wrote before."""
    step = tune.step_of((1, 16, 5, 5), "bfloat16", "cuda")
    with mock.patch.object(tune.JITFunction, "run", autospec=True) as run:
        run.return_value = mock.Mock(n_spills=0)
        again = tune.launches_of(step, ("fused_kernel",))
        before = run.call_count
        again()
        assert run.call_count == before + 1
        assert run.call_args.args[0].fn.__name__ == "fused_kernel"
        run.return_value = mock.Mock(n_spills=3)
        with pytest.raises(tune.OutOfResources, match="spilled registers"):
            tune.launches_of(step, ("fused_kernel",))


def test_the_fastest_tile_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    """With a clock of its own: the second rival is twice as fast as the present tile."""
    part, times = tune.PARTS["fused"], iter([2e-3, 3e-3, 1e-3])
    rivals = [mlp_config.FusedConfig(32, 16, 4, 2), mlp_config.FusedConfig(64, 32, 4, 2)]
    options = tune.parse(["--parts", "fused", "--channels", "64"])

    def measure(contenders: list[Any], *_: Any, **__: Any) -> dict[str, list[float]]:
        return {contender.name: [next(times)] for contender in contenders}

    with (
        tiles_for("sm_90"),
        mock.patch.object(tune, "step_of"),
        mock.patch.object(tune, "launches_of"),
        mock.patch.object(tune, "refused", return_value=None),
        mock.patch.object(tune, "measure", measure),
    ):
        best = tune.tune(part, 64, (1, 64, 5, 5), rivals, options)
        line = tune.entry(64, part.table[64], best)
    assert best == rivals[1]
    assert " 2.00 times the present one's speed" in capsys.readouterr().out
    assert eval(f"{{{line}}}", vars(mlp_config)) == {64: {**mlp_config.FUSED[64], "sm_90": best}}


def test_rivals_hold_their_sums_in_registers() -> None:
    for part in tune.PARTS.values():
        rivals = part.rivals(64)
        assert 10 < len(rivals) < 200 and len(set(rivals)) == len(rivals)
    assert mlp_config.FusedConfig(256, 64, 4, 2) not in tune.PARTS["fused"].rivals(128)


def test_keys_are_those_that_the_kernels_use() -> None:
    """Patched with a tile of its own, an entry shows in the launches of what `keys` says."""
    for name, part in tune.PARTS.items():
        for shape in resources.SHAPES:
            for dtype in ("float32", "bfloat16"):
                rows, kind = shape[2] * shape[3], resources.DTYPES[dtype]
                used = set()
                for key, tiles in part.table.items():
                    plain = launches(shape, dtype)
                    mark = part.make(*(16 for _ in part.numbers))
                    with tune.using(tiles, mark):
                        if launches(shape, dtype) != plain:
                            used.add(key)
                keys = part.keys(shape[1], rows, kind)
                if name == "fused" and not keys:  # above 192 channels, or two products by choice
                    used = set()
                assert used == set(keys), (name, shape, dtype)


def launches(shape: tuple[int, ...], dtype: str) -> list[tuple[Any, ...]]:
    uses = [resources.Use("mlp", d, shape, dtype, "nhwc") for d in ("forward", "backward")]
    made: list[ahead_of_time.Launch] = [x for u in uses for x in resources.call_on_meta(u)]
    return [(launch.compiles_as, launch.grid) for launch in made]


def test_tune_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        assert tune.main([]) == 2
    assert "PyTorch sees no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--channels", "60"],
        ["--tiles", "64,32,4,2"],
        ["--parts", "fused", "--tiles", "64,32,16,4,2"],
        ["--parts", "product", "--tiles", "64,32,4,2"],
    ],
)
def test_what_cannot_be_tuned_is_said(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        tune.parse(arguments)

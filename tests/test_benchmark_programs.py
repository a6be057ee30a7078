"""The benchmark programs and the demo, from their arguments to files and exit codes."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import bench_model, bench_ops, checkpoint, demo, models, photographs, plots
from benchmarks.report import read_csv, write_csv
from poolformer_kernels import PoolFormerImageProcessor

pytestmark = pytest.mark.usefixtures("threads")  # --threads sets them


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: str) -> str:
    """A folder with a small PoolFormer and its processor, as save_pretrained writes them."""
    PoolFormerImageProcessor(size=64, crop_size=64).save_pretrained(tiny_checkpoint)
    return tiny_checkpoint


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name, mode in (("b.png", "RGB"), ("a.png", "L"), ("c.png", "RGBA")):
        pixels = draw.integers(0, 256, (70, 90, len(mode)), dtype=np.uint8).squeeze()
        Image.fromarray(pixels, mode).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def is_png(path: Path) -> bool:
    with Image.open(path) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
        return image.format == "PNG" and min(image.size) > 200 and len(colours) > 5


OPS = ["--ops", "pool_mixer", "mlp", "--image-size", "32", "--batch", "1", "--rounds", "2",
       "--min-sample-ms", "0", "--threads", "1"]  # fmt: skip


@pytest.mark.parametrize("direction", [[], ["--backward"]])
def test_bench_ops(tmp_path, capsys, direction):
    assert bench_ops.main([*OPS, "--out", str(tmp_path), *direction]) == 0
    path = tmp_path / ("ops_backward.csv" if direction else "ops.csv")
    rows = read_csv(path)
    cells = {(r["op"], r["shape"], r["dtype"], r["layout"]) for r in rows}
    assert len(cells) == 2 * 4 * 2 * 2
    assert all(row["median_ms"] > 0 and row["p20_ms"] <= row["p80_ms"] for row in rows)
    assert is_png(path.with_suffix(".png"))
    assert "rows are slower than plain PyTorch" in capsys.readouterr().out


def test_bench_ops_reports_a_red_gate(tmp_path, capsys, monkeypatch):
    truth = bench_ops.make_case

    def broken(setting, names):
        made = truth(setting, names)
        reference = made.reference()
        made.reference = lambda: reference + 1
        return made

    monkeypatch.setattr(bench_ops, "make_case", broken)
    assert bench_ops.main([*OPS, "--out", str(tmp_path), "--ops", "group_norm"]) == 1
    assert "WRONG: torch, op group_norm" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_call_overhead(tmp_path, capsys):
    assert bench_ops.main(["--call-overhead", "--rounds", "2", "--out", str(tmp_path)]) == 0
    rows = read_csv(tmp_path / "call_overhead.csv")
    assert {row["autograd"] for row in rows} == {"off", "records"}
    plain = [row for row in rows if row["contender"] == "F.group_norm"]
    assert len(plain) == 8 and all(row["over_us"] == 0 for row in plain)
    assert "over F.group_norm" in capsys.readouterr().out


def test_bench_model(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(bench_model, "peak_memory", lambda *a: {1: 10.0, 2: 20.0})
    arguments = ["--checkpoint", tiny, "--image-size", "64", "--rounds", "2", "--batches", "1", "2",
                 "--dtypes", "float32", "bfloat16", "--out", str(tmp_path)]  # fmt: skip
    assert bench_model.main(arguments) == 0
    rows = read_csv(tmp_path / "model.csv")
    assert len(rows) == len(models.DEFAULT) * 2 * 2 * 2
    assert {(row["batch"], row["peak_mib"]) for row in rows} == {(1, 10), (2, 20)}
    first = next(row for row in rows if row["batch"] == 2)
    assert first["images_s"] == pytest.approx(2e3 / first["median_ms"], rel=1e-4)
    assert is_png(tmp_path / "model.png")


def test_a_contender_that_cannot_run_is_left_out_with_its_reason(tmp_path, tiny, capsys):
    names = ["eager", "accelerated (cuda)"]
    arguments = ["--checkpoint", tiny, "--image-size", "64", "--rounds", "1", "--batches", "1",
                 "--no-memory", "--contenders", *names, "--out", str(tmp_path)]  # fmt: skip
    assert bench_model.main(arguments) == 0
    assert "without accelerated (cuda): " in capsys.readouterr().out


def test_models_share_their_weights():
    model = models.weights("s12")
    assert model is models.weights("s12")
    again = models.weights.__wrapped__("s12")
    for (name, first), second in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second), name
    scales = torch.cat([p for name, p in model.named_parameters() if "layer_scale" in name])
    assert scales.min() >= 0.1 and scales.max() <= 0.5
    state = models.as_eager(model).state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_charts_of_one_contender(tmp_path):
    machine = {"cpu": "x", "cores": 2, "threads": 2, "capability": "AVX2", "torch": "2",
               "commit": "c", "package": "0", "date": "2026-01-01T00:00"}  # fmt: skip
    times = {"median_ms": 2.0, "p20_ms": 1.5, "p80_ms": 3.0, "speedup": 1.0, "contender": "torch"}
    cell = {"op": "mlp", "direction": "forward", "shape": "1x8x7x7", "dtype": "f", "layout": "nchw"}
    ops = write_csv(tmp_path / "ops.csv", [{**cell, **times}], machine)
    whole = write_csv(tmp_path / "m.csv", [{"variant": "s12", "batch": 1, **times}], machine)
    assert plots.main([str(ops), str(whole)]) == 0
    assert is_png(tmp_path / "ops.png") and is_png(tmp_path / "m.png")


@pytest.fixture
def demo_arguments(tmp_path, tiny, pictures, monkeypatch) -> list[str]:
    monkeypatch.setattr(bench_model, "peak_memory", lambda *a: {1: 10.0, 3: 20.0})
    return ["--image", str(pictures), "--checkpoint", tiny, "--rounds", "1",
            "--out", str(tmp_path / "out")]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_demo(tmp_path, capsys, demo_arguments, dtype):
    assert demo.main([*demo_arguments, "--dtype", dtype]) == 0
    printed = capsys.readouterr().out
    assert "photographs: 3" in printed and "the results agree" in printed
    assert "largest difference from float64: eager" in printed
    assert printed.index("a.png") < printed.index("b.png") < printed.index("c.png")
    rows = read_csv(tmp_path / "out" / "demo.csv")
    assert [row["batch"] for row in rows] == [1] * 4 + [3] * 4
    assert {row["peak_mib"] for row in rows} == {10, 20} and rows[0]["speedup"] == 1
    assert is_png(tmp_path / "out" / "demo.png")


def test_demo_takes_image_and_checkpoint_from_the_environment(monkeypatch, tiny, pictures):
    monkeypatch.setenv("IMAGE", str(pictures / "a.png"))
    monkeypatch.setenv("CHECKPOINT", tiny)
    options = demo.parse([])
    assert (options.image, options.checkpoint) == (str(pictures / "a.png"), tiny)
    monkeypatch.setenv("IMAGE", "")
    assert demo.parse([]).image is None


def test_demo_ends_with_1_if_the_accelerated_model_is_wrong(
    tmp_path, capsys, monkeypatch, demo_arguments
):
    right = models.CONTENDERS["accelerated"]

    def wrong(setting):
        forward = right(setting)
        return lambda pixels: -forward(pixels)

    monkeypatch.setitem(models.CONTENDERS, "accelerated", wrong)
    assert demo.main(demo_arguments) == 1
    captured = capsys.readouterr()
    assert "the results differ" in captured.out and "the results agree" not in captured.out
    assert captured.err.count("the best class is") == 3 and "accelerated, nchw" in captured.err
    assert not (tmp_path / "out").exists()


def test_demo_ends_with_2_if_it_cannot_start(capsys, demo_arguments, pictures):
    (pictures / "d.png").write_bytes((pictures / "b.png").read_bytes()[:2000])
    assert demo.main(demo_arguments) == 2
    assert "d.png' cannot be decoded" in capsys.readouterr().err
    for flag, message in (("--image", "no image file or folder"), ("--checkpoint", "There is no")):
        assert demo.main([*demo_arguments, "--limit", "2", flag, "/no/such/thing"]) == 2
        assert message in capsys.readouterr().err


def test_best_classes_may_differ_only_within_eagers_error():
    exact = torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64)
    near = torch.tensor([[1.0, 2.0, 0.0]]) + 1e-3
    path = [Path("x.png")]
    assert demo.disagreements(path, exact, near, near) == []
    swapped = torch.tensor([[2.0, 1.0, 0.0]])
    assert "x.png: the best class is 1 for eager and 0" in demo.disagreements(
        path, exact, near, swapped
    )[0]  # fmt: skip
    tie = torch.tensor([[2.0 - 1e-3, 2.0, 0.0]], dtype=torch.float64)
    assert demo.disagreements(path, tie, near + torch.tensor([1.0, 0, 0]), swapped) == []
    assert demo.disagreements(path, tie, tie.float(), swapped) != []


def test_photographs(pictures):
    found, left = photographs.find(str(pictures), 2)
    assert [path.name for path in found] == ["a.png", "b.png"] and left == 1
    assert photographs.find(str(pictures / "c.png"), 2) == ([pictures / "c.png"], 0)
    (pictures / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no image file in the folder"):
        photographs.find(str(pictures / "empty"), 2)


def test_shipped_photographs_are_real():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    paths, left = photographs.find(None, 16)
    assert {"china.jpg", "flower.jpg", "astronaut.png", "coffee.png"} <= {p.name for p in paths}
    values = PoolFormerImageProcessor()(paths, return_tensors="pt").pixel_values
    assert values.shape == (len(paths), 3, 224, 224) and values.std() > 0.5 and left == 0


def test_the_choice_of_weights(monkeypatch, tiny):
    def absent(local_files_only):
        raise FileNotFoundError("not cached")

    assert checkpoint.choose(tiny).source == tiny and checkpoint.choose(tiny).has_processor
    monkeypatch.setattr(checkpoint, "_release", absent)
    monkeypatch.setattr(checkpoint, "why_unreachable", lambda: "the hub is out of reach")
    seeded = checkpoint.choose(None, "m36")
    assert not seeded.trained and seeded.label == "m36" and not seeded.has_processor
    assert "seeded weights" in seeded.description and "out of reach" in seeded.description
    monkeypatch.setattr(checkpoint, "_release", lambda local_files_only: "the release")
    assert checkpoint.choose(None) == "the release"


def test_the_hub_is_given_up_quickly(monkeypatch):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in checkpoint.why_unreachable()
    silent = threading.Event()  # never set: a name lookup that hangs
    monkeypatch.setattr(checkpoint.urllib.request, "urlopen", lambda *a, **k: silent.wait())
    assert "did not answer within 0.1 s" in checkpoint.why_unreachable(0.1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert checkpoint.why_unreachable() == "HF_HUB_OFFLINE is set"


def test_the_demo_runs_as_a_module():
    command = [sys.executable, "-m", "benchmarks.demo", "--help"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and "--checkpoint" in done.stdout, done.stderr

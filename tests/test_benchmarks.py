"""The harness: it refuses wrong contenders, and its statistics are right on a clock of our own."""

import itertools
import math

import pytest
import torch

from benchmarks.harness import (
    Case,
    Contender,
    Disagreement,
    errors,
    gate,
    measure,
    run_case,
    run_cases,
    summarize,
)
from benchmarks.memory import peak_memory
from benchmarks.op_cases import Setting, make_case, stage_shapes
from benchmarks.report import environment, read_csv, table, write_csv

TRUTH = torch.linspace(-4, 4, 64, dtype=torch.float64)


class Clock:
    """Stands still but for `sleep`."""

    def __init__(self):
        self.now = 100.0
        self.log = []

    def __call__(self):
        return self.now

    def contender(self, name, *durations):
        turn = itertools.cycle(durations)

        def run():
            self.log.append(name)
            self.now += next(turn)
            return TRUTH.float()

        return Contender(name, run)


def constant(name, output):
    return Contender(name, lambda: output)


def case(*contenders, reference=TRUTH, dtype=torch.float32):
    return Case({"op": "test"}, list(contenders), lambda: reference, dtype)


def test_errors():
    assert 0 < errors(TRUTH.float(), TRUTH)[0] < 1e-6
    assert errors([TRUTH + 0.5, TRUTH], [TRUTH, TRUTH]) == [pytest.approx(0.5), 0.0]
    assert errors(TRUTH[:-1], TRUTH) == [math.inf]
    assert errors(TRUTH, [TRUTH, TRUTH]) == [math.inf, math.inf]
    assert errors(torch.where(TRUTH > 3, torch.nan, TRUTH), TRUTH) == [math.inf]
    assert errors(TRUTH.to(torch.bfloat16), TRUTH)[0] < 0.02
    assert errors(TRUTH[:0], TRUTH[:0]) == [0.0]


WRONG = {
    "off": TRUTH.float() + 1e-3,
    "one value": TRUTH.float().index_fill(0, torch.tensor([5]), 0.0),
    "NaN": torch.where(TRUTH > 3.9, torch.nan, TRUTH),
    "inf": torch.where(TRUTH > 3.9, torch.inf, TRUTH),
    "shape": TRUTH[None],
    "too few": [],
    "zeros": torch.zeros(64),
}


@pytest.mark.parametrize("output", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_contender_is_refused_and_nothing_is_timed(output):
    clock = Clock()
    wrong = case(constant("eager", TRUTH.float()), constant("fast but wrong", output))
    with pytest.raises(Disagreement, match=r"fast but wrong, op test: .*nothing was timed"):
        run_case(wrong, 3, clock=clock)
    right = case(constant("eager", TRUTH.float()), constant("fast", TRUTH.float()))
    shown = []
    rows, red = run_cases([wrong, right], 2, shown.append)
    assert [row["contender"] for row in rows] == ["eager", "fast"] and shown == [rows]
    assert len(red) == 1 and "2 times the baseline's error allows" in red[0]


def test_a_wrong_baseline_is_refused():
    with pytest.raises(Disagreement, match=r"eager, op test: .*rounding explains"):
        gate(case(constant("eager", TRUTH.float() * 1.01)))


def test_the_gate_allows_twice_the_baselines_error_and_two_roundings():
    def off(error, dtype=torch.float64):
        return constant(f"off {error}", (TRUTH + error).to(dtype))

    assert gate(case(off(1e-5), off(2e-5))) == pytest.approx(
        {"off 1e-05": 1e-5 / 4, "off 2e-05": 2e-5 / 4}
    )
    with pytest.raises(Disagreement):
        gate(case(off(1e-5), off(2.1e-5)))
    gate(case(off(0), off(4 * 2.3e-7)))
    with pytest.raises(Disagreement):
        gate(case(off(0), off(4 * 2.5e-7)))
    gate(case(off(0), off(0.05), dtype=torch.bfloat16))
    # Each output has its own scale: a wrong small one is not hidden by a large one.
    small = TRUTH * 1e-4
    pair = Case({}, [constant("eager", [TRUTH, small]), constant("b", [TRUTH, small + 5e-7])],
                lambda: [TRUTH, small])  # fmt: skip
    with pytest.raises(Disagreement, match="output 1 is off"):
        gate(pair)


def test_the_gate_holds_outputs_that_cancel_against_the_largest():
    zero = torch.full((3,), 1e-16, dtype=torch.float64)
    noise = [constant("eager", [TRUTH, zero + 1e-8]), constant("b", [TRUTH, zero - 3e-7])]
    gate(Case({}, noise, lambda: [TRUTH, zero]))
    noise[1] = constant("b", [TRUTH, zero + 1e-5])
    with pytest.raises(Disagreement, match="output 1 is off"):
        gate(Case({}, noise, lambda: [TRUTH, zero]))


def test_rounds_are_interleaved_and_rotate():
    clock = Clock()
    contenders = [clock.contender(name, 1.0) for name in "abc"]
    ticks = []
    samples = measure(contenders, 4, warmup=1, clock=clock, tick=lambda: ticks.append(clock.now))
    assert "".join(clock.log) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert samples == {name: [1.0] * 4 for name in "abc"} and len(ticks) == 12


def test_statistics_on_a_fake_clock():
    clock = Clock()
    slow = clock.contender("slow", *[0.010 * i for i in (5, 1, 4, 2, 3, 6)])
    fast = clock.contender("fast", 0.0175)
    # The gate and one warm-up call take the first two durations: 4, 2, 3, 6, 5 are left.
    first, second = run_case(case(slow, fast), 5, warmup=1, clock=clock)
    assert first["median_ms"] == pytest.approx(40) and first["speedup"] == pytest.approx(1)
    assert first["p20_ms"] == pytest.approx(28) and first["p80_ms"] == pytest.approx(52)
    assert second["median_ms"] == second["p20_ms"] == pytest.approx(17.5)
    assert second["speedup"] == pytest.approx(40 / 17.5) and second["rounds"] == 5
    assert second["error"] < 1e-7 and second["op"] == "test"


def test_short_calls_are_repeated_within_a_sample():
    clock = Clock()
    contenders = [clock.contender("short", 0.001), clock.contender("long", 0.5)]
    samples = measure(contenders, 2, warmup=1, min_sample_s=0.01, clock=clock)
    assert samples["short"] == [pytest.approx(0.001)] * 2 and samples["long"] == [0.5, 0.5]
    assert clock.log.count("short") == 1 + 2 * 10 and clock.log.count("long") == 1 + 2


def test_the_budget_ends_the_rounds():
    clock = Clock()
    contenders = [clock.contender("a", 1.0), clock.contender("b", 1.0)]
    assert len(measure(contenders, 9, budget_s=8.5, clock=clock)["b"]) == 5
    assert len(measure(contenders, 9, budget_s=0, clock=clock)["a"]) == 3
    assert len(measure(contenders, 2, budget_s=0, clock=clock)["a"]) == 2


def test_summaries():
    assert summarize([3.0]) == {"median": 3.0, "p20": 3.0, "p80": 3.0}
    assert summarize([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx(
        {"median": 3.5, "p20": 2.0, "p80": 5.0}
    )
    assert summarize([5.0, 1.0]) == pytest.approx({"median": 3.0, "p20": 1.8, "p80": 4.2})


def test_csv_and_table(tmp_path):
    machine = environment()
    needed = {"cpu", "capability", "cores", "threads", "torch", "python", "package", "commit"}
    assert needed | {"date"} <= set(machine) and machine["torch"] == torch.__version__
    rows = [{"op": "mlp", "median_ms": 1 / 3, "batch": 8}, {"op": "pool_mixer", "peak_mib": 7.0}]
    path = write_csv(tmp_path / "folder" / "some.csv", rows, machine)
    first, second = read_csv(path)
    assert first["op"] == "mlp" and first["median_ms"] == pytest.approx(1 / 3, rel=1e-5)
    assert first["peak_mib"] is None and second["peak_mib"] == 7.0 and second["batch"] is None
    assert first["cpu"] == second["cpu"] == machine["cpu"]
    text = table(rows, {"op": "op|<4", "median_ms": "ms|8.2f", "batch": "batch|3d"})
    assert text.splitlines() == [
        "op                ms  batch",
        "mlp             0.33      8",
        "pool_mixer         -      -",
    ]


def allocate(mib):
    """What test_peak_memory measures, in another process."""
    kept = torch.ones(mib * 2**18)
    return lambda size: torch.ones(size * 2**18).sum() + kept[0]


def test_peak_memory(capsys):
    peaks = peak_memory("tests.test_benchmarks:allocate", {"mib": 50}, [10, 100])
    assert 58 < peaks[10] < 90 and 148 < peaks[100] < 190
    assert peak_memory("tests.test_benchmarks:nothing", {}, [1]) == {}
    assert "no peak memory for {}: AttributeError" in capsys.readouterr().err


@pytest.mark.parametrize("op", ["pool_mixer", "mlp", "group_norm", "patch_embed"])
@pytest.mark.parametrize("backward", [False, True])
def test_op_cases_pass_their_gate(op, backward):
    for dtype, layout in itertools.product(("float32", "bfloat16"), ("nchw", "nhwc")):
        setting = Setting(op, (2, 16, 5, 6), dtype, layout, backward=backward)
        made = make_case(setting, ["cpu"])
        relative = gate(made)
        assert next(iter(relative)) == "torch" and all(e < 0.1 for e in relative.values())
        outputs = made.contenders[0].run()
        parameters = {"pool_mixer": 4, "mlp": 8, "group_norm": 3, "patch_embed": 3}[op]
        assert len(outputs) == (1 + parameters if backward else 2)
        x = outputs[0] if backward else outputs
        like = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        assert x.is_contiguous(memory_format=like)


def test_op_cases_catch_a_broken_op(monkeypatch):
    from poolformer_kernels import ops

    right = ops.pool_mixer
    monkeypatch.setattr(ops, "pool_mixer", lambda *a, backend=None, **k: right(*a, **k) * 1.001)
    monkeypatch.setattr(Setting, "why_not", lambda self, backend: None)
    with pytest.raises(Disagreement, match="cpu, op pool_mixer"):
        gate(make_case(Setting("pool_mixer", (1, 8, 4, 4)), ["cpu"]))


def test_stage_shapes():
    assert stage_shapes("s12", 8)[0] == (8, 64, 56, 56)
    assert stage_shapes("m48", 1)[3] == (1, 768, 7, 7)
    assert stage_shapes("s36", 2, 100)[3] == (2, 512, 4, 4)

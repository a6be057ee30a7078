"""The harness: contenders are checked against float64 first, and only then timed, in turns.

A contender is a name and a function of no arguments that returns a tensor or several. The baseline
is the first contender of a case; another one passes if each of its outputs is at most twice as far
from the float64 reference as the baseline's, plus two roundings of the largest value; other
engines are allowed four times, since the largest of many errors scatters, so that none is left out
for a rounding; their error is printed. One that fails leaves the case untimed, and the program ends
with exit code 1.

Rounds are interleaved, and their order rotates (A B C, B C A, C A B, ...), so that a change in
the machine's speed meets all contenders alike. Only ratios within one run travel.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Outputs = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Contender:
    """`run` does the timed work once and returns its outputs; `slack`: how wrong it may be."""

    name: str
    run: Callable[[], Outputs]
    slack: float = 2  # times the baseline's error


@dataclass
class Case:
    """What is compared: contenders (the first is the baseline) that all compute `reference`.

    labels: columns that tell this case from others, such as op, shape, dtype and layout.
    reference: the float64 outputs.
    dtype: what the contenders compute in; it sets the size of one rounding.
    """

    labels: dict[str, Any]
    contenders: list[Contender]
    reference: Callable[[], Outputs]
    dtype: torch.dtype = torch.float32
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)  # columns by contender


class Disagreement(RuntimeError):
    """A contender's outputs are wrong, so nothing was timed."""


def _tensors(outputs: Outputs) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def errors(outputs: Outputs, reference: Outputs) -> list[float]:
    """The largest absolute difference of each output; inf for a wrong shape or a NaN."""
    got, expected = _tensors(outputs), _tensors(reference)
    if len(got) != len(expected):
        return [math.inf] * len(expected)
    result = []
    for output, truth in zip(got, expected, strict=True):
        if output.shape != truth.shape:
            result.append(math.inf)
            continue
        difference = (output.detach().double().cpu() - truth.detach().double().cpu()).abs()
        largest = difference.max().item() if difference.numel() else 0.0
        result.append(largest if largest == largest else math.inf)
    return result


def gate(case: Case) -> dict[str, float]:
    """The error of every contender relative to the largest value, its worst output's.

    An output that is 0 in exact arithmetic, as some gradients are, is held against the largest
    output instead.
    Raises Disagreement if the baseline is off by more than rounding explains, or another contender
    by more than its slack allows.
    """
    with torch.no_grad():
        reference = _tensors(case.reference())
    scales = [t.detach().abs().max().item() if t.numel() else 0.0 for t in reference]
    largest = max(scales, default=0.0) or 1.0
    scales = [scale if scale > 1e-9 * largest else largest for scale in scales]
    epsilon = torch.finfo(case.dtype).eps
    bounds = [min(1000 * epsilon, 0.1) * scale for scale in scales]
    relative: dict[str, float] = {}
    for index, contender in enumerate(case.contenders):
        got = errors(contender.run(), reference)
        allowed = bounds if index == 0 else [contender.slack * bound for bound in bounds]
        for output, (error, bound) in enumerate(zip(got, allowed, strict=True)):
            if not error <= bound:
                against = f"{contender.slack:g} times the baseline's error allows"
                if index == 0:
                    against = "rounding explains"
                raise Disagreement(
                    f"{contender.name}, {describe(case.labels)}: output {output} is off by "
                    f"{error:.3g} (largest value {scales[output]:.3g}), {against} {bound:.3g}; "
                    "nothing was timed"
                )
        if index == 0:
            bounds = [e + epsilon * scale for e, scale in zip(got, scales, strict=True)]
        ratios = [error / scale for error, scale in zip(got, scales, strict=True)]
        relative[contender.name] = max(ratios, default=0.0)
    return relative


def describe(labels: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in labels.items())


def summarize(samples: Sequence[float]) -> dict[str, float]:
    """median, p20 and p80 (linear between the neighbouring samples)."""
    if len(samples) == 1:
        return {"median": samples[0], "p20": samples[0], "p80": samples[0]}
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return {"median": statistics.median(samples), "p20": fifths[0], "p80": fifths[3]}


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    contenders: Sequence[Contender],
    rounds: int,
    *,
    warmup: int = 2,
    min_sample_s: float = 0.0,
    budget_s: float = math.inf,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds a call of every contender, one sample a round.

    warmup: calls before the first sample, which also say how many calls make one sample of at least
        `min_sample_s`. budget_s: no new round after this time, but at least three.
    tick: called after every sample, for progress bars.
    """

    def sample(contender: Contender, calls: int) -> float:
        synchronize(device)
        start = clock()
        for _ in range(calls):
            contender.run()
        synchronize(device)
        return (clock() - start) / calls

    calls = {}
    for contender in contenders:
        last = min((sample(contender, 1) for _ in range(warmup)), default=math.inf)
        calls[contender.name] = max(1, round(min_sample_s / max(last, 1e-7)))
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    begin = clock()
    for turn in range(rounds):
        if turn >= 3 and clock() - begin > budget_s:
            break
        first = turn % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            samples[contender.name].append(sample(contender, calls[contender.name]))
            tick()
    return samples


def run_case(case: Case, rounds: int, **options: Any) -> list[dict[str, Any]]:
    """One row a contender: labels, error, milliseconds, and the speed-up over the baseline."""
    relative = gate(case)
    samples = measure(case.contenders, rounds, **options)
    baseline = statistics.median(samples[case.contenders[0].name])
    rows = []
    for contender in case.contenders:
        summary = summarize(samples[contender.name])
        rows.append(
            {
                **case.labels,
                "contender": contender.name,
                "median_ms": summary["median"] * 1e3,
                "p20_ms": summary["p20"] * 1e3,
                "p80_ms": summary["p80"] * 1e3,
                "speedup": baseline / summary["median"],
                "error": relative[contender.name],
                "rounds": len(samples[contender.name]),
                **case.extra.get(contender.name, {}),
            }
        )
    return rows


def run_cases(
    cases: Iterable[Case], rounds: int, show: Callable[[list[dict[str, Any]]], None], **options: Any
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of all cases, shown as they come, and what the gate said of those it stopped."""
    rows: list[dict[str, Any]] = []
    red: list[str] = []
    for case in cases:
        try:
            fresh = run_case(case, rounds, **options)
        except Disagreement as disagreement:
            red.append(str(disagreement))
            continue
        rows += fresh
        show(fresh)
    return rows, red

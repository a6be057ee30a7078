"""The demo: classifies real photographs with PoolFormer-S12, eager beside accelerated.

    make demo                                  # photographs of scikit-image and scikit-learn
    make demo IMAGE=cat.jpg CHECKPOINT=sail/poolformer_s12
    python -m benchmarks.demo --dtype bf16

The exit code is 0 only if the results agree: an accelerated model's logits are at most twice as far
from float64 as eager's, and the best class is the same (or float64 itself holds the two classes
closer together than twice eager's error). It is 2 if an image or a checkpoint cannot be used.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from poolformer_kernels import PoolFormerImageProcessor, backends
from poolformer_kernels.models.poolformer.variants import VARIANTS

from . import checkpoint, photographs, plots
from .bench_model import COLUMNS, add_memory, add_rates, make_case, make_forwards
from .harness import run_cases
from .models import EAGER_SOURCE, Setting, exact_logits, weights
from .op_cases import DTYPES
from .options import make_parser, prepare
from .report import table, write_csv

SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BUDGET_S = 25.0  # for the rounds of one batch size
OUT = Path(__file__).parent / "out"
EAGER, ACCELERATED = "eager, nchw", "accelerated, nchw"


def print_top(paths: Sequence[Path], logits: dict[str, Tensor], names: dict[int, str]) -> None:
    """The five best classes of every photograph, by each of `logits` ((B, classes))."""
    named = any(not name.startswith("LABEL_") for name in names.values())
    for index, path in enumerate(paths):
        print(path.name)
        for contender, values in logits.items():
            best = values[index].double().softmax(-1).topk(min(5, values.shape[-1]))
            cells = [
                f"{names[i].split(',')[0] if named else f'class {i}'} {100 * p:.1f} %"
                for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
            print(f"  {contender.split(',')[0]:<12} {' | '.join(cells)}")


def disagreements(
    paths: Sequence[Path], exact: Tensor, eager: Tensor, accelerated: Tensor
) -> list[str]:
    """Photographs whose best class differs by more than eager's own error explains."""
    found = []
    error = (eager.double() - exact).abs().amax(-1)
    for index, path in enumerate(paths):
        first, second = eager[index].argmax(), accelerated[index].argmax()
        gap = (exact[index, first] - exact[index, second]).abs()
        if first != second and not gap <= 2 * error[index]:
            found.append(
                f"{path.name}: the best class is {first} for eager and {second} for accelerated, "
                f"and float64 holds them {gap:.2g} apart"
            )
    return found


def describe_backends(setting: Setting) -> str:
    dtype = DTYPES[setting.dtype]
    ops = {"pool_mixer": None, "mlp": "gelu"}
    return ", ".join(
        f"{op} on {backends.resolve(op, setting.device, dtype, act)!r}" for op, act in ops.items()
    )


def check(
    setting: Setting, forwards: dict[str, Any], pixels: Tensor, paths: Sequence[Path]
) -> list[str]:
    """Prints the classes and the errors of both; returns what disagrees."""
    model = weights(setting.variant, setting.checkpoint)
    placed = setting.pixels(pixels)
    eager, accelerated = forwards[EAGER](placed).cpu(), forwards[ACCELERATED](placed).cpu()
    exact = exact_logits(setting, pixels)
    print_top(paths, {EAGER: eager, ACCELERATED: accelerated}, model.config.id2label)
    if setting.checkpoint is None:
        print("These classes mean nothing: the weights are not trained. Compare, do not read them.")
    errors = [(logits.double() - exact).abs().max().item() for logits in (eager, accelerated)]
    print(
        f"\nlargest difference from float64: eager {errors[0]:.2e}, accelerated {errors[1]:.2e} "
        f"(largest logit {exact.abs().max():.3g})"
    )
    return disagreements(paths, exact, eager, accelerated)


def bench(
    setting: Setting, forwards: dict[str, Any], pixels: Tensor, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of batch 1 and of the batch of all photographs, and what the gate stopped."""
    batches = [pixels[:1], pixels] if len(pixels) > 1 else [pixels]
    cases = [make_case(setting, forwards, batch) for batch in batches]
    samples = len(cases) * len(forwards) * options.rounds
    with tqdm(total=samples + len(forwards), unit=" steps", disable=None) as bar:
        bar.set_description("peak memory")
        add_memory(cases, setting, bar.update)
        bar.set_description("timing")
        rows, red = run_cases(
            cases,
            options.rounds,
            lambda _: None,
            warmup=1,  # after the gate's call
            budget_s=BUDGET_S,
            device=setting.device,
            tick=bar.update,
        )
        bar.update(bar.total - bar.n)  # of rounds that the budget left out
    add_rates(rows)
    return rows, red


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, 10, OUT)
    parser.add_argument(
        "--image",
        default=os.environ.get("IMAGE") or None,
        help="file or folder (or the environment's IMAGE); default: photographs of scikit-image "
        "and scikit-learn",
    )
    parser.add_argument(
        "--checkpoint",
        default=os.environ.get("CHECKPOINT") or None,
        help="path or hub name (or the environment's CHECKPOINT); default: the hub's release if "
        "within reach, else seeded weights",
    )
    parser.add_argument("--variant", default="s12", choices=VARIANTS, help="of seeded weights")
    parser.add_argument("--dtype", default="float32", choices=[*DTYPES, *SHORT])
    parser.add_argument("--limit", type=int, default=16, help="photographs at most")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    machine = prepare(options)
    try:
        paths, left = photographs.find(options.image, options.limit)
        chosen = checkpoint.choose(options.checkpoint, options.variant)
        processor = (
            PoolFormerImageProcessor.from_pretrained(chosen.source)
            if chosen.source is not None and chosen.has_processor
            else PoolFormerImageProcessor()
        )
        pixels = processor(list(paths), return_tensors="pt").pixel_values
        setting = Setting(
            chosen.label,
            SHORT.get(options.dtype, options.dtype),
            device=options.device,
            checkpoint=chosen.source,
        )
        weights(setting.variant, setting.checkpoint)
    except (OSError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    print(f"photographs: {len(paths)}" + (f" ({left} more left out)" if left else ""))
    print(f"weights: {chosen.description}")
    print(f"eager: {EAGER_SOURCE}; accelerated: the same with {describe_backends(setting)}\n")
    forwards, _ = make_forwards(setting, ["eager", "accelerated"], ["nchw", "nhwc"])
    red = check(setting, forwards, pixels, paths)
    rows, stopped = bench(setting, forwards, pixels, options)
    red += stopped
    if rows:
        print(f"\n{table(rows, COLUMNS)}")
        machine |= {"eager": EAGER_SOURCE, "weights": chosen.description.split(",")[0]}
        path = write_csv(options.out / "demo.csv", rows, machine)
        title = f"PoolFormer-{chosen.label.upper()}, {setting.dtype}: eager beside accelerated"
        print(f"wrote {path} and {plots.plot_models(path, title)}")
    for line in red:
        print(f"WRONG: {line}", file=sys.stderr)
    print("the results differ" if red else "the results agree")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())

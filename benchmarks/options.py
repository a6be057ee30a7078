"""Command-line options that all benchmark programs share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from .report import environment, print_environment


def make_parser(doc: str | None, rounds: int, out: Path) -> argparse.ArgumentParser:
    """A parser described by the first line of `doc`, with the shared options."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="default: as many as torch takes")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", type=Path, default=out, help="folder of the CSV and the chart")
    return parser


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Sets the threads, and prints and returns the environment."""
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = environment(options.device)
    print_environment(machine)
    return machine

"""What the MLP's Triton kernels may move and need: bytes, launches, registers, 64-bit offsets."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from cases import Case
from torch import Tensor

from poolformer_kernels import reference

pytest.importorskip("triton")
from mlp_checks import EPS, setup
from triton_mlp import MLP, counted, passes

from benchmarks import ahead_of_time
from poolformer_kernels.kernels import mlp as kernels
from poolformer_kernels.kernels import mlp_config


def launches_of(
    case: Case, autocast: bool, keep: bool
) -> tuple[Tensor, list[Tensor | None], list[dict[str, int]], list[dict[str, int]]]:
    """x and parameters of a case, and what each launch of its forward and its backward moves."""
    pytest.importorskip("simgpu", reason="only the simulated GPU counts bytes")
    dtype = torch.float32 if autocast else torch.bfloat16
    x, params, options, dz = setup(case, dtype)
    params[2], params[4] = params[2].bfloat16(), params[4].bfloat16()
    stats = MLP.there(reference.statistics(x, 1))
    params = [MLP.there(p) for p in params]
    x, dz = MLP.there(x, "channels_last"), MLP.there(dz, "channels_last")
    with counted() as ahead:
        _, saved, _, hidden = MLP.forward(x, params, options, stats, True, keep)
    with counted() as back:
        MLP.backward(dz, x, saved, hidden, params, options)
    return x, params, ahead, back


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("channels", "autocast", "keep", "most", "launches"),
    [
        (64, False, False, 2.1, 1),
        (64, False, True, 6.1, 1),  # the hidden is 4 S
        (64, True, True, 8.1, 1),
        (256, False, False, 11.1, 2),  # and so is what fc2 reads
        (256, False, True, 15.1, 2),
    ],
)
def test_bytes_of_a_forward(
    channels: int, autocast: bool, keep: bool, most: float, launches: int
) -> None:
    """Distinct bytes that the launches move, but for parameters, in passes S over a bf16 x."""
    x, params, ahead, _ = launches_of(Case((1, channels, 32, 16)), autocast, keep)
    moved = passes(ahead, x) * x.element_size() / 2
    moved -= sum(p.numel() * p.element_size() for p in params) / (2 * x.numel())
    assert len(ahead) == launches and moved <= most, moved


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("autocast", "keep", "most"), [(False, False, 27.5), (False, True, 26.5), (True, True, 32.5)]
)
def test_bytes_of_a_backward(autocast: bool, keep: bool, most: float) -> None:
    """As above, and without gradients of parameters and their parts, which no batch makes more."""
    batch, channels, height, width = shape = (1, 64, 56, 56)
    x, params, _, back = launches_of(Case(shape), autocast, keep)
    parts, _ = mlp_config.split(batch, height * width, 4 * channels, channels, torch.bfloat16)
    once = 2 * sum(p.numel() * p.element_size() for p in params)
    once += 2 * parts * (2 * 4 * channels * channels + 5 * channels) * 4
    moved = passes(back, x) * x.element_size() / 2 - once / (2 * x.numel())
    assert len(back) == 6 and moved <= most, moved


def meta_launches(
    shape: tuple[int, int, int, int], dtype: torch.dtype, keep: bool = False, autocast: bool = False
) -> list[Any]:
    """The launches of a forward, with statistics in and out, and a backward, in channels_last.

    dtype: of the products, and without autocast of all.
    """
    rest = torch.float32 if autocast else dtype

    def meta(*size: int, dtype: torch.dtype = rest) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    batch, channels, hidden = shape[0], shape[1], 4 * shape[1]
    x = meta(*shape).contiguous(memory_format=torch.channels_last)
    vector, factor = meta(channels), meta(batch, dtype=torch.float32)
    weights = meta(hidden, channels, dtype=dtype), meta(channels, hidden, dtype=dtype)
    params = [vector, vector, weights[0], meta(hidden), weights[1], vector, vector]
    stats, saved = (meta(batch, 1, *n, dtype=torch.float32) for n in ((8, 3), (2,)))
    with ahead_of_time.recorded() as launches:
        *_, kept = kernels.forward(x, stats, *params, factor, None, "gelu", 1, EPS, True, keep)
        kernels.backward(x, x, saved, kept, *params, factor, None, "gelu")
    return launches


# The hidden passes 2³¹ elements long before x does.
GROWING = {"x_ptr", "dz_ptr", "z_ptr", "dx_ptr", "hidden_ptr", "activated_ptr", "gradient_ptr"}
GROWING |= {"products_ptr", "saved_ptr", "stats_ptr", "sums_ptr", "stats_out_ptr"}


def first_offsets(ttir: str, argument: str) -> set[str]:
    """The integer types of what a kernel adds to this pointer itself, alone or in a tile."""
    pointers, types = {argument}, set()
    for name, base in re.findall(r"%(\w+) = tt\.(?:splat|broadcast) %(\w+)", ttir):
        if base in pointers:
            pointers.add(name)
    for base, kind in re.findall(r"tt\.addptr %(\w+), .*, (?:tensor<[\dx]*)?(i\d+)", ttir):
        if base in pointers:
            types.add(kind)
    return types


def test_offsets_beyond_2_to_the_31_elements_are_64_bit() -> None:
    """Each tensor that grows with the batch is entered by a 64-bit offset, that of its image."""
    found = set()
    for channels, keep in itertools.product((64, 208), (False, True)):
        launches = meta_launches((4096, channels, 112, 112), torch.bfloat16, keep)
        assert len(launches) == (7 if channels == 64 else 8)
        for launch in launches:
            names = {n for n, _ in launch.signature if n in GROWING}
            if launch.name == "weight_gradients_kernel":  # it goes through the parts one by one
                names.clear()
            code = ahead_of_time.compiled(launch, "sm_80")
            for name in names - dict(launch.constants).keys():
                types = first_offsets(code.ttir, name)  # none: that variant does not read it
                assert types <= {"i64"}, f"{launch.name}, {name}"
                found |= {name} if types else set()
    assert found == GROWING

"""Checks of an implementation of mlp on GPUs: the same for each, by its launchers' signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import torch
from cases import CASES, Case
from torch import Tensor

from poolformer_kernels import reference
from poolformer_kernels.ops._common import empty_like_op_output

EPS = 1e-5
SHAPES = [
    *(CASES[i] for i in (0, 1, 2, 3, 4, 5, 7)),
    Case((2, 1, 3, 2), hidden=5),
    Case((1, 64, 13, 8), mean=3.0),
    Case((1, 128, 9, 8), hidden=72, act="gelu_pytorch_tanh"),
    Case((2, 192, 3, 5), hidden=40, drop=True, act="silu"),
    Case((2, 200, 5, 5), hidden=72, act="relu", mean=3.0, drop=True),
    Case((1, 256, 13, 8), hidden=128),
]
Forward = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def on(device: str, t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(device)


def arguments(
    case: Case, dtype: torch.dtype, products: torch.dtype | None = None
) -> tuple[Tensor, list[Tensor | None], dict[str, Any]]:
    """x, parameters and options; weights in `products` if that is given."""
    x, params = cases.random_input(case, "nchw", dtype), cases.parameters("mlp", case, dtype)
    if products is not None:
        params[2], params[4] = (params[i].to(products) for i in (2, 4))
    return x, params, cases.options("mlp", case)


def launch(
    forward: Forward,
    x: Tensor,
    params: list[Tensor | None],
    options: dict[str, Any],
    stats: Tensor | None = None,
    return_stats: bool = False,
    save_hidden: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `forward` gives on x's device, wherever the other tensors are."""
    factors = (options.get("drop_path"), options.get("hidden_drop_path"))
    rest = [on(str(x.device), t) for t in (*params, *factors)]
    act, groups = options["act"], options["num_groups"]
    return forward(x, stats, *rest, act, groups, EPS, return_stats, save_hidden)


def merged(stats: Tensor) -> Tensor:
    """(count, mean, M2) of partial ones: (B, G, P, 3) to (B, G, 3), in float64."""
    count, mean, m2 = stats.cpu().double().unbind(-1)
    total = count.sum(-1)
    center = (count * mean).sum(-1) / total
    m2 = (m2 + count * (mean - center[..., None]) ** 2).sum(-1)
    return torch.stack([total, center, m2], -1)


def exact_hidden(x: Tensor, params: list[Tensor | None], groups: int) -> Tensor:
    """fc1's result before the activation in float64: (B, H, W, hidden)."""
    gamma, beta, w1, b1 = (None if p is None else p.double() for p in params[:4])
    normed = torch.group_norm(x.double(), groups, gamma, beta, EPS)
    h = normed.permute(0, 2, 3, 1) @ w1.flatten(1).t()
    return h if b1 is None else h + b1


def assert_forward(
    forward: Forward, partials: Callable[..., int], case: Case, layout: str, dtype: torch.dtype
) -> None:
    """z against float64 and eager on the CPU, its layout, and its statistics."""
    x, params, options = arguments(case, dtype)
    x_there = cases.layout_of(x.cuda(), layout)
    if layout == "expanded" and case.shape[0]:
        x, x_there = (t[:1].expand(case.shape) for t in (x, x_there))
    z, saved, stats, hidden = launch(forward, x_there, params, options, return_stats=True)
    eager = cases.run(reference.mlp, x, params, **options)
    exact = cases.oracle("mlp", x, params, **options)
    cases.assert_as_exact_as_eager([z.cpu()], eager, exact)
    assert z.stride() == empty_like_op_output(x_there).stride()
    assert saved.shape == (case.shape[0], case.num_groups, 2) and hidden.shape == (0,)
    assert stats.shape == (case.shape[0], case.num_groups, partials(case, z), 3)
    if case.shape[0]:
        of_result = reference.statistics(z.cpu().double(), case.num_groups)[:, :, 0]
        torch.testing.assert_close(merged(stats), of_result, rtol=1e-5, atol=1e-5)


def assert_mixed(forward: Forward, case: Case, layout: str, products: torch.dtype) -> None:
    """x in float32 and weights in `products`: as eager under autocast, but for roundings of z."""
    x, params, options = arguments(case, torch.float32, products)
    z, *_ = launch(forward, cases.layout_of(x.cuda(), layout), params, options)
    with torch.autocast("cpu", dtype=products):
        eager = cases.run(reference.mlp, x, params, **options)
    exact = cases.oracle("mlp", x, params, **options)
    assert z.dtype == torch.float32
    cases.assert_as_exact_as_eager([z.cpu()], [eager[0].float()], exact)


def assert_hidden(forward: Forward, case: Case, dtype: torch.dtype) -> None:
    """The kept hidden, and that keeping it changes nothing else."""
    x, params, options = arguments(case, dtype)
    there = cases.layout_of(x.cuda(), "channels_last")
    z, *_ = launch(forward, there, params, options)
    with_hidden, _, _, hidden = launch(forward, there, params, options, save_hidden=True)
    batch, _, height, width = case.shape
    assert torch.equal(z, with_hidden) and hidden.is_contiguous()
    assert hidden.shape == (batch, height, width, params[2].shape[0]) and hidden.dtype == dtype
    exact = exact_hidden(x, params, case.num_groups)
    error = (hidden.cpu().double() - exact).norm()
    assert error <= 2 * torch.finfo(dtype).eps * exact.norm()


def assert_given_statistics(forward: Forward, case: Case) -> None:
    """Statistics that are given are merged and used, whatever x's are."""
    x, params, options = arguments(case, torch.float16)
    whole, saved, *_ = launch(forward, x.cuda(), params, options)
    halves = [reference.statistics(h.float(), case.num_groups) for h in (x[:, :, :2], x[:, :, 2:])]
    stats = torch.cat(halves, 2)
    parts, saved_too, *_ = launch(forward, x.cuda(), params, options, stats.cuda())
    torch.testing.assert_close(parts, whole, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(saved_too, saved, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(saved[..., 0].cpu(), merged(stats)[..., 1].float())
    wrong = stats * torch.tensor([1.0, 1.0, 4.0])
    z, *_ = launch(forward, x.cuda(), params, options, wrong.cuda())
    assert not torch.allclose(z, whole, atol=1e-2)

"""Checks of an implementation of mlp on GPUs: the same for each, by its launchers' signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
FAR_FROM_ZERO = [  # rounded before the norm, x would lose all of its digits
    Case((3, 32, 6, 5), mean=1000.0, drop=True),
    Case((2, 208, 4, 5), hidden=24, mean=1000.0, num_groups=2),
]


def on(device: str, t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(device)


def setup(
    case: Case, dtype: torch.dtype, products: torch.dtype | None = None
) -> tuple[Tensor, list[Tensor | None], dict[str, Any], Tensor]:
    """x, parameters, options and dz, in `dtype`; parameters have values that `products` holds."""
    x = cases.random_input(case, "nchw", dtype)
    params = cases.parameters("mlp", case, products or dtype)
    params = [None if p is None else p.to(dtype) for p in params]
    return x, params, cases.options("mlp", case), torch.randn(case.shape).to(dtype)


def merged(stats: Tensor) -> Tensor:
    """(count, mean, M2) of partial ones: (B, G, P, 3) to (B, G, 3), in float64."""
    count, mean, m2 = stats.cpu().double().unbind(-1)
    total = count.sum(-1)
    center = (count * mean).sum(-1) / total
    m2 = (m2 + count * (mean - center[..., None]) ** 2).sum(-1)
    return torch.stack([total, center, m2], -1)


def hidden_of(x: Tensor, params: list[Tensor | None], options: dict[str, Any]) -> Tensor:
    """fc1's result before the activation: (B, H, W, hidden)."""
    gamma, beta, fc1_weight, fc1_bias, *_ = params
    normed = torch.group_norm(x, options["num_groups"], gamma, beta, EPS).movedim(1, 3)
    return torch.nn.functional.linear(normed, fc1_weight, fc1_bias)


@dataclass(frozen=True)
class Launchers:
    """forward and backward of an implementation; its tensors are on `device`.

    partials: P of the statistics, from x's shape, groups, whether x is channels_last, the products'
    dtype and x's. statistics_rtol: of the statistics of z where its mean is above 100.
    """

    launch_forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    launch_backward: Callable[..., tuple[Tensor, ...]]
    partials: Callable[..., int]
    device: str = "cuda"
    statistics_rtol: float = 1e-5

    def there(self, t: Tensor | None, layout: str = "nchw") -> Tensor | None:
        """t on the device, in `layout`; "expanded" has its first image alone."""
        if t is None:
            return None
        if layout == "expanded" and len(t):
            return t[:1].to(self.device).expand(t.shape)
        return cases.layout_of(t.to(self.device), layout)

    def forward(
        self,
        x: Tensor,
        params: list[Tensor | None],
        options: dict[str, Any],
        stats: Tensor | None = None,
        return_stats: bool = False,
        save_hidden: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(z, saved, stats_out, hidden) on x's device, wherever the other tensors are."""
        factors = (options.get("drop_path"), options.get("hidden_drop_path"))
        rest = [on(str(x.device), t) for t in (*params, *factors)]
        act, groups = options["act"], options["num_groups"]
        return self.launch_forward(x, stats, *rest, act, groups, EPS, return_stats, save_hidden)

    def backward(
        self,
        dz: Tensor,
        x: Tensor,
        saved: Tensor,
        hidden: Tensor | None,
        params: list[Tensor | None],
        options: dict[str, Any],
    ) -> list[Tensor]:
        """dx, and the gradients of the parameters that are there."""
        factors = (options.get("drop_path"), options.get("hidden_drop_path"))
        rest = [on(str(x.device), t) for t in (*params, *factors)]
        dx, *grads = self.launch_backward(dz, x, saved, hidden, *rest, options["act"])
        there = [(g, p) for g, p in zip(grads, params, strict=True) if p is not None]
        assert dx.dtype == x.dtype and all(g.dtype == p.dtype for g, p in there)
        return [dx, *(g for g, _ in there)]

    def assert_right(
        self,
        case: Case,
        layout: str,
        dtype: torch.dtype,
        autocast: torch.dtype | None = None,
        keeps: tuple[bool, ...] = (False, True),
    ) -> None:
        """All that forward and backward return, against float64 and eager on the CPU.

        autocast: the products' dtype. keeps: whether the hidden is kept; both change no bit of z.
        """
        x, params, options, dz = setup(case, dtype, autocast)
        if layout == "expanded" and case.shape[0]:
            x, dz = (t[:1].expand(case.shape) for t in (x, dz))
        given = list(params)
        if autocast is not None:  # eager casts the weights and biases; ours get one bias as it is
            for index in (2, 4, 5 if layout == "nchw" else 3):
                given[index] = None if params[index] is None else params[index].to(autocast)
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            eager = cases.run(reference.mlp, x, params, dz, **options)
            eager.append(hidden_of(x, params, options))
        exact = cases.oracle("mlp", x, params, dz, **options)
        doubled = [None if p is None else p.double() for p in params]
        exact.append(hidden_of(x.double(), doubled, options))

        x_there, dz_there = self.there(x, layout), self.there(dz, layout)
        strides, groups = empty_like_op_output(x_there).stride(), case.num_groups
        partials = self.partials(x.shape, groups, strides[1] == 1, autocast or dtype, dtype)
        bits = []
        for keep in keeps:
            z, saved, stats, hidden = self.forward(x_there, given, options, None, True, keep)
            kept = hidden if keep else None
            ours = [z, *self.backward(dz_there, x_there, saved, kept, given, options)]
            assert z.stride() == ours[1].stride() == strides
            assert saved.shape == (case.shape[0], groups, 2)
            assert stats.shape == (case.shape[0], groups, partials, 3)
            ours = [t.cpu().to(e.dtype) for t, e in zip(ours, eager[:-1], strict=True)]
            ours.append(hidden.cpu() if keep else eager[-1])
            cases.assert_as_exact_as_eager(ours, eager, exact)
            assert hidden.is_contiguous() and hidden.dtype == (autocast or dtype)
            assert keep or hidden.shape == (0,)
            bits.append(z)
            if case.shape[0]:
                of_result = reference.statistics(z.cpu().double(), groups)[:, :, 0]
                close = self.statistics_rtol if case.mean > 100 else 1e-5
                torch.testing.assert_close(merged(stats), of_result, rtol=close, atol=1e-5)
        assert torch.equal(bits[0], bits[-1])

    def assert_given_statistics(self, case: Case, dtype: torch.dtype) -> None:
        """Statistics that are given are merged and used, whatever x's are."""
        x, params, options, _ = setup(case, dtype)
        whole, saved, *_ = self.forward(self.there(x), params, options)
        halves = (x[:, :, :2], x[:, :, 2:])
        stats = torch.cat([reference.statistics(h.float(), case.num_groups) for h in halves], 2)
        parts, saved_too, *_ = self.forward(self.there(x), params, options, self.there(stats))
        close = 1e-5 if dtype == torch.float32 else 2e-3
        torch.testing.assert_close(parts, whole, rtol=close, atol=close)
        torch.testing.assert_close(saved_too, saved, rtol=1e-5, atol=1e-5)
        mean = merged(stats)[..., 1].float()
        torch.testing.assert_close(saved[..., 0].cpu(), mean, rtol=1e-5, atol=1e-6)
        wrong = stats * torch.tensor([1.0, 1.0, 4.0])
        z, *_ = self.forward(self.there(x), params, options, self.there(wrong))
        assert not torch.allclose(z, whole, atol=1e-2)

    def assert_same_bits(self, case: Case) -> None:
        """Every result of two runs of the same, with the hidden kept and not."""
        x, params, options, dz = setup(case, torch.float16)

        def results() -> list[Tensor]:
            x_there, dz_there = self.there(x), self.there(dz)
            first = self.forward(x_there, params, options, None, True, True)
            both = (
                self.backward(dz_there, x_there, first[1], kept, params, options)
                for kept in (first[3], None)
            )
            return [*first, *(grad for grads in both for grad in grads)]

        assert all(torch.equal(a, b) for a, b in zip(results(), results(), strict=True))

    def assert_constant_image(self, case: Case) -> None:
        """Pixels that fill up a tile are not in its image: (0 − mean) / std of them is infinite."""
        x, params, options, dz = setup(case, torch.float16)
        x, dz = self.there(torch.full_like(x, 300.0)), self.there(dz)
        z, saved, _, hidden = self.forward(x, params, options, save_hidden=True)
        for kept in (hidden, None):
            grads = self.backward(dz, x, saved, kept, params, options)
            assert all(t.isfinite().all() for t in (z, *grads))

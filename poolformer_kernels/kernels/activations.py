"""Activation formulas of the MLP, with their derivatives; float32, branch-free. See csrc/math.h."""

import triton
import triton.language as tl


@triton.jit
def gelu_tail(x):
    """(a, Q(a), exp(-a²/2)) of a = min(|x|, 15), where Q(a) = 1 - Φ(a) = exp(-a²/2) N(a) / D(a).

    N / D is fitted to erfcx on [0, 15], to 7e-9: no cancellation in either tail.
    """
    a = tl.abs(x)
    a = tl.where(a > 15.0, 15.0, a)  # NaN stays
    gauss = tl.exp2(a * a * -0.72134752)
    top = a * 4.15322231e-3 + 4.08810973e-2
    bottom = a * 1.04104728e-2 + 0.10247983
    top = top * a + 0.183969066
    bottom = bottom * a + 0.471408516
    top = top * a + 0.439283371
    bottom = bottom * a + 1.20554805
    top = top * a + 0.5
    bottom = bottom * a + 1.6764518
    bottom = bottom * a + 1.0
    return a, gauss * (top / bottom), gauss


@triton.jit
def tanh_gate(x):
    """x σ(u), σ(u) and du/dx of u = 2 √(2/π) (x + 0.044715 x³)."""
    x = tl.where(x < -20.0, -20.0, x)  # so that x σ(u) is 0 and not inf · 0; NaN stays
    square = x * x
    gate = 1.0 / (1.0 + tl.exp(-x * (1.59576912 + square * 7.1354816e-2)))
    return x * gate, gate, 1.59576912 + square * 0.21406445


@triton.jit
def activate(x, ACT: tl.constexpr):
    """ACT(x)."""
    if ACT == "gelu":
        a, q, _ = gelu_tail(x)
        return tl.where(x < 0.0, 0.0, x) - a * q
    elif ACT == "gelu_pytorch_tanh":
        value, _, _ = tanh_gate(x)
        return value
    elif ACT == "silu":
        return x / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(ACT == "relu")
        return tl.where(x < 0.0, 0.0, x)


@triton.jit
def activate_with_slope(x, ACT: tl.constexpr):
    """ACT(x) and its derivative."""
    if ACT == "gelu":
        a, q, gauss = gelu_tail(x)
        value = tl.where(x < 0.0, 0.0, x) - a * q
        return value, tl.where(x < 0.0, q, 1.0 - q) + x * gauss * 0.39894228
    elif ACT == "gelu_pytorch_tanh":
        value, gate, slope = tanh_gate(x)
        return value, gate + value * (1.0 - gate) * slope
    elif ACT == "silu":
        gate = 1.0 / (1.0 + tl.exp(-x))
        return x * gate, gate + x * gate * (1.0 - gate)
    else:
        tl.static_assert(ACT == "relu")
        return tl.where(x < 0.0, 0.0, x), tl.where(x > 0.0, 1.0, 0.0)

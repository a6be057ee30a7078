// The activations of math.h, and those that only the CPU kernels have.
#pragma once

#include "vec.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

// kActivation(x) and its derivative.
template <Activation kActivation, class V>
POOLFORMER_INLINE ValueAndSlope<V> value_and_slope(V x) {
  if constexpr (kActivation == kReluSquared) {
    V zero = {}, positive = x < zero ? zero : x;
    return {positive * positive, positive + positive};
  } else {
    return activate_with_slope<kActivation>(x);
  }
}

#if defined(POOLFORMER_BF16)
// head 2^t; head: 2^f for 0 <= f < 1, times a constant, to 8e-5, from its coefficients.
PF_INLINE Vec<float> power_of_two(Vec<float> t, float c0, float c1, float c2, float c3) {
  Vec<float> f = _mm512_maskz_reduce_ps(0xffff, t, 1);  // t - floor(t)
  return _mm512_maskz_scalef_ps(0xffff, ((f * c3 + c2) * f + c1) * f + c0, t);
}

// gelu(x) for a result that becomes bfloat16: as in math.h, with Q(a) = 2^p(a) to 6.4e-4, an eighth
// of its last place. p: fitted to log2 Q on [0, 13.3], as the polynomials there.
PF_INLINE ValueAndSlope<Vec<float>> gelu_to_bf16(Vec<float> x) {
  const Vec<float> zero = {}, limit = zero + 15.f;
  Vec<float> a = _mm512_maskz_min_ps(0xffff, limit, magnitude(x));  // NaN stays
  Vec<float> p = a * -3.11340626e-7f + 1.74733694e-5f;
  p = p * a + -4.12817410e-4f;
  p = p * a + 5.41048826e-3f;
  p = p * a + -4.42221267e-2f;
  p = p * a + -0.473297365f;
  p = p * a + -1.14268738f;
  p = p * a + -1.00080919f;
  Vec<float> q = power_of_two(p, 0.999925258f, 0.695833193f, 0.226067917f, 7.80240582e-2f);
  Vec<float> bell = a * power_of_two(a * a * -0.72134752f, 0.398912463f, 0.277597281f,
                                     9.01880504e-2f, 3.11270957e-2f);
  Vec<float> tail = q - bell;
  return {_mm512_maskz_max_ps(0xffff, zero, x) - a * q, x < zero ? tail : 1.f - tail};
}
#endif

// The same for results that become F.
template <Activation kActivation, class F, class V>
PF_INLINE ValueAndSlope<V> value_and_slope_as(V x) {
#if defined(POOLFORMER_BF16)
  if constexpr (kActivation == Activation::kGelu && std::is_same_v<F, bf16>) return gelu_to_bf16(x);
#endif
  return value_and_slope<kActivation>(x);
}

// f(std::integral_constant of `activation`)
template <class F>
static void with_activation(Activation activation, F&& f) {
  if (activation == kReluSquared) return f(std::integral_constant<Activation, kReluSquared>{});
  switch (activation) {
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>{});
  }
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

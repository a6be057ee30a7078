// Activations and their derivatives. V is float, or a vector of floats of GCC and clang; double
// goes through libm.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define POOLFORMER_INLINE static __host__ __device__ __forceinline__
#else
#define POOLFORMER_INLINE static inline __attribute__((always_inline))
#endif

namespace poolformer {

enum class Activation : int { kGelu, kGeluTanh, kRelu, kSilu };

template <class V>
struct IntegersOf {
  using type = decltype(V{} < V{});
};
template <>
struct IntegersOf<float> {
  using type = int32_t;
};
template <>
struct IntegersOf<double> {
  using type = int64_t;
};

template <class To, class From>
POOLFORMER_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

constexpr float kTiny = 5.42101086e-20f;  // 2^-64

// exp(-(y + rest) / 2) / kTiny for 0 <= y <= 240 and a small rest, to 1 ulp.
// Polynomial: weighted least squares, reweighted towards the minimax, of exp on +-ln(2)/2: 2e-9.
template <class V>
POOLFORMER_INLINE V exp_of_half(V y, V rest) {
  using I = typename IntegersOf<V>::type;
  V shifted = y * -0.72134752f + 12582976.f;  // 64 + an integer, held in the low bits
  V n = shifted - 12582976.f;
  V r = (-y - n * 1.38671875f) - (n * -4.24388884e-4f + rest);
  V p = r * 2.16200716e-5f + 2.61712994e-4f;
  p = p * r + 2.60426407e-3f;
  p = p * r + 2.08330248e-2f;
  p = p * r + 0.124999978f;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  return bit_cast<V>(bit_cast<I>(p) + (bit_cast<I>(shifted) << 23));
}

template <class V>
POOLFORMER_INLINE V magnitude(V x) {
  using I = typename IntegersOf<V>::type;
  return bit_cast<V>(bit_cast<I>(x) & 0x7fffffff);
}

template <class V>
struct ValueAndSlope {
  V value, slope;
};

// x Phi(x) = max(x, 0) - |x| Q(|x|), where Q(a) = exp(-a^2 / 2) N(a) / D(a): no cancellation in
// either tail, and 0 in the limit. N / D: fitted as above to erfcx on [0, 15]: 7e-9.
// Its derivative is Phi(x) + x phi(x).
template <class V>
POOLFORMER_INLINE ValueAndSlope<V> gelu(V x) {
  using I = typename IntegersOf<V>::type;
  V zero = {}, limit = zero + 15.f;
  V a = magnitude(x);
  a = a > limit ? limit : a;                      // NaN stays
  V head = bit_cast<V>(bit_cast<I>(a) & ~0xfff);  // its square is exact
  V e = exp_of_half<V>(head * head, (a - head) * (a + head));
  V top = a * (4.15322231e-3f * kTiny) + 4.08810973e-2f * kTiny;
  V bottom = a * 1.04104728e-2f + 0.10247983f;
  top = top * a + 0.183969066f * kTiny;
  bottom = bottom * a + 0.471408516f;
  top = top * a + 0.439283371f * kTiny;
  bottom = bottom * a + 1.20554805f;
  top = top * a + 0.5f * kTiny;
  bottom = bottom * a + 1.6764518f;
  bottom = bottom * a + 1.f;
  V tail = e * (top / bottom), bell = a * e * (0.39894228f * kTiny);
  return {(x < zero ? zero : x) - (a * e) * (top / bottom),
          x < zero ? tail - bell : (1.f - tail) + bell};
}

// x s(u) and the derivative s(u) (1 + x u' (1 - s(u))), s(u) = 1 / (1 + exp(-u)).
template <class V>
POOLFORMER_INLINE ValueAndSlope<V> gate(V x, V u, V slope_of_u) {
  V zero = {}, one = zero + 1.f, limit = zero + 240.f;
  V y = magnitude(u) * 2.f;
  y = y > limit ? limit : y;
  V e = exp_of_half<V>(y, zero) * kTiny, total = e + 1.f;
  V value = (u < zero ? x * e : x) / total;
  return {value,
          (u < zero ? e : one) / total + value * slope_of_u * ((u < zero ? one : e) / total)};
}

// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
template <class V>
POOLFORMER_INLINE ValueAndSlope<V> gelu_tanh(V x) {
  V zero = {}, limit = zero + 20.f;
  V y = x < -limit ? -limit : x;  // 0 for -inf
  V square = y * y;
  V scale = square * 7.1354816e-2f + 1.59576912f;  // 2 sqrt(2 / pi) times 0.044715 and 1
  V slope = square * 0.21406445f + 1.59576912f;
  return gate<V>(y, y * scale, y > limit ? zero : slope);
}

template <class V>
POOLFORMER_INLINE ValueAndSlope<V> silu(V x) {
  V zero = {}, limit = zero - 130.f;
  V y = x < limit ? limit : x;
  return gate<V>(y, y, zero + 1.f);
}

template <class V>
POOLFORMER_INLINE ValueAndSlope<V> relu(V x) {
  V zero = {}, one = zero + 1;
  return {x < zero ? zero : x, x <= zero ? zero : one};
}

POOLFORMER_INLINE ValueAndSlope<double> gelu(double x) {
  double phi = 0.5 * erfc(x * -0.70710678118654752);
  return {x < -40 ? 0.0 : x * phi, phi + x * exp(-0.5 * x * x) * 0.39894228040143268};
}
POOLFORMER_INLINE ValueAndSlope<double> gelu_tanh(double x) {
  double u = 0.79788456080286536 * (x + 0.044715 * x * x * x);
  double s = x < -40 ? 0.0 : 1 / (1 + exp(-2 * u));
  double slope = 1.59576912160573071 * (1 + 0.134145 * x * x);
  return {x < -40 ? 0.0 : x * s, s + x * s * (1 - s) * slope};
}
POOLFORMER_INLINE ValueAndSlope<double> silu(double x) {
  double s = x < -800 ? 0.0 : 1 / (1 + exp(-x));
  return {x < -800 ? 0.0 : x * s, s * (1 + x * (1 - s))};
}

// act(x) and its derivative.
template <Activation kActivation, class V>
POOLFORMER_INLINE ValueAndSlope<V> activate_with_slope(V x) {
  if constexpr (kActivation == Activation::kGelu) return gelu(x);
  if constexpr (kActivation == Activation::kGeluTanh) return gelu_tanh(x);
  if constexpr (kActivation == Activation::kRelu) return relu(x);
  if constexpr (kActivation == Activation::kSilu) return silu(x);
}

template <Activation kActivation, class V>
POOLFORMER_INLINE V activate(V x) {
  return activate_with_slope<kActivation>(x).value;
}

}  // namespace poolformer

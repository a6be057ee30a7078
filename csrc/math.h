// Activation formulas. V is float, or a vector of floats of GCC and clang; double goes through
// libm.
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

// exp(-hi - lo) for 0 <= hi <= 86, with lo small: 1 ulp.
// Polynomial: weighted least squares, reweighted towards the minimax, on |r| <= ln(2)/2: 2e-9.
template <class V>
POOLFORMER_INLINE V exp_negative(V hi, V lo) {
  using I = typename IntegersOf<V>::type;
  V shifted = hi * -1.44269504f + 12582912.f;  // rounds to an integer, held in the low bits
  V n = shifted - 12582912.f;
  V r = (-hi - n * 0.693359375f) - (n * -2.12194442e-4f + lo);
  V p = r * 1.38368458e-3f + 8.37481581e-3f;
  p = p * r + 4.16682251e-2f;
  p = p * r + 0.166664198f;
  p = p * r + 0.499999911f;
  p = (p * r) * r + r;
  p = p + 1.f;
  return bit_cast<V>(bit_cast<I>(p) + (bit_cast<I>(shifted) << 23));
}

// x * Phi(x) = max(x, 0) - |x| * Q(|x|), where Q(a) = exp(-a^2 / 2) * t * P(t), t = 1 / (1 + 0.3
// a): no cancellation in either tail. P: fitted as above to erfcx on 0 <= a <= 13.5: 3.5e-9.
// gelu(-inf) is the limit, 0.
template <class V>
POOLFORMER_INLINE V gelu(V x) {
  using I = typename IntegersOf<V>::type;
  V zero = {}, limit = zero + 13.f;
  V a = x < zero ? -x : x;
  V outside = a > limit ? zero : zero + 1.f;
  a = a > limit ? limit : a;                      // NaN stays
  V head = bit_cast<V>(bit_cast<I>(a) & ~0xfff);  // head^2 / 2 is exact
  V t = 1.f / (a * 0.3f + 1.f);
  V p = t * -2.05946174e-2f + 0.112273261f;
  p = p * t - 0.227816939f;
  p = p * t + 0.191233337f;
  p = p * t - 7.89443552e-2f;
  p = p * t + 9.58872363e-2f;
  p = p * t + 7.84876198e-2f;
  p = p * t + 0.110213302f;
  p = p * t + 0.119574621f;
  p = p * t + 0.119686536f;
  V e = exp_negative<V>(head * head * 0.5f, (a - head) * (a + head) * 0.5f);
  return (x < zero ? zero : x) - (a * outside) * (e * (t * p));
}

// x / (1 + exp(-u)).
template <class V>
POOLFORMER_INLINE V gate(V x, V u) {
  V zero = {}, one = zero + 1.f, limit = zero + 86.f;
  V a = u < zero ? -u : u;
  a = a > limit ? limit : a;
  V e = exp_negative<V>(a, zero);
  V inside = u < -limit ? zero : one;
  return (u < zero ? (x * inside) * e : x) / (e + 1.f);
}

// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
template <class V>
POOLFORMER_INLINE V gelu_tanh(V x) {
  V zero = {}, limit = zero - 20.f;
  V y = x < limit ? limit : x;
  V cube = y * y * 7.1354814e-2f + 1.59576912f;  // 2 sqrt(2 / pi) times 0.044715 and 1
  return gate<V>(y, y * cube);
}

template <class V>
POOLFORMER_INLINE V silu(V x) {
  V zero = {}, limit = zero - 100.f;
  V y = x < limit ? limit : x;
  return gate<V>(y, y);
}

template <class V>
POOLFORMER_INLINE V relu(V x) {
  V zero = {};
  return x < zero ? zero : x;
}

POOLFORMER_INLINE double gelu(double x) {
  return x < -40 ? 0.0 : 0.5 * x * erfc(x * -0.70710678118654752);
}
POOLFORMER_INLINE double gelu_tanh(double x) {
  double u = 0.79788456080286536 * (x + 0.044715 * x * x * x);
  return x < -40 ? 0.0 : x / (1 + exp(-2 * u));
}
POOLFORMER_INLINE double silu(double x) { return x < -800 ? 0.0 : x / (1 + exp(-x)); }

template <Activation kActivation, class V>
POOLFORMER_INLINE V activate(V x) {
  if constexpr (kActivation == Activation::kGelu) return gelu(x);
  if constexpr (kActivation == Activation::kGeluTanh) return gelu_tanh(x);
  if constexpr (kActivation == Activation::kRelu) return relu(x);
  if constexpr (kActivation == Activation::kSilu) return silu(x);
}

}  // namespace poolformer

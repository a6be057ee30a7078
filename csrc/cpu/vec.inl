// Vectors of POOLFORMER_VECTOR_BYTES bytes through the extensions of GCC and clang, and
// conversions.
#pragma once

#include "../math.h"

namespace poolformer::cpu::POOLFORMER_ISA {

#define PF_INLINE_METHOD inline __attribute__((always_inline))
#define PF_INLINE static PF_INLINE_METHOD

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct rounded {  // a float that products take as bfloat16
  float value;
};

constexpr int kBytes = POOLFORMER_VECTOR_BYTES;
#if POOLFORMER_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr bool kManyRegisters = true;  // 32
#else
constexpr bool kManyRegisters = false;  // 16
#endif

template <class E, int kLanes>
struct VectorOf {
  typedef E type __attribute__((vector_size(sizeof(E) * kLanes)));
  typedef E loose __attribute__((vector_size(sizeof(E) * kLanes), aligned(alignof(E)), may_alias));
};

template <class A>
constexpr int kLanes = kBytes / sizeof(A);
template <class A>
constexpr int kPanel = 2 * kLanes<A>;  // lanes of a panel; the last may use one vector only
template <class A>
using Vec = typename VectorOf<A, kLanes<A>>::type;

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccumulatorOf<T>::type;

template <class A>
PF_INLINE Vec<A> splat(A value) {
  return value - Vec<A>{};  // exact, and folded to a broadcast: + 0 would change -0
}

template <class E, int kCount>
PF_INLINE typename VectorOf<E, kCount>::type load_raw(const void* p) {
  return *static_cast<const typename VectorOf<E, kCount>::loose*>(p);
}
template <class E, int kCount>
PF_INLINE void store_raw(void* p, typename VectorOf<E, kCount>::type v) {
  *static_cast<typename VectorOf<E, kCount>::loose*>(p) = v;
}

// F: float or a vector of floats; U: uint32_t or a vector of it, the low 16 bits used.
template <class F, class U>
PF_INLINE F bf16_to_float(U bits) {
  return bit_cast<F>(bits << 16);
}

template <class F, class U>
PF_INLINE U float_to_bf16(F value) {  // round to nearest, ties to even; NaN stays NaN
  U bits = bit_cast<U>(value);
  U rounded = bits + (((bits >> 16) & 1u) + 0x7fffu);
  return (value == value ? rounded : (bits | 0x400000u)) >> 16;
}

template <class F, class U>
PF_INLINE F half_to_float(U half) {
  U sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  U normal = (magnitude << 13) + 0x38000000u;  // exponent bias 127 - 15
  U special = (magnitude << 13) | 0x7f800000u;
  F small = bit_cast<F>(magnitude | 0x4b000000u) - 8388608.f;  // 2^23 + magnitude - 2^23
  U tiny = bit_cast<U>(small * 5.9604644775390625e-8f);        // subnormals: units of 2^-24
  U bits = magnitude >= 0x7c00u ? special : (magnitude < 0x400u ? tiny : normal);
  return bit_cast<F>(bits | sign);
}

template <class F, class U>
PF_INLINE U float_to_half(F value) {  // round to nearest, ties to even
  U bits = bit_cast<U>(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  U odd = (magnitude >> 13) & 1u;
  U normal = (magnitude + (odd + 0xfffu) - 0x38000000u) >> 13;
  U tiny = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000u;  // units of 2^-24, rounded
  U special = (magnitude > 0x7f800000u) ? (magnitude - magnitude) + 0x7e00u
                                        : (magnitude - magnitude) + 0x7c00u;
  U half = magnitude >= 0x47800000u ? special : (magnitude < 0x38800000u ? tiny : normal);
  return half | sign;
}

// 16 bits to the low half of 32. The generic form takes GCC five instructions on AVX2.
PF_INLINE VectorOf<uint32_t, kLanes<float>>::type widen(const void* p) {
#if POOLFORMER_VECTOR_BYTES == 64
  return (VectorOf<uint32_t, 16>::type)_mm512_maskz_cvtepu16_epi32(
      0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif POOLFORMER_VECTOR_BYTES == 32
  return (VectorOf<uint32_t, 8>::type)_mm256_cvtepu16_epi32(
      _mm_loadu_si128(static_cast<const __m128i*>(p)));
#else
  using U = VectorOf<uint32_t, kLanes<float>>::type;
  return __builtin_convertvector((load_raw<uint16_t, kLanes<float>>(p)), U);
#endif
}

#if defined(POOLFORMER_F16C)
PF_INLINE Vec<float> load_half(const f16* p) {
#if POOLFORMER_VECTOR_BYTES == 64
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
}

PF_INLINE void store_half(f16* p, Vec<float> value) {
#if POOLFORMER_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, value, 0));  // to nearest
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(value, 0));
#endif
}
#endif

// load<T> and store<T>: one vector of the accumulation type from and to T in memory.
template <class T>
PF_INLINE Vec<Acc<T>> load(const T* p) {
  constexpr int n = kLanes<Acc<T>>;
  if constexpr (sizeof(T) > 2) {
    return load_raw<Acc<T>, n>(p);
  } else {
    using U = typename VectorOf<uint32_t, n>::type;
#if defined(POOLFORMER_F16C)
    if constexpr (std::is_same_v<T, f16>) return load_half(p);
#endif
    U bits = widen(p);
    if constexpr (std::is_same_v<T, bf16>) return bf16_to_float<Vec<float>, U>(bits);
    return half_to_float<Vec<float>, U>(bits);
  }
}

template <class T>
PF_INLINE void store(T* p, Vec<Acc<T>> value) {
  constexpr int n = kLanes<Acc<T>>;
  if constexpr (sizeof(T) > 2) {
    store_raw<Acc<T>, n>(p, value);
  } else {
    using U = typename VectorOf<uint32_t, n>::type;
    using H = typename VectorOf<uint16_t, n>::type;
#if defined(POOLFORMER_F16C)
    if constexpr (std::is_same_v<T, f16>) return store_half(p, value);
#endif
#if defined(POOLFORMER_BF16)
    if constexpr (std::is_same_v<T, bf16>) {  // the instruction takes subnormal numbers for 0
      if (__builtin_expect(!_mm512_fpclass_ps_mask(value, 0x20), true)) {
        return store_raw<uint16_t, n>(p, bit_cast<H>(_mm512_cvtneps_pbh(value)));
      }
    }
#endif
    U bits;
    if constexpr (std::is_same_v<T, bf16>) {
      bits = float_to_bf16<Vec<float>, U>(value);
    } else {
      bits = float_to_half<Vec<float>, U>(value);
    }
    store_raw<uint16_t, n>(p, __builtin_convertvector(bits, H));
  }
}

template <class T>
PF_INLINE Acc<T> load1(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) return bf16_to_float<float, uint32_t>(p->bits);
  if constexpr (std::is_same_v<T, f16>) return half_to_float<float, uint32_t>(p->bits);
  if constexpr (std::is_same_v<T, rounded>) return p->value;
  if constexpr (std::is_same_v<T, Acc<T>>) return *p;
}

template <class T>
PF_INLINE void store1(T* p, Acc<T> value) {
  if constexpr (std::is_same_v<T, bf16>) p->bits = float_to_bf16<float, uint32_t>(value);
  if constexpr (std::is_same_v<T, f16>) p->bits = float_to_half<float, uint32_t>(value);
  if constexpr (std::is_same_v<T, rounded>) p->value = value;
  if constexpr (std::is_same_v<T, Acc<T>>) *p = value;
}

// out[0, n) = in[0, n) in the accumulation type; null gives `absent`.
template <class T>
static void load_all(const T* in, Acc<T>* out, int64_t n, Acc<T> absent) {
  constexpr int w = kLanes<Acc<T>>;
  int64_t i = 0;
  if (in == nullptr) {
    for (; i < n; ++i) out[i] = absent;
    return;
  }
  for (; i + w <= n; i += w) store(out + i, load(in + i));
  for (; i < n; ++i) out[i] = load1(in + i);
}

// out[c] = values[group of c] for the channels of one image; values: (groups).
template <class A>
static void spread_groups(const Image& in, const double* values, A* out) {
  int64_t size = in.group_channels();
  for (int64_t g = 0; g < in.groups; ++g) {
    for (int64_t c = g * size; c < (g + 1) * size; ++c) out[c] = static_cast<A>(values[g]);
  }
}

// A vector of the lanes of (a, b) from kFirst on.
template <class A, int kFirst, int... kLane>
PF_INLINE Vec<A> lanes_from(Vec<A> a, Vec<A> b, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (kFirst + kLane)...);
#else
  using I = typename IntegersOf<Vec<A>>::type;
  return __builtin_shuffle(a, b, I{(kFirst + kLane)...});
#endif
}
template <class A, int kFirst>
PF_INLINE Vec<A> lanes_from(Vec<A> a, Vec<A> b) {
  return lanes_from<A, kFirst>(a, b, std::make_integer_sequence<int, kLanes<A>>{});
}

// Halves are added to one another until one lane is left.
template <class A, int kDistance = kLanes<A> / 2>
PF_INLINE A sum_lanes(Vec<A> v) {
  v += lanes_from<A, kDistance>(v, v);
  if constexpr (kDistance > 1) return sum_lanes<A, kDistance / 2>(v);
  return v[0];
}

// One step of the transpose below: swaps the blocks of kDistance lanes off the diagonal.
template <class A, int kDistance, int... kLane>
PF_INLINE void exchange(Vec<A>& a, Vec<A>& b, std::integer_sequence<int, kLane...>) {
  constexpr int w = kLanes<A>;
#if defined(__clang__)
  Vec<A> low =
      __builtin_shufflevector(a, b, ((kLane & kDistance) ? w + kLane - kDistance : kLane)...);
  b = __builtin_shufflevector(a, b, ((kLane & kDistance) ? w + kLane : kLane + kDistance)...);
#else
  using I = typename IntegersOf<Vec<A>>::type;
  Vec<A> low = __builtin_shuffle(a, b, I{((kLane & kDistance) ? w + kLane - kDistance : kLane)...});
  b = __builtin_shuffle(a, b, I{((kLane & kDistance) ? w + kLane : kLane + kDistance)...});
#endif
  a = low;
}

template <class A, int kDistance = kLanes<A> / 2>
PF_INLINE void transpose(Vec<A>* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<A>; ++i) {
    if (i & kDistance) continue;
    exchange<A, kDistance>(rows[i], rows[i | kDistance],
                           std::make_integer_sequence<int, kLanes<A>>{});
  }
  if constexpr (kDistance > 1) transpose<A, kDistance / 2>(rows);
}

// load and store with V: the vector, or one value.
template <class V, class T>
PF_INLINE V load_as(const T* p) {
  if constexpr (std::is_same_v<V, Acc<T>>) return load1(p);
  if constexpr (std::is_same_v<V, Vec<Acc<T>>>) return load(p);
}

template <class T, class V>
PF_INLINE void store_as(T* p, V value) {
  if constexpr (std::is_same_v<V, Acc<T>>) store1(p, value);
  if constexpr (std::is_same_v<V, Vec<Acc<T>>>) store(p, value);
}

template <class V, class A>
PF_INLINE V splat_as(A value) {
  if constexpr (std::is_same_v<V, A>) return value;
  if constexpr (std::is_same_v<V, Vec<A>>) return splat(value);
}

// Calls f(i, V{}) to cover [0, n): V a vector as often as one fits, then one value.
template <class A, class F>
PF_INLINE void for_each_vector(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) f(i, Vec<A>{});
  for (; i < n; ++i) f(i, A{});
}

// v in the first `count` lanes, 0 in the others.
template <class A>
PF_INLINE Vec<A> first_lanes(Vec<A> v, int64_t count) {
  Vec<A> lane = {};
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = static_cast<A>(i);
  return lane < static_cast<A>(count) ? v : Vec<A>{};
}

// The first `count` values at p, 0 in the other lanes; nothing from `end` on is read.
template <class T>
PF_INLINE Vec<Acc<T>> load_first(const T* p, int64_t count, const T* end) {
  using A = Acc<T>;
  if (p + kLanes<A> <= end) return first_lanes<A>(load(p), count);
  Vec<A> v = {};
  for (int i = 0; i < kLanes<A>; ++i) v[i] = i < count ? load1(p + i) : A(0);
  return v;
}

PF_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
PF_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PF_INLINE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

template <class T>
PF_INLINE const T* as(const void* p) {
  return static_cast<const T*>(p);
}

// Calls f with a null pointer of the element type.
template <class F>
PF_INLINE void with_type(Dtype dtype, F&& f) {
  if (dtype == Dtype::kFloat32) f(static_cast<float*>(nullptr));
  if (dtype == Dtype::kBFloat16) f(static_cast<bf16*>(nullptr));
  if (dtype == Dtype::kFloat16) f(static_cast<f16*>(nullptr));
  if (dtype == Dtype::kFloat64) f(static_cast<double*>(nullptr));
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

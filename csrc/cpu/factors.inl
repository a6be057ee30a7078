// What products multiply: values of the accumulation type, or, where the CPU multiplies them
// natively, bfloat16 in pairs.
#pragma once

#include "vec.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

// Weights of type T are multiplied as F = Factor<T>.
template <class T>
struct FactorOf {
  using type = Acc<T>;
};
#if defined(POOLFORMER_BF16)
template <>
struct FactorOf<bf16> {
  using type = bf16;
};
template <>
struct FactorOf<rounded> {
  using type = bf16;
};
#endif
template <class T>
using Factor = typename FactorOf<T>::type;

// What the forward keeps of the hidden for the backward.
template <class T>
using Kept = std::conditional_t<std::is_same_v<T, rounded>, bf16, T>;

// Calls f with null pointers of x's type and of the weights'.
template <class Args, class F>
PF_INLINE void with_types(const Args& args, F&& f) {
  with_type(args.in.dtype, [&](auto* x) {
#if defined(POOLFORMER_BF16)
    if constexpr (std::is_same_v<decltype(x), float*>) {
      if (args.rounded_weights) return f(x, static_cast<rounded*>(nullptr));
    }
#endif
    f(x, x);
  });
}

// A step of a product takes as many values of k as fit in a lane of its sums: one, or two bfloat16
// that lie side by side. So a panel of factors has the value (k, lane) at place<F>(k, lane), and
// one more where k is odd, which has to be zero.
template <class F>
constexpr int kStep = sizeof(Acc<F>) / sizeof(F);
template <class F>
constexpr int kPanelStep = kPanel<Acc<F>> * kStep<F>;  // values of a panel in a step

template <class F>
PF_INLINE int64_t steps_of(int64_t depth) {
  return (depth + kStep<F> - 1) / kStep<F>;
}
template <class F>
PF_INLINE int64_t place(int64_t k, int64_t lane) {
  return k / kStep<F> * kPanelStep<F> + lane * kStep<F> + k % kStep<F>;
}
template <class F>
PF_INLINE int64_t panel_values(int64_t depth) {  // of `depth` values of k in all lanes
  return steps_of<F>(depth) * kPanelStep<F>;
}

// The factors of one step: of each lane, or of one place for all lanes.
template <class F>
PF_INLINE Vec<Acc<F>> load_factors(const F* p) {
  return load_raw<Acc<F>, kLanes<Acc<F>>>(p);
}
template <class F>
PF_INLINE Vec<Acc<F>> splat_factors(const F* p) {
  if constexpr (kStep<F> == 1) {
    return splat(*p);
  } else {
    using U = typename VectorOf<uint32_t, kLanes<float>>::type;
    uint32_t bits;
    memcpy(&bits, p, sizeof(bits));
    return bit_cast<Vec<float>>(U{} + bits);
  }
}

template <class F>
PF_INLINE Vec<Acc<F>> add_product(Vec<Acc<F>> sum, Vec<Acc<F>> a, Vec<Acc<F>> b) {
#if defined(POOLFORMER_BF16)
  if constexpr (kStep<F> == 2) {
    return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
  }
#endif
  return sum + a * b;
}

#if defined(POOLFORMER_BF16)
// Values of two vectors in order, and in turns: the factors of lanes whose first and second values
// are in `first` and `second`.
PF_INLINE Vec<float> in_order(Vec<float> first, Vec<float> second) {
  return bit_cast<Vec<float>>(_mm512_cvtne2ps_pbh(second, first));
}
PF_INLINE Vec<float> in_turns(Vec<float> first, Vec<float> second) {
  const __m512i turns = bit_cast<__m512i>(
      VectorOf<uint16_t, 32>::type{0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
  return bit_cast<Vec<float>>(
      _mm512_permutexvar_epi16(turns, bit_cast<__m512i>(in_order(first, second))));
}

// Stores a vector of each of two rows.
PF_INLINE void store_rows(bf16* to, int64_t stride, Vec<float> first, Vec<float> second) {
  __m512i both = bit_cast<__m512i>(in_order(first, second));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_maskz_extracti64x4_epi64(0xff, both, 0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + stride),
                      _mm512_maskz_extracti64x4_epi64(0xff, both, 1));
}
#endif

// Values in order as factors, zeros up to the end of the last step.
template <class T>
PF_INLINE void make_row(const T* from, int64_t count, Factor<T>* to) {
  using F = Factor<T>;
  int64_t i = 0;
#if defined(POOLFORMER_BF16)
  if constexpr (std::is_same_v<T, rounded>) {
    constexpr int w = kLanes<float>;
    for (; i + 2 * w <= count; i += 2 * w) {
      store_raw<float, w>(to + i, in_order(load(from + i), load(from + i + w)));
    }
  }
#endif
  if constexpr (std::is_same_v<F, Acc<T>>) {
    load_all<T>(from, to, count, F(0));
  } else {
    for (; i < count; ++i) store1(to + i, load1(from + i));
  }
  std::fill(to + count, to + steps_of<F>(count) * kStep<F>, F{});
}

// The step that begins with k, of get(k), and get(k + 1) where that is before the end.
template <class F, class Get>
PF_INLINE Vec<Acc<F>> step_of(int64_t k, int64_t end, Get&& get) {
  Vec<Acc<F>> v = get(k);
#if defined(POOLFORMER_BF16)
  if constexpr (kStep<F> == 2) v = in_turns(v, k + 1 < end ? get(k + 1) : Vec<Acc<F>>{});
#endif
  return v;
}

// Turns rows (rows, panel) of sums into factors; both may be the same memory. prepare(r, v): what
// becomes of the vector v of the row r. Of each row the first `lanes` are taken.
template <class F, class Prepare>
PF_INLINE void make_factors(const Acc<F>* rows, int64_t count, int64_t lanes, F* out,
                            Prepare&& prepare) {
  using A = Acc<F>;
  constexpr int n = kPanel<A>, w = kLanes<A>;
  for (int64_t r = 0; r < count; r += kStep<F>, rows += kStep<F> * n, out += kPanelStep<F>) {
    for (int64_t i = 0; i < lanes; i += w) {
      Vec<A> v =
          step_of<F>(r, count, [&](int64_t k) { return prepare(k, load(rows + (k - r) * n + i)); });
      store_raw<A, w>(out + i * kStep<F>, v);
    }
  }
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

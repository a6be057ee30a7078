// The kernels of a product: sums that stay in registers. Weights are read where they are, row by
// row and broadcast, and vectors run along the lanes (pixels); or, for a few pixels, along k.
#pragma once

#include "factors.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

constexpr int kRows = POOLFORMER_ROWS;  // with AVX2 kRows x 2 vectors of sums leave 4 registers

// Keeps a vector that is used several times in a register: read anew by each use, it would take
// more load units than there are.
#if defined(__x86_64__)
#define PF_KEEP(v) asm("" : "+v"(v))
#else
#define PF_KEEP(v)
#endif

// A left operand is kept in rows, whose steps follow one another, or in columns: all rows' values
// of a step, and after `stride` those of the next.
template <bool kColumns, class F>
constexpr int64_t row_at(int64_t row, int64_t stride) {
  return row * (kColumns ? kStep<F> : stride);
}

// Of a third vector a row, the first of the next panel: its distance from this panel's.
struct Next {
  int64_t right, out;
};

// Steps in the body of a loop: 3 in columns would be 6 % slower.
template <bool kColumns>
constexpr int kUnroll = kColumns ? 2 : 3;

template <bool kColumns, class F, int kCount, int kVectors>
PF_INLINE void multiply_step(const F* const* rows, int64_t stride, const F* panel, int64_t next,
                             int64_t step, Vec<Acc<F>> (&sums)[kCount][kVectors]) {
  using A = Acc<F>;
  Vec<A> in[kVectors];
#pragma GCC unroll 3
  for (int j = 0; j < kVectors; ++j) {
    in[j] = load_factors(panel + (j == 2 ? next : j * kLanes<A> * kStep<F>));
    PF_KEEP(in[j]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    const F* left = kColumns ? rows[0] + step * stride + i * kStep<F> : rows[i] + step * kStep<F>;
    Vec<A> value = splat_factors(left);
    PF_KEEP(value);
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) sums[i][j] = add_product<F>(sums[i][j], value, in[j]);
  }
}

// Matrices whose rows are cut into panels of kPanel lanes: row i of panel p (for factors, step i)
// is at p * distance + i * stride.
template <class T>
struct Panels {
  T* data;
  int64_t stride, distance;
};

template <bool kColumns, class F, int kCount, int kVectors>
static __attribute__((noinline)) void multiply(const F* left, int64_t left_stride, const F* panel,
                                               int64_t panel_stride, int64_t steps, Acc<F>* out,
                                               int64_t out_stride, bool add, Next next) {
  using A = Acc<F>;
  constexpr int w = kLanes<A>;
  Vec<A> sums[kCount][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    __builtin_prefetch(out + i * out_stride);
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) sums[i][j] = Vec<A>{};
  }
  const F* rows[kCount];
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) rows[i] = left + i * left_stride;
  int64_t k = 0;
#pragma GCC unroll 1
  for (; k + kUnroll<kColumns> <= steps; k += kUnroll<kColumns>) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll<kColumns>; ++u) {
      multiply_step<kColumns>(rows, left_stride, panel + (k + u) * panel_stride, next.right, k + u,
                              sums);
    }
  }
#pragma GCC unroll 1
  for (; k < steps; ++k) {
    multiply_step<kColumns>(rows, left_stride, panel + k * panel_stride, next.right, k, sums);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) {
      A* to = out + i * out_stride + (j == 2 ? next.out : j * w);
      store(to, add ? load(to) + sums[i][j] : sums[i][j]);
    }
  }
}

template <bool kColumns, class F, int kCount, int kVectors>
static void multiply_rows(int count, const F* left, int64_t left_stride, const F* panel,
                          int64_t panel_stride, int64_t steps, Acc<F>* out, int64_t out_stride,
                          bool add, Next next = {}) {
  if constexpr (kCount > 0) {
    if (count == kCount) {
      return multiply<kColumns, F, kCount, kVectors>(left, left_stride, panel, panel_stride, steps,
                                                     out, out_stride, add, next);
    }
    multiply_rows<kColumns, F, kCount - 1, kVectors>(count, left, left_stride, panel, panel_stride,
                                                     steps, out, out_stride, add, next);
  }
}

// out (rows, panels) (+)= left (rows, steps) times right (steps, panels). Of panels that hold no
// more than one vector the rest may be left out.
template <bool kColumns, class F, int kVectors = 2>
static void multiply_panels(int64_t rows, int64_t steps, int64_t panels, const F* left,
                            int64_t left_stride, const Panels<const F>& right,
                            const Panels<Acc<F>>& out, bool add) {
  for (int64_t p = 0; p < panels; ++p) {  // the panel stays in the first-level cache
    for (int64_t r = 0; r < rows; r += kRows) {
      int count = static_cast<int>(smaller(rows - r, kRows));
      multiply_rows<kColumns, F, kRows, kVectors>(
          count, left + row_at<kColumns, F>(r, left_stride), left_stride,
          right.data + p * right.distance, right.stride, steps,
          out.data + p * out.distance + r * out.stride, out.stride, add);
    }
  }
}

// out[i] = the sum of the lanes of sums[i].
template <class A, int kCount>
PF_INLINE void sum_each(const Vec<A> (&sums)[kCount], A (&out)[kCount]) {
  constexpr int w = kLanes<A>;
#pragma GCC unroll 4
  for (int first = 0; first < kCount; first += w) {
    Vec<A> block[w];
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) block[i] = first + i < kCount ? sums[first + i] : Vec<A>{};
    transpose<A>(block);
#pragma GCC unroll 4
    for (int half = w / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) block[i] += block[i + half];
    }
    memcpy(out + first, &block[0], smaller(w, kCount - first) * sizeof(A));
  }
}

// out[i][j] (+)= sum over k of left[i][k] * columns[j][k]: the vectors run along k.
template <class F, int kCount, int kPixels>
static __attribute__((noinline)) void multiply_columns(const F* left, int64_t stride,
                                                       const F* columns, int64_t column_stride,
                                                       int64_t depth, Acc<F>* out,
                                                       int64_t out_stride, bool add) {
  using A = Acc<F>;
  constexpr int w = kLanes<A> * kStep<F>;
  Vec<A> sums[kCount * kPixels] = {};
  int64_t k = 0;
  for (; k + w <= depth; k += w) {
    Vec<A> in[kPixels];
#pragma GCC unroll 4
    for (int j = 0; j < kPixels; ++j) in[j] = load_factors(columns + j * column_stride + k);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      Vec<A> row = load_factors(left + i * stride + k);
#pragma GCC unroll 4
      for (int j = 0; j < kPixels; ++j) {
        sums[i * kPixels + j] = add_product<F>(sums[i * kPixels + j], row, in[j]);
      }
    }
  }
  A results[kCount * kPixels];
  sum_each<A>(sums, results);
  for (int i = 0; i < kCount; ++i) {
    for (int j = 0; j < kPixels; ++j) {
      A sum = results[i * kPixels + j];
      for (int64_t rest = k; rest < depth; ++rest) {
        sum += load1(left + i * stride + rest) * load1(columns + j * column_stride + rest);
      }
      A* to = out + i * out_stride + j;
      *to = add ? *to + sum : sum;
    }
  }
}

// Pixels beyond a panel's vectors that are multiplied as columns instead of as one vector more.
constexpr int kLastPixels = 4;

template <class F, int kPixels>
static void multiply_columns_of(int count, int pixels, const F* left, int64_t stride,
                                const F* columns, int64_t column_stride, int64_t depth, Acc<F>* out,
                                int64_t out_stride, bool add) {
  if constexpr (kPixels > 1) {
    if (pixels < kPixels) {
      return multiply_columns_of<F, kPixels - 1>(count, pixels, left, stride, columns,
                                                 column_stride, depth, out, out_stride, add);
    }
  }
  constexpr int rows = kPixels > 2 ? kRows / 2 : kRows;  // their sums are kept in registers
  int i = 0;
  for (; i + rows <= count; i += rows) {
    multiply_columns<F, rows, kPixels>(left + i * stride, stride, columns, column_stride, depth,
                                       out + i * out_stride, out_stride, add);
  }
  for (; i < count; ++i) {
    multiply_columns<F, 1, kPixels>(left + i * stride, stride, columns, column_stride, depth,
                                    out + i * out_stride, out_stride, add);
  }
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

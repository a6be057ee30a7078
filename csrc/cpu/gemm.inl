// out[panel][row][lane] (+)= sum over k of weight[row][k] * panels[panel][k][lane]. Weights are
// read where they are, row by row and broadcast; the vectors run along the lanes (pixels).
#pragma once

#include "vec.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

constexpr int kRows = POOLFORMER_ROWS;  // kRows x 2 vectors of sums, 2 + 1 more: all registers
template <class A>
constexpr int kPanel = 2 * kLanes<A>;  // lanes of a panel; the last may use one vector only

template <class A, int kCount, int kVectors>
PF_INLINE void multiply_step(const A* const* rows, const A* panel, int64_t k,
                             Vec<A> (&sums)[kCount][kVectors]) {
  Vec<A> in[kVectors];
#pragma GCC unroll 2
  for (int j = 0; j < kVectors; ++j) in[j] = load(panel + j * kLanes<A>);
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    Vec<A> value = splat(rows[i][k]);
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sums[i][j] += value * in[j];
  }
}

template <class A, int kCount, int kVectors>
static __attribute__((noinline)) void multiply(const A* weight, int64_t stride, const A* panel,
                                               int64_t depth, A* out, bool add) {
  constexpr int w = kLanes<A>, n = kPanel<A>;
  Vec<A> sums[kCount][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sums[i][j] = Vec<A>{};
  }
  const A* rows[kCount];
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) rows[i] = weight + i * stride;
  int64_t k = 0;
#pragma GCC unroll 1
  for (; k + 2 <= depth; k += 2) {  // two at a time: 95 % of the peak, one at a time 83 %
    multiply_step<A, kCount, kVectors>(rows, panel + k * n, k, sums);
    multiply_step<A, kCount, kVectors>(rows, panel + (k + 1) * n, k + 1, sums);
  }
  if (k < depth) multiply_step<A, kCount, kVectors>(rows, panel + k * n, k, sums);
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {  // chunk by chunk: half the error of one long sum
      A* to = out + i * n + j * w;
      store(to, add ? load(to) + sums[i][j] : sums[i][j]);
    }
  }
}

template <class A, int kCount, int kVectors>
static void multiply_rows(int count, const A* weight, int64_t stride, const A* panel, int64_t depth,
                          A* out, bool add) {
  if constexpr (kCount > 0) {
    if (count == kCount)
      return multiply<A, kCount, kVectors>(weight, stride, panel, depth, out, add);
    multiply_rows<A, kCount - 1, kVectors>(count, weight, stride, panel, depth, out, add);
  }
}

// A product of weight (rows, depth) with `panels` panels, the last of them `last_lanes` lanes wide.
// `spare`: kRows * depth values, for weights of 16 bits.
template <class T>
static void gemm(const T* weight, int64_t stride, int64_t rows, int64_t depth, const Acc<T>* in,
                 int64_t in_stride, int64_t panels, int64_t last_lanes, Acc<T>* out,
                 int64_t out_stride, bool add, Acc<T>* spare) {
  using A = Acc<T>;
  for (int64_t r = 0; r < rows; r += kRows) {
    int count = static_cast<int>(rows - r < kRows ? rows - r : kRows);
    const A* block;
    int64_t block_stride;
    if constexpr (std::is_same_v<T, A>) {
      block = weight + r * stride;
      block_stride = stride;
    } else {
      for (int i = 0; i < count; ++i) {
        load_all<T>(weight + (r + i) * stride, spare + i * depth, depth, A(0));
      }
      block = spare;
      block_stride = depth;
    }
    for (int64_t p = 0; p < panels; ++p) {
      A* to = out + p * out_stride + r * kPanel<A>;
      const A* from = in + p * in_stride;
      if (p + 1 == panels && last_lanes <= kLanes<A>) {
        multiply_rows<A, kRows, 1>(count, block, block_stride, from, depth, to, add);
      } else {
        multiply_rows<A, kRows, 2>(count, block, block_stride, from, depth, to, add);
      }
    }
  }
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

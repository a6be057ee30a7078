// out[panel][row][lane] (+)= sum over k of weight[row][k] * panels[panel][k][lane]. Weights are
// read where they are, row by row and broadcast; the vectors run along the lanes (pixels).
#pragma once

#include "multiply.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

constexpr int64_t kDepth = 320;  // steps of a sum; sums of parts have half the error of a long one

// Whether there are enough panels for threads to take tiles of their own, so that they share no
// more than the weights: where they have no cache in common, what one writes is far from the other.
PF_INLINE bool own_tiles(int64_t panels, int64_t threads) {
  return threads > 1 && panels >= 3 * threads;
}

// Blocks of rows that a part of a panel is multiplied with while it is in the first-level cache.
constexpr int64_t kGroup = POOLFORMER_GROUP;

// Values that gemm needs beside its operands: rows that cannot be multiplied where they are, and
// the last pixels as columns.
constexpr int64_t gemm_spare(int64_t depth) { return (kGroup * kRows + kLastPixels) * (depth + 1); }

// Asks for rows that are needed soon, some lines at a time.
class Ahead {
 public:
  template <class T>
  Ahead(const T* rows, int64_t stride, int64_t count, int64_t depth)
      : row_(reinterpret_cast<const char*>(rows)),
        stride_(stride * sizeof(T)),
        line_(0),
        lines_((depth * sizeof(T) + kLine - 1) / kLine),
        left_(larger(count, 0) * lines_) {}

  int64_t left() const { return left_; }

  void ask(int64_t count) {
    for (count = smaller(count, left_), left_ -= count; count > 0; --count) {
      __builtin_prefetch(row_ + line_ * kLine);
      if (++line_ == lines_) line_ = 0, row_ += stride_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* row_;
  int64_t stride_, line_, lines_, left_;
};

// `count` rows of a weight as factors, zeros after the last of an odd number; `stride`: of the
// rows, and of the result.
template <class T>
static const Factor<T>* factors_of(const T* rows, int64_t count, int64_t depth, int64_t& stride,
                                   Factor<T>* spare) {
  using F = Factor<T>;
  if constexpr (std::is_same_v<T, F>) {
    if (depth % kStep<F> == 0) return rows;
  }
  int64_t wide = steps_of<F>(depth) * kStep<F>;
  for (int64_t i = 0; i < count; ++i) make_row<T>(rows + i * stride, depth, spare + i * wide);
  stride = wide;
  return spare;
}

// A product of weight (rows, depth) with `panels` panels, the last of them `last_lanes` lanes wide.
// `spare`: gemm_spare(depth) values; `most`: values in a sum before it is added to others.
template <class T>
static void gemm(const T* weight, int64_t stride, int64_t rows, int64_t depth, const Factor<T>* in,
                 int64_t in_stride, int64_t panels, int64_t last_lanes, Acc<T>* out,
                 int64_t out_stride, bool add, Acc<T>* spare,
                 int64_t most = kDepth * kStep<Factor<T>>) {
  using A = Acc<T>;
  using F = Factor<T>;
  constexpr int n = kPanel<A>, w = kLanes<A>;
  // Vectors a row: one alone loads more than it multiplies, and AVX-512 has registers for three.
  constexpr int kMost = kBytes == 64 && kStep<F> == 1 ? 3 : 2;
  F* memory = reinterpret_cast<F*>(spare);
  F* columns = memory + kGroup * kRows * (depth + 1);
  int last_columns = static_cast<int>(last_lanes % w);
  if (last_columns > kLastPixels) last_columns = 0;
  int64_t last_vectors = (last_lanes - last_columns + w - 1) / w;
  for (int j = 0; j < last_columns; ++j) {
    const F* last = in + (panels - 1) * in_stride + (last_vectors * w + j) * kStep<F>;
    for (int64_t k = 0; k < depth; ++k) columns[j * depth + k] = last[place<F>(k, 0)];
  }
  for (int64_t r = 0; r < rows; r += kGroup * kRows) {
    int64_t group = smaller(rows - r, kGroup * kRows), left_stride = stride;
    const F* left = factors_of<T>(weight + r * stride, group, depth, left_stride, memory);
    // The next rows come from memory while these are multiplied.
    Ahead ahead(weight + (r + group) * stride, stride, smaller(rows - r - group, group), depth);
    int64_t turns = panels * ((depth + most - 1) / most) * ((group + kRows - 1) / kRows);
    int64_t share = (ahead.left() + turns - 1) / turns;  // asked for at once, more would wait
    for (int64_t p = 0; p < panels; ++p) {
      A* to = out + p * out_stride + r * n;
      int64_t vectors = p + 1 < panels ? 2 : last_vectors;
      if (kMost == 3 && panels > 1 && last_vectors == 1) {  // which the panel before takes in
        vectors = p + 2 == panels ? 3 : p + 1 == panels ? 0 : 2;
      }
      for (int64_t k = 0; k < depth; k += most) {
        int64_t size = smaller(depth - k, most), steps = steps_of<F>(size);
        const F* from = in + p * in_stride + place<F>(k, 0);
        bool more = add || k > 0;
        for (int64_t i = 0; i < group; i += kRows) {
          int count = static_cast<int>(smaller(group - i, kRows));
          const F* block = left + i * left_stride + k;
          ahead.ask(share);
          if (vectors == 3) {
            multiply_rows<false, F, kRows, kMost>(count, block, left_stride, from, kPanelStep<F>,
                                                  steps, to + i * n, n, more,
                                                  {in_stride, out_stride});
          } else if (vectors == 2) {
            multiply_rows<false, F, kRows, 2>(count, block, left_stride, from, kPanelStep<F>, steps,
                                              to + i * n, n, more);
          } else if (vectors == 1) {
            multiply_rows<false, F, kRows, 1>(count, block, left_stride, from, kPanelStep<F>, steps,
                                              to + i * n, n, more);
          }
          if (p + 1 == panels && last_columns > 0) {
            multiply_columns_of<F, kLastPixels>(count, last_columns, block, left_stride,
                                                columns + k, depth, size,
                                                to + i * n + last_vectors * w, n, more);
          }
        }
      }
    }
  }
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

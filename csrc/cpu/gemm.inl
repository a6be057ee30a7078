// out[panel][row][lane] (+)= sum over k of weight[row][k] * panels[panel][k][lane]. Weights are
// read where they are, row by row and broadcast; the vectors run along the lanes (pixels).
#pragma once

#include "vec.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

constexpr int kRows = POOLFORMER_ROWS;  // kRows x 2 vectors of sums, 2 + 1 more: all registers
constexpr int64_t kDepth = 320;  // of one sum; sums of steps have half the error of a long one

// Keeps a vector that is used several times in a register: read anew by each use, it would take
// more load units than there are.
#if defined(__x86_64__)
#define PF_KEEP(v) asm("" : "+v"(v))
#else
#define PF_KEEP(v)
#endif

// Element (i, k) of a left operand is at i * stride + k, or, where it is kept in columns, at
// k * stride + i.
template <bool kColumns>
constexpr int64_t at(int64_t i, int64_t k, int64_t stride) {
  return kColumns ? k * stride + i : i * stride + k;
}

// Steps of k in the body of a loop: 3 in columns would be 6 % slower.
template <bool kColumns>
constexpr int kUnroll = kColumns ? 2 : 3;

template <bool kColumns, class A, int kCount, int kVectors>
PF_INLINE void multiply_step(const A* const* rows, int64_t stride, const A* panel, int64_t k,
                             Vec<A> (&sums)[kCount][kVectors]) {
  Vec<A> in[kVectors];
#pragma GCC unroll 2
  for (int j = 0; j < kVectors; ++j) {
    in[j] = load(panel + j * kLanes<A>);
    PF_KEEP(in[j]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    Vec<A> value = splat(kColumns ? rows[0][k * stride + i] : rows[i][k]);
    PF_KEEP(value);
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sums[i][j] += value * in[j];
  }
}

// Matrices whose rows are cut into panels of kPanel<A> lanes: row i of panel p is at
// p * distance + i * stride.
template <class A>
struct Panels {
  A* data;
  int64_t stride, distance;
};

template <bool kColumns, class A, int kCount, int kVectors>
static __attribute__((noinline)) void multiply(const A* left, int64_t left_stride, const A* panel,
                                               int64_t panel_stride, int64_t depth, A* out,
                                               int64_t out_stride, bool add) {
  constexpr int w = kLanes<A>;
  Vec<A> sums[kCount][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    __builtin_prefetch(out + i * out_stride);
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sums[i][j] = Vec<A>{};
  }
  const A* rows[kCount];
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) rows[i] = left + i * left_stride;
  int64_t k = 0;
#pragma GCC unroll 1
  for (; k + kUnroll<kColumns> <= depth; k += kUnroll<kColumns>) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll<kColumns>; ++u) {
      multiply_step<kColumns>(rows, left_stride, panel + (k + u) * panel_stride, k + u, sums);
    }
  }
#pragma GCC unroll 1
  for (; k < depth; ++k) {
    multiply_step<kColumns>(rows, left_stride, panel + k * panel_stride, k, sums);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      A* to = out + i * out_stride + j * w;
      store(to, add ? load(to) + sums[i][j] : sums[i][j]);
    }
  }
}

template <bool kColumns, class A, int kCount, int kVectors>
static void multiply_rows(int count, const A* left, int64_t left_stride, const A* panel,
                          int64_t panel_stride, int64_t depth, A* out, int64_t out_stride,
                          bool add) {
  if constexpr (kCount > 0) {
    if (count == kCount) {
      return multiply<kColumns, A, kCount, kVectors>(left, left_stride, panel, panel_stride, depth,
                                                     out, out_stride, add);
    }
    multiply_rows<kColumns, A, kCount - 1, kVectors>(count, left, left_stride, panel, panel_stride,
                                                     depth, out, out_stride, add);
  }
}

// out (rows, panels) (+)= left (rows, depth) times right (depth, panels).
template <bool kColumns, class A>
static void multiply_panels(int64_t rows, int64_t depth, int64_t panels, const A* left,
                            int64_t left_stride, const Panels<const A>& right, const Panels<A>& out,
                            bool add) {
  for (int64_t p = 0; p < panels; ++p) {  // the panel stays in the first-level cache
    for (int64_t r = 0; r < rows; r += kRows) {
      int count = static_cast<int>(smaller(rows - r, kRows));
      multiply_rows<kColumns, A, kRows, 2>(
          count, left + at<kColumns>(r, 0, left_stride), left_stride,
          right.data + p * right.distance, right.stride, depth,
          out.data + p * out.distance + r * out.stride, out.stride, add);
    }
  }
}

// out[i] (+)= sum over k of left[i][k] * column[k], for one pixel alone: the vectors run along k.
template <class A, int kCount>
static void multiply_column(int count, const A* left, int64_t stride, const A* column,
                            int64_t depth, A* out, int64_t out_stride, bool add) {
  if constexpr (kCount > 1) {
    if (count < kCount) {
      return multiply_column<A, kCount - 1>(count, left, stride, column, depth, out, out_stride,
                                            add);
    }
  }
  constexpr int w = kLanes<A>;
  Vec<A> sums[kCount][2];
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) sums[i][0] = sums[i][1] = Vec<A>{};
  int64_t k = 0;
  for (; k + 2 * w <= depth; k += 2 * w) {
    Vec<A> first = load(column + k), second = load(column + k + w);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      sums[i][0] += load(left + i * stride + k) * first;
      sums[i][1] += load(left + i * stride + k + w) * second;
    }
  }
  for (int i = 0; i < kCount; ++i) {
    Vec<A> both = sums[i][0] + sums[i][1];
    A sum = 0;
    for (int lane = 0; lane < w; ++lane) sum += both[lane];
    for (int64_t j = k; j < depth; ++j) sum += left[i * stride + j] * column[j];
    A* to = out + i * out_stride;
    *to = add ? *to + sum : sum;
  }
}

// Values that gemm needs beside its operands: weights of 16 bits as A, and one pixel as a column.
constexpr int64_t gemm_spare(int64_t depth) { return (kRows + 1) * depth; }

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

// A product of weight (rows, depth) with `panels` panels, the last of them `last_lanes` lanes wide.
// `spare`: gemm_spare(depth) values.
template <class T>
static void gemm(const T* weight, int64_t stride, int64_t rows, int64_t depth, const Acc<T>* in,
                 int64_t in_stride, int64_t panels, int64_t last_lanes, Acc<T>* out,
                 int64_t out_stride, bool add, Acc<T>* spare) {
  using A = Acc<T>;
  constexpr int n = kPanel<A>;
  A* column = spare + kRows * depth;
  for (int64_t k = 0; last_lanes == 1 && k < depth; ++k) {
    column[k] = in[(panels - 1) * in_stride + k * n];
  }
  for (int64_t r = 0; r < rows; r += kRows) {
    int count = static_cast<int>(smaller(rows - r, kRows));
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
    // The next rows come from memory while these are multiplied.
    Ahead ahead(weight + (r + kRows) * stride, stride, smaller(rows - r - kRows, kRows), depth);
    int64_t share = (ahead.left() + panels - 1) / panels;
    for (int64_t p = 0; p < panels; ++p) {
      ahead.ask(share);
      A* to = out + p * out_stride + r * n;
      const A* from = in + p * in_stride;
      for (int64_t k = 0; k < depth; k += kDepth) {
        int64_t size = smaller(depth - k, kDepth);
        bool more = add || k > 0;
        if (p + 1 < panels || last_lanes > kLanes<A>) {
          multiply_rows<false, A, kRows, 2>(count, block + k, block_stride, from + k * n, n, size,
                                            to, n, more);
        } else if (last_lanes > 1) {
          multiply_rows<false, A, kRows, 1>(count, block + k, block_stride, from + k * n, n, size,
                                            to, n, more);
        } else {
          multiply_column<A, kRows>(count, block + k, block_stride, column + k, size, to, n, more);
        }
      }
    }
  }
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

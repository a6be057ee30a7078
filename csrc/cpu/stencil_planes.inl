// P x - x of images in NCHW.
#pragma once

#include "stencil.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

// Stores a vector of a row, of which `count` lanes lie in the row. The lanes past them reach into
// the next row, which is written later; from `end` on nothing is written.
template <class T>
PF_INLINE void store_row(T* to, Vec<Acc<T>> v, int64_t count, const T* end) {
  if (to + kLanes<Acc<T>> <= end) return store(to, v);
  for (int64_t i = 0; i < count; ++i) store1(to + i, v[i]);
}

// Pools planes of NCHW with vectors along rows.
template <class T, bool kTransposed>
class PlanePool {
  using A = Acc<T>;
  static constexpr int w = kLanes<A>;

 public:
  static int64_t size(const PoolCut& cut, const Image& in) {
    int64_t wide = round_up(in.width, w), rows = cut.rows + 2 * cut.pad_h;
    return rows * wide + cut.rows * (wide + 2 * cut.pad_w) + wide + in.height + 2 * cut.pad_h +
           most_positions(cut.pad_h, in.height) * wide + w;
  }

  // memory: `size` values.
  PlanePool(const PoolCut& cut, const Image& in, const T* end, A* memory)
      : cut_(cut), in_(in), end_(end), wide_(round_up(in.width, w)) {
    stride_ = wide_ + 2 * cut.pad_w;
    plane_ = memory;
    sums_ = plane_ + (cut.rows + 2 * cut.pad_h) * wide_;
    column_ = sums_ + cut.rows * stride_;
    inverse_ = column_ + wide_;
    most_rows_ = most_positions(cut.pad_h, in.height);
    row_ = inverse_ + most_rows_ * wide_ + cut.pad_h;
    most_ = static_cast<A>(most_rows_ * most_positions(cut.pad_w, in.width));
    for (A* p = sums_; p < column_; ++p) *p = 0;
    for (int64_t i = 0; i < wide_; ++i) {
      column_[i] = weight_at<A, kTransposed>(i, cut.pad_w, in.width);
      for (int64_t rows = 0; rows < most_rows_; ++rows) {
        A count = kTransposed ? most_ : static_cast<A>(rows + 1) * column_[i];
        inverse_[rows * wide_ + i] = i < in.width ? A(1) / count : A(0);
      }
    }
    for (int64_t i = -cut.pad_h; i < in.height + cut.pad_h; ++i) {
      row_[i] = weight_at<A, kTransposed>(i, cut.pad_h, in.height);
    }
  }

  // Calls f(at, u, center, count) for the vectors of rows [first, last) of the plane x: u = P x - x
  // (or its transpose) and center = x, of which `count` lanes lie in the row, at offset `at`.
  template <class F>
  PF_INLINE_METHOD void operator()(const T* x, int64_t first, int64_t last, F&& f) {
    int64_t vectors = cut_.pad_h == 1 && cut_.pad_w == 1 ? wide_ / w : 0;
    if (vectors == 1) return slide<1>(x, first, last, f);
    if (vectors == 2) return slide<2>(x, first, last, f);
    if (vectors == 3) return slide<3>(x, first, last, f);
    if (vectors == 4) return slide<4>(x, first, last, f);
    through_memory(x, first, last, f);
  }

 private:
  // Windows of three by three, rows of kCount vectors: three of them stay in registers.
  template <int kCount, class F>
  PF_INLINE_METHOD void slide(const T* x, int64_t first, int64_t last, F&& f) {
    int64_t height = in_.height, width = in_.width, tail = width - (kCount - 1) * w;
    const A *column = column_, *row = row_;  // what is stored may alias members
    A most = most_;
    auto read = [&](int64_t h, Vec<A>* values, Vec<A>* weighted) {
      bool inside = h >= 0 && h < height;
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) {
        values[j] = Vec<A>{};
        if (inside) {
          const T* from = x + h * width + j * w;
          values[j] = j + 1 < kCount ? load(from) : load_first(from, tail, end_);
        }
        weighted[j] = values[j];
        if constexpr (kTransposed) weighted[j] *= row[h];
      }
    };
    Vec<A> center[kCount], next[kCount], top[kCount], middle[kCount], bottom[kCount];
    read(first - 1, center, top);
    read(first, center, middle);
    for (int64_t h = first; h < last; ++h) {
      read(h + 1, next, bottom);
      const A* inverse = inverse_ + (kTransposed ? 0 : positions(h, 1, height) - 1) * kCount * w;
      Vec<A> sums[kCount + 2] = {};
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) {
        sums[j + 1] = top[j] + middle[j] + bottom[j];
        if constexpr (kTransposed) sums[j + 1] *= load(column + j * w);
      }
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) {
        Vec<A> left = lanes_from<A, w - 1>(sums[j], sums[j + 1]);
        Vec<A> right = lanes_from<A, 1>(sums[j + 1], sums[j + 2]);
        Vec<A> count = kTransposed ? splat(most) : load(column + j * w) * row[h];
        Vec<A> u = left + sums[j + 1] + right - center[j] * count;
        f(h * width + j * w, u * load(inverse + j * w), center[j], j + 1 < kCount ? w : tail);
        top[j] = middle[j], middle[j] = bottom[j], center[j] = next[j];
      }
    }
  }

  // Windows of any size: rows and their sums go through memory.
  template <class F>
  PF_INLINE_METHOD void through_memory(const T* x, int64_t first, int64_t last, F&& f) {
    int64_t height = in_.height, width = in_.width, pad = cut_.pad_h, tail = width % w;
    int64_t pad_w = cut_.pad_w, wide = wide_;  // what is stored through vectors may alias members
    const A* column = column_;
    for (int64_t h = first - pad; h < last + pad; ++h) {
      const T* from = x + h * width;
      A* to = plane_ + (h - first + pad) * wide;
      int64_t i = 0;
      if (h < 0 || h >= height) {
        for (; i < wide; i += w) store(to + i, Vec<A>{});
        continue;
      }
      for (; i + w <= width; i += w) store(to + i, load(from + i));
      if (tail) store(to + i, load_first(from + i, tail, end_));
    }
    for (int64_t h = first; h < last; ++h) {
      const A* from = plane_ + (h - first) * wide;
      A* to = sums_ + (h - first) * stride_ + pad_w;
      const A* weights = row_ + h - pad;
      for (int64_t i = 0; i < width; i += w) {
        Vec<A> v = sum_rows<kTransposed, Vec<A>>(from + i, wide, 2 * pad + 1, weights);
        if constexpr (kTransposed) v *= load(column + i);
        store(to + i, v);
      }
    }
    for (int64_t h = first; h < last; ++h) {
      const A *sums = sums_ + (h - first) * stride_, *row = plane_ + (h - first + pad) * wide;
      const A* inverse = inverse_ + (kTransposed ? 0 : positions(h, pad, height) - 1) * wide;
      A rows = row_[h], most = most_;
      for (int64_t i = 0; i < width; i += w) {
        Vec<A> v = sum_columns<Vec<A>>(sums + i, 1, pad_w), center = load(row + i);
        Vec<A> count = kTransposed ? splat(most) : load(column + i) * rows;
        f(h * width + i, (v - center * count) * load(inverse + i), center, smaller(width - i, w));
      }
    }
  }

  const PoolCut& cut_;
  const Image& in_;
  const T* end_;  // of the tensor
  int64_t wide_, stride_;
  A* plane_;          // rows first - pad_h .. last + pad_h of x, zero outside
  A* sums_;           // their vertical sums, pad_w zeros left and right
  A *column_, *row_;  // weight_at
  A* inverse_;        // 1 / positions of windows of 1, 2, ... rows
  A most_;            // positions of a window
  int64_t most_rows_;
};

}  // namespace poolformer::cpu::POOLFORMER_ISA

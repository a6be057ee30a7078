// P x - x of images in channels_last.
#pragma once

#include "stencil.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

// Pools rows of channels_last with vectors along channels, a block of channels at a time.
template <class T, bool kTransposed>
class RowPool {
  using A = Acc<T>;

 public:
  static int64_t block(const PoolCut& cut, const Image& in) {
    return smaller(in.channels, larger(64, 16384 / (in.width + 2 * cut.pad_w) / 64 * 64));
  }
  static int64_t size(const PoolCut& cut, const Image& in) {
    return (in.width + 2 * cut.pad_w) * block(cut, in) + in.width + in.height;
  }

  // memory: `size` values.
  RowPool(const PoolCut& cut, const Image& in, A* memory)
      : cut_(cut), in_(in), column_(memory), row_(memory + in.width), sums_(row_ + in.height) {
    for (int64_t i = 0; i < in.width; ++i) {
      column_[i] = weight_at<A, kTransposed>(i, cut.pad_w, in.width);
    }
    for (int64_t i = 0; i < in.height; ++i) {
      row_[i] = weight_at<A, kTransposed>(i, cut.pad_h, in.height);
    }
    most_ =
        static_cast<A>(most_positions(cut.pad_h, in.height) * most_positions(cut.pad_w, in.width));
  }

  // Calls f(at, c, u, center) for rows [first, last) of the image x: u = P x - x (or its
  // transpose) and center = x, one vector or one value from channel c on, at offset `at`.
  template <class F>
  PF_INLINE_METHOD void operator()(const T* x, int64_t first, int64_t last, F&& f) {
    int64_t channels = in_.channels, most = block(cut_, in_), pad = cut_.pad_w;
    if (pad == 1) {
      for (int64_t h = first; h < last; ++h) slide(x, h, f);
      return;
    }
    for (int64_t start = 0; start < channels; start += most) {
      int64_t wide = smaller(most, channels - start);
      for (int64_t i = 0; i < pad * wide; ++i) {
        sums_[i] = 0;
        sums_[in_.width * wide + pad * wide + i] = 0;
      }
      for (int64_t h = first; h < last; ++h) one_row(x, h, start, wide, f);
    }
  }

 private:
  // Windows three wide: the sums of three columns stay in registers, for so many channels at a
  // time that what is read and written lies together.
  template <class F>
  PF_INLINE_METHOD void slide(const T* x, int64_t h, F&& f) {
    constexpr int w = kLanes<A>, kBlock = 64 / w < 8 ? 64 / w : 8;
    int64_t c = 0;
    slide_blocks<Vec<A>, kBlock>(x, h, c, f);
    slide_blocks<Vec<A>, kBlock / 2>(x, h, c, f);
    slide_blocks<Vec<A>, 1>(x, h, c, f);
    slide_blocks<A, 1>(x, h, c, f);
  }

  // From channel c on, as long as blocks are whole.
  template <class V, int kCount, class F>
  PF_INLINE_METHOD void slide_blocks(const T* x, int64_t h, int64_t& c, F&& f) {
    constexpr int64_t step = kCount * sizeof(V) / sizeof(A);
    int64_t top = larger(h - cut_.pad_h, 0);
    int64_t rows = smaller(h + cut_.pad_h, in_.height - 1) - top + 1;
    for (; c + step <= in_.channels; c += step) {
      if (rows == 3) {  // known there: no loop over rows
        slide_block<V, kCount>(x, h, top, 3, c, f);
      } else {
        slide_block<V, kCount>(x, h, top, rows, c, f);
      }
    }
  }

  template <class V, int kCount, class F>
  PF_INLINE_METHOD void slide_block(const T* x, int64_t h, int64_t top, int64_t rows, int64_t c,
                                    F&& f) {
    constexpr int lanes = sizeof(V) / sizeof(A);
    int64_t channels = in_.channels, width = in_.width, stride = width * channels;
    const A *weights = row_ + top, *columns = column_;  // what is stored may alias members
    const T* from = x + top * stride + c;
    A factor = kTransposed ? most_ : row_[h];
    auto column = [&](int64_t i, int j) {
      V v = sum_rows<kTransposed, V>(from + i * channels + j * lanes, stride, rows, weights);
      if constexpr (kTransposed) v *= columns[i];
      return v;
    };
    V left[kCount], middle[kCount];
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) left[j] = V{}, middle[j] = column(0, j);
    for (int64_t i = 0; i < width; ++i) {
      A count = kTransposed ? factor : factor * columns[i], inverse = A(1) / count;
      int64_t at = h * stride + i * channels + c;
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j) {
        V right = i + 1 < width ? column(i + 1, j) : V{};
        V v = left[j] + middle[j] + right, center = load_as<V>(x + at + j * lanes);
        f(at + j * lanes, c + j * lanes, (v - center * count) * inverse, center);
        left[j] = middle[j], middle[j] = right;
      }
    }
  }

  template <class F>
  PF_INLINE_METHOD void one_row(const T* x, int64_t h, int64_t start, int64_t wide, F&& f) {
    int64_t channels = in_.channels, width = in_.width, stride = width * channels;
    int64_t top = larger(h - cut_.pad_h, 0);
    int64_t rows = smaller(h + cut_.pad_h, in_.height - 1) - top + 1, pad = cut_.pad_w;
    A* sums = sums_;  // what is stored through vectors may alias members
    const A* row = row_ + top;
    for (int64_t i = 0; i < width; ++i) {
      const T* from = x + top * stride + i * channels + start;
      A *to = sums + (i + pad) * wide, column = column_[i];
      for_each_vector<A>(wide, [&](int64_t c, auto lanes) {
        using V = decltype(lanes);
        V v = sum_rows<kTransposed, V>(from + c, stride, rows, row);
        if constexpr (kTransposed) v *= column;
        store_as(to + c, v);
      });
    }
    for (int64_t i = 0; i < width; ++i) {
      int64_t at = h * stride + i * channels + start;
      A count = kTransposed ? most_ : row_[h] * column_[i], inverse = A(1) / count;
      for_each_vector<A>(wide, [&](int64_t c, auto lanes) {
        using V = decltype(lanes);
        V v = sum_columns<V>(sums + i * wide + c, wide, pad), center = load_as<V>(x + at + c);
        f(at + c, start + c, (v - center * count) * inverse, center);
      });
    }
  }

  const PoolCut& cut_;
  const Image& in_;
  A *column_, *row_;  // weight_at
  A most_;            // positions of a window
  A* sums_;           // (width + 2 pad_w, channels), its borders zero
};

}  // namespace poolformer::cpu::POOLFORMER_ISA

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
    if (pad == 1 && cut_.pad_h <= 1) {
      int64_t h = first;
      for (; h + kRowsAtOnce <= last; h += kRowsAtOnce) slide<kRowsAtOnce>(x, h, f);
      for (; h < last; ++h) slide<1>(x, h, f);
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
  // Windows of three by three: kRows rows of outputs at once, which share what they read. Sums of
  // three columns stay in registers, for so many channels as these hold.
  template <int kRows, class F>
  PF_INLINE_METHOD void slide(const T* x, int64_t h, F&& f) {
    int64_t c = 0;
    slide_blocks<Vec<A>, kManyRegisters ? 2 : 4, kRows>(x, h, c, f);
    slide_blocks<Vec<A>, 1, kRows>(x, h, c, f);
    slide_blocks<A, 1, kRows>(x, h, c, f);
  }

  // From channel c on, as long as blocks are whole.
  template <class V, int kCount, int kRows, class F>
  PF_INLINE_METHOD void slide_blocks(const T* x, int64_t h, int64_t& c, F&& f) {
    constexpr int64_t step = kCount * sizeof(V) / sizeof(A);
    for (; c + step <= in_.channels; c += step) slide_block<V, kCount, kRows>(x, h, c, f);
  }

  template <class V, int kCount, int kRows, class F>
  PF_INLINE_METHOD void slide_block(const T* x, int64_t h, int64_t c, F&& f) {
    constexpr int lanes = sizeof(V) / sizeof(A), kHigh = kRows + 2;
    static constexpr T kZeros[kCount * lanes] = {};
    int64_t channels = in_.channels, width = in_.width, stride = width * channels;
    const A *columns = column_, *heights = row_ + h;  // what is stored may alias members
    const T* from[kHigh];
    int64_t step[kHigh];
    A weights[kHigh];
    for (int r = 0; r < kHigh; ++r) {  // rows outside: zeros that stay where they are
      int64_t row = h + r - 1;
      bool inside = row >= 0 && row < in_.height;
      from[r] = inside ? x + row * stride + c : kZeros;
      step[r] = inside ? channels : 0;
      weights[r] = inside ? row_[row] : A(0);
    }
    // Sums of column i, and the values that are in the middle of windows.
    auto column = [&](int64_t i, int j, V* sums, V* center) {
      V v[kHigh];
#pragma GCC unroll 4
      for (int r = 0; r < kHigh; ++r) {
        v[r] = load_as<V>(from[r] + i * step[r] + j * lanes);
        if (r > 0 && r <= kRows) center[r - 1] = v[r];
        if constexpr (kTransposed) v[r] *= weights[r];
      }
      V both = v[1] + v[2];
      sums[0] = v[0] + both;
      if constexpr (kRows == 2) sums[1] = both + v[3];
      if constexpr (kTransposed) {
        for (int r = 0; r < kRows; ++r) sums[r] *= columns[i];
      }
    };
    V left[kCount][kRows] = {}, middle[kCount][kRows], center[kCount][kRows];
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) column(0, j, middle[j], center[j]);
    A count[kRows] = {}, inverse[kRows] = {};
    for (int64_t i = 0; i < width; ++i) {
      if (i < 2 || i + 1 == width) {  // windows between them count the same
        for (int r = 0; r < kRows; ++r) {
          count[r] = kTransposed ? most_ : heights[r] * columns[i];
          inverse[r] = A(1) / count[r];
        }
      }
      int64_t at = h * stride + i * channels + c;
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) {
        V right[kRows], next[kRows];
        if (i + 1 < width) {
          column(i + 1, j, right, next);
        } else {
          for (int r = 0; r < kRows; ++r) right[r] = next[r] = V{};
        }
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) {
          int64_t here = at + r * stride + j * lanes;
          V v = left[j][r] + middle[j][r] + right[r];
          V value = kManyRegisters ? center[j][r] : load_as<V>(x + here);
          f(here, c + j * lanes, (v - value * count[r]) * inverse[r], value);
          left[j][r] = middle[j][r], middle[j][r] = right[r], center[j][r] = next[r];
        }
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

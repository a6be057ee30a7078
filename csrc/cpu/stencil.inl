// The pooling P, an average over the part of a window that is in the image, and its transpose,
// which divides by the window counts first. Sums are vertical first, then horizontal.
#pragma once

#include "vec.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

constexpr int64_t kStrip = 2048;  // values of a task, about

// How an image is cut. NCHW: `planes` channels of one group, or `rows` rows of one channel.
// channels_last: `rows` rows.
struct PoolCut {
  int64_t planes, rows, strips;
  int64_t blocks;  // of planes, per group
  int64_t pad_h, pad_w;

  PoolCut(const Image& in, int64_t pool_size) {
    int64_t plane = in.channels_last ? in.width * in.channels * in.height : in.pixels();
    strips = smaller(in.height, larger(1, plane / kStrip));
    rows = (in.height + strips - 1) / strips;
    strips = (in.height + rows - 1) / rows;
    planes =
        in.channels_last ? in.channels : smaller(in.group_channels(), larger(1, kStrip / plane));
    blocks = in.channels_last ? 1 : (in.group_channels() + planes - 1) / planes;
    pad_h = smaller(pool_size / 2, in.height - 1);
    pad_w = smaller(pool_size / 2, in.width - 1);
  }
};

// The rows and channels of a task of an image.
struct PoolTask {
  int64_t image, strip, slot, group;
  int64_t first, last;    // rows
  int64_t channel, stop;  // channels

  PoolTask(const PoolCut& cut, const Image& in, int64_t task) {
    int64_t slots = cut.blocks * cut.strips, tasks = in.channels_last ? slots : slots * in.groups;
    image = task / tasks, slot = task % slots;
    strip = slot % cut.strips;
    first = strip * cut.rows, last = smaller(first + cut.rows, in.height);
    group = in.channels_last ? 0 : task / slots % in.groups;
    int64_t start = slot / cut.strips * cut.planes, size = in.group_channels();
    channel = in.channels_last ? 0 : group * size + start;
    stop = in.channels_last ? in.channels : channel + smaller(cut.planes, size - start);
  }
};

// 1 / (number of positions of [i - pad, i + pad] inside [0, n)); 0 outside.
template <class A>
PF_INLINE A inverse_count(int64_t i, int64_t pad, int64_t n) {
  if (i < 0 || i >= n) return 0;
  return A(1) / static_cast<A>(smaller(i + pad, n - 1) - larger(i - pad, 0) + 1);
}

// The sum of `count` rows, `stride` apart, times `weights` if kWeighted.
template <bool kWeighted, class V, class T>
PF_INLINE V sum_rows(const T* p, int64_t stride, int64_t count, const Acc<T>* weights) {
  auto row = [&](int64_t j) {
    V v = load_as<V>(p + j * stride);
    if constexpr (kWeighted) v *= weights[j];
    return v;
  };
  V v = row(0);
  if (count == 3) return v + row(1) + row(2);
  for (int64_t j = 1; j < count; ++j) v += row(j);
  return v;
}

// The sum of 2 pad + 1 columns, `stride` apart.
template <class V, class A>
PF_INLINE V sum_columns(const A* p, int64_t stride, int64_t pad) {
  V v = load_as<V>(p);
  if (pad == 1) return v + load_as<V>(p + stride) + load_as<V>(p + 2 * stride);
  for (int64_t j = 1; j <= 2 * pad; ++j) v += load_as<V>(p + j * stride);
  return v;
}

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
    return rows * wide + cut.rows * (wide + 2 * cut.pad_w) + wide + in.height + 2 * cut.pad_h + w;
  }

  // memory: `size` values.
  PlanePool(const PoolCut& cut, const Image& in, const T* end, A* memory)
      : cut_(cut), in_(in), end_(end), wide_(round_up(in.width, w)) {
    stride_ = wide_ + 2 * cut.pad_w;
    plane_ = memory;
    sums_ = plane_ + (cut.rows + 2 * cut.pad_h) * wide_;
    column_ = sums_ + cut.rows * stride_;
    row_ = column_ + wide_ + cut.pad_h;
    for (A* p = sums_; p < column_; ++p) *p = 0;
    for (int64_t i = 0; i < wide_; ++i) column_[i] = inverse_count<A>(i, cut.pad_w, in.width);
    for (int64_t i = -cut.pad_h; i < in.height + cut.pad_h; ++i) {
      row_[i] = inverse_count<A>(i, cut.pad_h, in.height);
    }
  }

  // Calls f(at, u, center, count) for the vectors of rows [first, last) of the plane x: u = P x - x
  // (or its transpose) and center = x, of which `count` lanes lie in the row, at offset `at`.
  template <class F>
  PF_INLINE_METHOD void operator()(const T* x, int64_t first, int64_t last, F&& f) {
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
      A inverse = row_[h];
      for (int64_t i = 0; i < width; i += w) {
        Vec<A> v = sum_columns<Vec<A>>(sums + i, 1, pad_w), center = load(row + i);
        if constexpr (!kTransposed) v *= load(column + i) * inverse;
        f(h * width + i, v - center, center, smaller(width - i, w));
      }
    }
  }

 private:
  const PoolCut& cut_;
  const Image& in_;
  const T* end_;  // of the tensor
  int64_t wide_, stride_;
  A* plane_;  // rows first - pad_h .. last + pad_h of x, zero outside
  A* sums_;   // their vertical sums, pad_w zeros left and right
  A *column_, *row_;
};

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
    for (int64_t i = 0; i < in.width; ++i) column_[i] = inverse_count<A>(i, cut.pad_w, in.width);
    for (int64_t i = 0; i < in.height; ++i) row_[i] = inverse_count<A>(i, cut.pad_h, in.height);
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
    A scale = row_[h];
    auto column = [&](int64_t i, int j) {
      V v = sum_rows<kTransposed, V>(from + i * channels + j * lanes, stride, rows, weights);
      if constexpr (kTransposed) v *= columns[i];
      return v;
    };
    V left[kCount], middle[kCount];
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) left[j] = V{}, middle[j] = column(0, j);
    for (int64_t i = 0; i < width; ++i) {
      A inverse = scale * columns[i];
      int64_t at = h * stride + i * channels + c;
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j) {
        V right = i + 1 < width ? column(i + 1, j) : V{};
        V v = left[j] + middle[j] + right, center = load_as<V>(x + at + j * lanes);
        if constexpr (!kTransposed) v *= inverse;
        f(at + j * lanes, c + j * lanes, v - center, center);
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
      A inverse = row_[h] * column_[i];
      for_each_vector<A>(wide, [&](int64_t c, auto lanes) {
        using V = decltype(lanes);
        V v = sum_columns<V>(sums + i * wide + c, wide, pad), center = load_as<V>(x + at + c);
        if constexpr (!kTransposed) v *= inverse;
        f(at + c, start + c, v - center, center);
      });
    }
  }

  const PoolCut& cut_;
  const Image& in_;
  A *column_, *row_;
  A* sums_;  // (width + 2 pad_w, channels), its borders zero
};

}  // namespace poolformer::cpu::POOLFORMER_ISA

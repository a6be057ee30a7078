// Pixels of an image as rows (pixels, channels) of the accumulation type, and back.
#pragma once

#include "vec.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

// Pixels in a row that lie in one image.
struct Run {
  int64_t image, pixel;  // of the first
  int lane, count;       // its place among those of the caller
};

// Calls f for the runs of pixels [first, first + count); pixels of all images are numbered in a
// row.
template <class F>
PF_INLINE void for_each_run(const Image& in, int64_t first, int64_t count, F&& f) {
  int64_t pixels = in.pixels(), at = first, end = smaller(first + count, in.batch * pixels);
  for (int lane = 0; at < end;) {
    Run run{at / pixels, at % pixels, lane, 0};
    run.count = static_cast<int>(smaller(end - at, pixels - run.pixel));
    f(run);
    at += run.count;
    lane += run.count;
  }
}

// Lanes with a pixel in the last of the panels that the pixels of all images make.
template <class A>
PF_INLINE int64_t last_lanes_of(const Image& in, int64_t panels) {
  return in.batch * in.pixels() - (panels - 1) * kPanel<A>;
}

// rows[i][c] = change(x, c) for the pixels i of a run, where x is a vector or one value.
template <class T, class F>
PF_INLINE void read_rows(const Image& in, const T* data, const Run& run, Acc<T>* rows,
                         int64_t stride, F&& change) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>;
  int64_t channels = in.channels, pixels = in.pixels();
  const T* x = data + run.image * channels * pixels;
  if (in.channels_last) {
    for (int64_t i = 0; i < run.count; ++i) {
      const T* from = x + (run.pixel + i) * channels;
      for_each_vector<A>(channels, [&](int64_t c, auto lanes) {
        store_as(rows + i * stride + c, change(load_as<decltype(lanes)>(from + c), c));
      });
    }
    return;
  }
  auto one = [&](int64_t i, int64_t c) {
    rows[i * stride + c] = change(load1(x + c * pixels + run.pixel + i), c);
  };
  int64_t c = 0;
  for (; c + w <= channels; c += w) {
    const T* from = x + c * pixels + run.pixel;
    int64_t i = 0;
    for (; i + w <= run.count; i += w) {
      Vec<A> block[w];
#pragma GCC unroll 16
      for (int j = 0; j < w; ++j) block[j] = load(from + j * pixels + i);
      transpose<A>(block);
#pragma GCC unroll 16
      for (int j = 0; j < w; ++j) store(rows + (i + j) * stride + c, change(block[j], c));
    }
    for (; i < run.count; ++i) {
      for (int j = 0; j < w; ++j) one(i, c + j);
    }
  }
  for (; c < channels; ++c) {
    for (int64_t i = 0; i < run.count; ++i) one(i, c);
  }
}

// Adds the columns of rows to sums.
template <class A>
static void add_columns(const A* rows, int64_t stride, int64_t count, int64_t channels,
                        double* sums) {
  for_each_vector<A>(channels, [&](int64_t c, auto lanes) {
    using V = decltype(lanes);
    V sum = lanes;
    for (int64_t i = 0; i < count; ++i) sum += load_as<V>(rows + i * stride + c);
    if constexpr (std::is_same_v<V, A>) {
      sums[c] += sum;
    } else {
      for (int i = 0; i < kLanes<A>; ++i) sums[c + i] += sum[i];
    }
  });
}

// Writes the rows of a run to a tensor of x's shape and layout.
template <class T>
static void write_rows_of_run(const Image& in, const Acc<T>* rows, int64_t stride, const Run& run,
                              T* data) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>;
  int64_t channels = in.channels, pixels = in.pixels();
  T* to = data + run.image * channels * pixels;
  if (in.channels_last) {
    for (int64_t i = 0; i < run.count; ++i) {
      T* row = to + (run.pixel + i) * channels;
      for_each_vector<A>(channels, [&](int64_t c, auto lanes) {
        store_as(row + c, load_as<decltype(lanes)>(rows + i * stride + c));
      });
    }
    return;
  }
  int64_t c = 0;
  for (; c + w <= channels; c += w) {
    int64_t i = 0;
    for (; i + w <= run.count; i += w) {
      Vec<A> block[w];
#pragma GCC unroll 16
      for (int j = 0; j < w; ++j) block[j] = load(rows + (i + j) * stride + c);
      transpose<A>(block);
#pragma GCC unroll 16
      for (int j = 0; j < w; ++j) store(to + (c + j) * pixels + run.pixel + i, block[j]);
    }
    for (; i < run.count; ++i) {
      for (int j = 0; j < w; ++j) {
        store1(to + (c + j) * pixels + run.pixel + i, rows[i * stride + c + j]);
      }
    }
  }
  for (; c < channels; ++c) {
    for (int64_t i = 0; i < run.count; ++i) {
      store1(to + c * pixels + run.pixel + i, rows[i * stride + c]);
    }
  }
}

// Writes one run of sums (rows, lanes), channels [first, first + rows) of out: finish(sum, at, of),
// where `at` is the place in the image and of(values) the values of the channels.
template <class T, class F>
static void write_run(const Image& image, int64_t first, int64_t rows, const Run& run,
                      const Acc<T>* sums, T* out, F&& finish) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>, n = kPanel<A>;
  int64_t channels = image.channels, pixels = image.pixels();
  out += run.image * channels * pixels;
  if (!image.channels_last) {
    for (int64_t r = 0; r < rows; ++r) {
      const A* from = sums + r * n + run.lane;
      int64_t at = (first + r) * pixels + run.pixel;
      for_each_vector<A>(run.count, [&](int64_t i, auto lanes) {
        using V = decltype(lanes);
        auto of = [&](const A* values) { return splat_as<V>(values[first + r]); };
        store_as(out + at + i, finish(load_as<V>(from + i), at + i, of));
      });
    }
    return;
  }
  auto write = [&](int64_t lane, int64_t r, auto sum) {
    using V = decltype(sum);
    int64_t at = (run.pixel + lane) * channels + first + r;
    auto of = [&](const A* values) { return load_as<V>(values + first + r); };
    store_as(out + at, finish(sum, at, of));
  };
  int lane = 0;
  for (; lane + w <= run.count; lane += w) {
    int64_t r = 0;
    for (; r + w <= rows; r += w) {
      Vec<A> block[w];
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i) block[i] = load(sums + (r + i) * n + run.lane + lane);
      transpose<A>(block);
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i) write(lane + i, r, block[i]);
    }
    for (; r < rows; ++r) {
      for (int i = lane; i < lane + w; ++i) write(i, r, sums[r * n + run.lane + i]);
    }
  }
  for (; lane < run.count; ++lane) {
    for (int64_t r = 0; r < rows; ++r) write(lane, r, sums[r * n + run.lane + lane]);
  }
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

// What the convolution's products read: the rows of x that a tile of panels needs are first copied
// into a band, padded with zeros, so that nothing after it checks for borders.
#pragma once

#include "gemm.inl"
#include "rows.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

// Whether two channels make one step of the product, as bfloat16 that lie side by side in x (in
// channels_last) and in the weight. Elsewhere pairs are made of panels of the accumulation type.
template <class T>
PF_INLINE bool pairs_channels(const PatchEmbedArgs& args) {
  return kStep<Factor<T>> == 2 && args.weight_channels_last && args.in.channels % 2 == 0;
}

// Rows of x that one tile of output pixels reads, image under image: (rows, columns, channels), in
// the accumulation type, or (rows, columns, pairs of channels).
struct Band {
  int64_t channels, columns;

  Band(const PatchEmbedArgs& args, bool pairs)
      : channels(args.in.channels / (pairs ? 2 : 1)),
        columns((args.out.width - 1) * args.stride[1] + args.kernel[1]) {}

  int64_t row() const { return columns * channels; }
};

// The output rows that a run of pixels lies in, and what they read.
struct RunRows {
  int64_t first, in_rows;

  RunRows(const PatchEmbedArgs& args, const Run& run) : first(run.pixel / args.out.width) {
    int64_t last = (run.pixel + run.count - 1) / args.out.width;
    in_rows = (last - first) * args.stride[0] + args.kernel[0];
  }
};

static int64_t band_rows(const PatchEmbedArgs& args, int64_t first, int64_t count) {
  int64_t rows = 0;
  for_each_run(args.out, first, count, [&](const Run& run) { rows += RunRows(args, run).in_rows; });
  return rows;
}

// `count` columns of a row of x in NCHW as (columns, channels of the band).
template <class T>
static void transpose_row(const T* row, int64_t plane, int64_t count, const Band& band, bool pairs,
                          Acc<T>* to) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>;
  int64_t c = 0, channels = band.channels;
  auto one = [&](int64_t i, int64_t c) {
    if (pairs) {
      T both[2] = {row[2 * c * plane + i], row[(2 * c + 1) * plane + i]};
      memcpy(to + i * channels + c, both, sizeof(A));
    } else {
      to[i * channels + c] = load1(row + c * plane + i);
    }
  };
  auto read = [&](int64_t i, int64_t c) {
#if defined(POOLFORMER_BF16)
    if constexpr (kStep<Factor<T>> == 2) {
      const T* first = row + 2 * c * plane + i;
      if (pairs) return in_turns(load(first), load(first + plane));
    }
#endif
    return load(row + c * plane + i);
  };
  for (; c + w <= channels; c += w) {
    int64_t i = 0;
    for (; i + w <= count; i += w) {
      Vec<A> block[w];
#pragma GCC unroll 16
      for (int j = 0; j < w; ++j) block[j] = read(i, c + j);
      transpose<A>(block);
#pragma GCC unroll 16
      for (int j = 0; j < w; ++j) store_raw<A, w>(to + (i + j) * channels + c, block[j]);
    }
    for (; i < count; ++i) {
      for (int j = 0; j < w; ++j) one(i, c + j);
    }
  }
  for (; c < channels; ++c) {
    for (int64_t i = 0; i < count; ++i) one(i, c);
  }
}

// One row of x, from column `first` on, with zeros where there is none.
template <class T>
static void copy_row(const Image& in, const T* row, int64_t first, const Band& band, bool pairs,
                     Acc<T>* to) {
  int64_t before = smaller(larger(-first, 0), band.columns), start = first + before;
  int64_t count = larger(smaller(in.width - start, band.columns - before), 0);
  Acc<T>* inner = to + before * band.channels;
  Acc<T>* after = inner + count * band.channels;
  std::fill(to, inner, Acc<T>(0));
  if (!in.channels_last) {
    transpose_row<T>(row + start, in.pixels(), count, band, pairs, inner);
  } else if (pairs) {
    memcpy(inner, row + start * in.channels, count * in.channels * sizeof(T));
  } else {
    load_all<T>(row + start * in.channels, inner, count * in.channels, Acc<T>(0));
  }
  std::fill(after, to + band.row(), Acc<T>(0));
}

// Fills the band of `count` output pixels, and writes where each pixel's window begins in it.
template <class T>
static void fill_band(const PatchEmbedArgs& args, int64_t first, int64_t count, const Band& band,
                      bool pairs, Acc<T>* to, int64_t* windows) {
  const Image &in = args.in, &out = args.out;
  int64_t start = 0;
  for_each_run(out, first, count, [&](const Run& run) {
    RunRows rows(args, run);
    for (int i = 0; i < run.count; ++i) {
      int64_t y = (run.pixel + i) / out.width - rows.first, x = (run.pixel + i) % out.width;
      *windows++ = y * args.stride[0] * band.row() + x * args.stride[1] * band.channels + start;
    }
    const T* image = as<T>(in.data) + run.image * in.channels * in.pixels();
    int64_t y = rows.first * args.stride[0] - args.padding[0];
    for (int64_t end = y + rows.in_rows; y < end; ++y, start += band.row()) {
      if (y >= 0 && y < in.height) {
        const T* row = image + y * in.width * (in.channels_last ? in.channels : 1);
        copy_row<T>(in, row, -args.padding[1], band, pairs, to + start);
      } else {
        std::fill(to + start, to + start + band.row(), Acc<T>(0));
      }
    }
  });
}

// The windows of `lanes` pixels as a panel (depth, lanes) of the band's values. places: where the
// weight's memory has each value of a window (rows, columns, channels).
template <class A>
static void pack_windows(const PatchEmbedArgs& args, const Band& band, const A* data,
                         const int64_t* windows, int lanes, const int64_t* places, A* out) {
  constexpr int w = kLanes<A>, n = kPanel<A>;
  int64_t line = args.kernel[1] * band.channels;  // what a window's row holds without a gap
  for (int64_t y = 0; y < args.kernel[0]; ++y, data += band.row(), places += line) {
    int lane = 0;
    for (; line >= w && lane + w <= lanes; lane += w) {
      for (int64_t next = 0; next < line; next += w) {
        int64_t i = smaller(next, line - w);  // the last block may overlap the one before
        Vec<A> block[w];
#pragma GCC unroll 16
        for (int j = 0; j < w; ++j) block[j] = load(data + windows[lane + j] + i);
        transpose<A>(block);
#pragma GCC unroll 16
        for (int j = 0; j < w; ++j) store(out + places[i + j] * n + lane, block[j]);
      }
    }
    for (; lane < lanes; ++lane) {
      for (int64_t i = 0; i < line; ++i) {
        memcpy(out + places[i] * n + lane, data + windows[lane] + i, sizeof(A));
      }
    }
    for (; lane < n; ++lane) {
      for (int64_t i = 0; i < line; ++i) memset(out + places[i] * n + lane, 0, sizeof(A));
    }
  }
}

// Memory that pack_pixels needs for the panels [first, last).
template <class T>
static int64_t packing_bytes(const PatchEmbedArgs& args, int64_t first, int64_t last) {
  using A = Acc<T>;
  constexpr int64_t n = kPanel<A>;
  bool pairs = pairs_channels<T>(args);
  int64_t count = (last - first) * n;
  int64_t values = band_rows(args, first * n, count) * Band(args, pairs).row();
  if (!std::is_same_v<Factor<T>, A> && !pairs) values += args.depth() * n;
  return values * sizeof(A) + (args.depth() + count) * sizeof(int64_t);
}

// Writes the windows of the panels [first, last) as factors (panels, depth, lanes).
template <class T>
static void pack_pixels(const PatchEmbedArgs& args, int64_t first, int64_t last, void* memory,
                        Factor<T>* out) {
  using A = Acc<T>;
  using F = Factor<T>;
  constexpr int64_t n = kPanel<A>;
  int64_t depth = args.depth(), taps = args.kernel[0] * args.kernel[1], i = 0;
  int64_t pixels = args.out.batch * args.out.pixels();
  int64_t* places = static_cast<int64_t*>(memory);
  int64_t* windows = places + depth;
  A* panel = reinterpret_cast<A*>(windows + (last - first) * n);
  bool pairs = pairs_channels<T>(args);
  Band band(args, pairs);
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t c = 0; c < band.channels; ++c, ++i) {
      places[i] = pairs ? i : args.place(tap, c);
    }
  }
  A* data = std::is_same_v<F, A> || pairs ? panel : panel + depth * n;
  fill_band<T>(args, first * n, smaller(last * n, pixels) - first * n, band, pairs, data, windows);
  for (int64_t p = first; p < last; ++p, windows += n, out += panel_values<F>(depth)) {
    int lanes = static_cast<int>(smaller(n, pixels - p * n));
    if (std::is_same_v<F, A> || pairs) {
      pack_windows(args, band, data, windows, lanes, places, reinterpret_cast<A*>(out));
    } else if constexpr (!std::is_same_v<F, A>) {
      pack_windows(args, band, data, windows, lanes, places, panel);
      make_factors<F>(panel, depth, n, out, [](int64_t, auto v) { return v; });
    }
  }
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

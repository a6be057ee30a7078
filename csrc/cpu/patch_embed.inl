// A strided convolution as a product: rows of the weight, read where they are, times panels of
// output pixels, whose values are put in the order of the weight's memory. What a tile of panels
// reads of x is first copied into a band, padded with zeros: nothing after it checks for borders.
#pragma once

#include "gemm.inl"
#include "rows.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

// The depth of one product: a panel and a block of rows stay in the first-level cache.
static int64_t depth_step(int64_t depth) {
  int64_t steps = (depth + 319) / 320;
  return round_up((depth + steps - 1) / steps, 2);
}

// Rows of x that one tile of output pixels reads, image under image: (rows, columns, channels).
struct Band {
  int64_t channels, columns;

  explicit Band(const PatchEmbedArgs& args)
      : channels(args.in.channels),
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

template <class A>
static void patch_embed_plan_typed(PatchEmbedArgs& args) {
  constexpr int64_t n = kPanel<A>;
  int64_t channels = args.out.channels, depth = args.depth();
  args.panels = (args.out.batch * args.out.pixels() + n - 1) / n;
  int64_t most = l2_bytes() * 3 / 4 / ((channels + depth_step(depth)) * n * sizeof(A));
  most = smaller(larger(most, 8), 64);
  args.tiles = (args.panels + most - 1) / most;
  if (args.tiles < 4 * args.threads) {
    args.tiles = smaller(round_up(args.tiles, args.threads), args.panels);
  }
  int64_t parts = args.threads / args.tiles, blocks = (channels + kRows - 1) / kRows;
  args.parts = smaller(larger(parts, 1), blocks);
  args.band_rows = 0;
  for (int64_t tile = 0; tile < args.tiles; ++tile) {
    int64_t first = tile * args.panels / args.tiles, last = (tile + 1) * args.panels / args.tiles;
    args.band_rows = larger(args.band_rows, band_rows(args, first * n, (last - first) * n));
  }
}

static void patch_embed_plan(PatchEmbedArgs& args) {
  if (args.in.dtype == Dtype::kFloat64) return patch_embed_plan_typed<double>(args);
  patch_embed_plan_typed<float>(args);
}

// `count` columns of a row of x in NCHW as (columns, channels).
template <class T>
static void transpose_row(const T* row, int64_t plane, int64_t count, int64_t channels,
                          Acc<T>* to) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>;
  int64_t c = 0;
  for (; c + w <= channels; c += w) {
    int64_t i = 0;
    for (; i + w <= count; i += w) {
      Vec<A> block[w];
#pragma GCC unroll 16
      for (int j = 0; j < w; ++j) block[j] = load(row + (c + j) * plane + i);
      transpose<A>(block);
#pragma GCC unroll 16
      for (int j = 0; j < w; ++j) store(to + (i + j) * channels + c, block[j]);
    }
    for (; i < count; ++i) {
      for (int j = 0; j < w; ++j) to[i * channels + c + j] = load1(row + (c + j) * plane + i);
    }
  }
  for (; c < channels; ++c) {
    for (int64_t i = 0; i < count; ++i) to[i * channels + c] = load1(row + c * plane + i);
  }
}

// One row of x, from column `first` on, with zeros where there is none.
template <class T>
static void copy_row(const Image& in, const T* row, int64_t first, const Band& band, Acc<T>* to) {
  int64_t before = smaller(larger(-first, 0), band.columns), start = first + before;
  int64_t count = larger(smaller(in.width - start, band.columns - before), 0);
  Acc<T>* inner = to + before * band.channels;
  Acc<T>* after = inner + count * band.channels;
  std::fill(to, inner, Acc<T>(0));
  if (in.channels_last) {
    load_all<T>(row + start * in.channels, inner, count * in.channels, Acc<T>(0));
  } else {
    transpose_row<T>(row + start, in.pixels(), count, in.channels, inner);
  }
  std::fill(after, to + band.row(), Acc<T>(0));
}

// Fills the band of `count` output pixels, and writes where each pixel's window begins in it.
template <class T>
static void fill_band(const PatchEmbedArgs& args, int64_t first, int64_t count, const Band& band,
                      Acc<T>* to, int64_t* windows) {
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
        copy_row<T>(in, row, -args.padding[1], band, to + start);
      } else {
        std::fill(to + start, to + start + band.row(), Acc<T>(0));
      }
    }
  });
}

// The windows of `lanes` pixels as a panel (depth, lanes). places: where the weight's memory has
// each value of a window (rows, columns, channels).
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
      for (int64_t i = 0; i < line; ++i) out[places[i] * n + lane] = data[windows[lane] + i];
    }
    for (; lane < n; ++lane) {
      for (int64_t i = 0; i < line; ++i) out[places[i] * n + lane] = 0;
    }
  }
}

template <class T>
static void patch_embed_tile(const PatchEmbedArgs& args, int64_t tile, int64_t part, Acc<T>* memory,
                             int64_t* windows, const int64_t* places) {
  using A = Acc<T>;
  constexpr int n = kPanel<A>;
  const Image& out = args.out;
  int64_t blocks = (out.channels + kRows - 1) / kRows, depth = args.depth();
  int64_t step = depth_step(depth);
  int64_t row = part * blocks / args.parts * kRows;
  int64_t rows = smaller((part + 1) * blocks / args.parts * kRows, out.channels) - row;
  int64_t first = tile * args.panels / args.tiles, last = (tile + 1) * args.panels / args.tiles;
  int64_t count = last - first, left = out.batch * out.pixels() - (last - 1) * n;
  int last_lanes = static_cast<int>(smaller(left, n));
  A* bias = memory;
  A* panels = bias + round_up(out.channels, n);
  A* sums = panels + count * depth * n;
  A* spare = sums + count * rows * n;
  A* data = spare + gemm_spare(step);
  Band band(args);
  load_all<T>(as<T>(args.bias), bias, out.channels, A(0));
  fill_band<T>(args, first * n, (count - 1) * n + last_lanes, band, data, windows);
  for (int64_t p = 0; p < count; ++p) {
    pack_windows(args, band, data, windows + p * n, p + 1 < count ? n : last_lanes, places,
                 panels + p * depth * n);
  }
  for (int64_t k = 0; k < depth; k += step) {
    gemm<T>(as<T>(args.weight) + row * depth + k, depth, rows, smaller(step, depth - k),
            panels + k * n, depth * n, count, last_lanes, sums, rows * n, k > 0, spare);
  }
  T* y = static_cast<T*>(args.y);
  for (int64_t p = 0; p < count; ++p) {
    for_each_run(out, (first + p) * n, n, [&](const Run& run) {
      write_run<T>(out, row, rows, run, sums + p * rows * n, y,
                   [&](auto sum, int64_t, auto of) { return sum + of(bias); });
    });
  }
}

static void patch_embed(const PatchEmbedArgs& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Acc<T>;
    constexpr int64_t n = kPanel<A>;
    int64_t most = (args.panels + args.tiles - 1) / args.tiles, channels = args.out.channels;
    int64_t depth = args.depth(), taps = args.kernel[0] * args.kernel[1];
    int64_t size = round_up(channels, n) + most * (depth + channels) * n +
                   gemm_spare(depth_step(depth)) + args.band_rows * Band(args).row();
    int64_t bytes = round_up(size * sizeof(A), sizeof(int64_t));
    char* memory = static_cast<char*>(scratch(bytes + (most * n + depth) * sizeof(int64_t)));
    int64_t* windows = reinterpret_cast<int64_t*>(memory + bytes);
    int64_t* places = windows + most * n;
    for (int64_t i = 0; i < depth; ++i) {
      int64_t tap = i / args.in.channels, c = i % args.in.channels;
      places[i] = args.weight_channels_last ? i : c * taps + tap;
    }
    for (int64_t task = begin; task < end; ++task) {
      patch_embed_tile<T>(args, task / args.parts, task % args.parts, reinterpret_cast<A*>(memory),
                          windows, places);
    }
  });
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

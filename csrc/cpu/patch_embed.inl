// A strided convolution as a product: rows of the weight, read where they are, times panels of
// output pixels, whose values are put in the order of the weight's memory. What a tile of panels
// reads of x is first copied into a band, padded with zeros: nothing after it checks for borders.
#pragma once

#include "gemm.inl"
#include "rows.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

// The depth of one product: a panel and a block of rows stay in the first-level cache.
template <class F>
PF_INLINE int64_t depth_step(int64_t depth) {
  int64_t most = kDepth * kStep<F>, steps = (depth + most - 1) / most;
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

template <class F>
static void patch_embed_plan_typed(PatchEmbedArgs& args) {
  using A = Acc<F>;
  constexpr int64_t n = kPanel<A>;
  int64_t channels = args.out.channels, depth = args.depth();
  args.panels = (args.out.batch * args.out.pixels() + n - 1) / n;
  int64_t most = l2_bytes() * 3 / 4 / ((channels + depth_step<F>(depth)) * n * sizeof(A));
  most = smaller(larger(most, 8), 64);
  int64_t tiles = (args.panels + most - 1) / most;
  if (tiles < 4 * args.threads) tiles = smaller(round_up(tiles, args.threads), args.panels);
  bool many = args.panels >= 12;  // by shape alone: it has a say in how sums are cut
  args.tiles = many ? tiles : 0;
  args.blocks = (channels + kRows - 1) / kRows;
  args.shared_bytes = many ? 0 : args.panels * panel_values<F>(depth) * sizeof(F);
}

static void patch_embed_plan(PatchEmbedArgs& args) {
  with_type(args.in.dtype, [&](auto* type) {
    patch_embed_plan_typed<Factor<std::remove_pointer_t<decltype(type)>>>(args);
  });
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

// Memory that pack_pixels needs for the panels [first, last).
template <class T>
static int64_t packing_bytes(const PatchEmbedArgs& args, int64_t first, int64_t last) {
  using A = Acc<T>;
  constexpr int64_t n = kPanel<A>;
  int64_t count = (last - first) * n, values = band_rows(args, first * n, count) * Band(args).row();
  if (!std::is_same_v<Factor<T>, A>) values += args.depth() * n;
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
  A* data = panel;
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t c = 0; c < args.in.channels; ++c, ++i) {
      places[i] = args.weight_channels_last ? i : c * taps + tap;
    }
  }
  if (!std::is_same_v<F, A>) data += depth * n;
  Band band(args);
  fill_band<T>(args, first * n, smaller(last * n, pixels) - first * n, band, data, windows);
  for (int64_t p = first; p < last; ++p, windows += n, out += panel_values<F>(depth)) {
    int lanes = static_cast<int>(smaller(n, pixels - p * n));
    if constexpr (std::is_same_v<F, A>) {
      pack_windows(args, band, data, windows, lanes, places, out);
    } else {
      pack_windows(args, band, data, windows, lanes, places, panel);
      make_factors<F>(panel, depth, n, out, [](int64_t, Vec<A> v) { return v; });
    }
  }
}

// Writes the output channels [row, row + rows) of the panels [first, last) from their sums
// (panels, rows, lanes). bias: memory of as many values as there are output channels.
template <class T>
static void write_panels(const PatchEmbedArgs& args, int64_t first, int64_t last, int64_t row,
                         int64_t rows, const Acc<T>* sums, Acc<T>* bias) {
  constexpr int n = kPanel<Acc<T>>;
  load_all<T>(as<T>(args.bias), bias, args.out.channels, Acc<T>(0));
  for (int64_t p = first; p < last; ++p, sums += rows * n) {
    for_each_run(args.out, p * n, n, [&](const Run& run) {
      write_run<T>(args.out, row, rows, run, sums, static_cast<T*>(args.y),
                   [&](auto sum, int64_t, auto of) { return sum + of(bias); });
    });
  }
}

// Many pixels: a task is a tile of panels.
static void patch_embed_tiles(const PatchEmbedArgs& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Acc<T>;
    using F = Factor<T>;
    constexpr int64_t n = kPanel<A>;
    int64_t channels = args.out.channels, depth = args.depth(), step = depth_step<F>(depth);
    int64_t panel_size = panel_values<F>(depth);
    for (int64_t tile = begin; tile < end; ++tile) {
      int64_t first = tile * args.panels / args.tiles;
      int64_t last = (tile + 1) * args.panels / args.tiles, count = last - first;
      int64_t size = count * channels * n + gemm_spare(step) + channels;
      int64_t bytes = round_up(count * panel_size * sizeof(F) + size * sizeof(A), sizeof(int64_t));
      char* memory = static_cast<char*>(scratch(bytes + packing_bytes<T>(args, first, last)));
      F* panels = reinterpret_cast<F*>(memory);
      A* sums = reinterpret_cast<A*>(panels + count * panel_size);
      A* spare = sums + count * channels * n;
      pack_pixels<T>(args, first, last, memory + bytes, panels);
      for (int64_t k = 0; k < depth; k += step) {
        gemm<T>(as<T>(args.weight) + k, depth, channels, smaller(step, depth - k),
                panels + place<F>(k, 0), panel_size, count,
                last < args.panels ? n : last_lanes_of<A>(args.out, args.panels), sums,
                channels * n, k > 0, spare);
      }
      write_panels<T>(args, first, last, 0, channels, sums, spare + gemm_spare(step));
    }
  });
}

// Few pixels: packing and the product are phases, as in the MLP, and a weight's row is read once.
static void patch_embed_pack(const PatchEmbedArgs& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using F = Factor<T>;
    F* out = static_cast<F*>(args.shared) + begin * panel_values<F>(args.depth());
    pack_pixels<T>(args, begin, end, scratch(packing_bytes<T>(args, begin, end)), out);
  });
}

static void patch_embed_rows(const PatchEmbedArgs& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Acc<T>;
    using F = Factor<T>;
    constexpr int64_t n = kPanel<A>;
    int64_t depth = args.depth(), channels = args.out.channels, row = begin * kRows;
    int64_t rows = smaller(end * kRows, channels) - row;
    int64_t size = args.panels * rows * n + gemm_spare(depth) + channels;
    A* sums = static_cast<A*>(scratch(size * sizeof(A)));
    A *spare = sums + args.panels * rows * n, *bias = spare + gemm_spare(depth);
    gemm<T>(as<T>(args.weight) + row * depth, depth, rows, depth,
            static_cast<const F*>(args.shared), panel_values<F>(depth), args.panels,
            last_lanes_of<A>(args.out, args.panels), sums, rows * n, false, spare);
    write_panels<T>(args, 0, args.panels, row, rows, sums, bias);
  });
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

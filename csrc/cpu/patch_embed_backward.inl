// Gradients of y = W * x + b: dx = W' dy, added up where windows overlap, and dW = dy window'.
// Pixels are rows here, and vectors run along values of the window.
#pragma once

#include "patch_embed_backward_parts.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

// The pixels [first, first + count) of dy as rows of the accumulation type, which are made in
// `memory` if dy has none; `stride`: of the rows.
template <class T>
static const Acc<T>* gradient_rows(const Image& out, int64_t first, int64_t count, Acc<T>* memory,
                                   int64_t& stride) {
  stride = out.channels;
  if constexpr (std::is_same_v<T, Acc<T>>) {
    if (out.channels_last) return as<T>(out.data) + first * stride;
  }
  stride = round_up(stride, kLanes<Acc<T>>);
  for_each_run(out, first, count, [&](const Run& run) {
    read_rows(out, as<T>(out.data), run, memory + run.lane * stride, stride,
              [](auto v, int64_t) { return v; });
  });
  return memory;
}

// dx of a strip of rows of an image. Each place of the window adds the product of dy and a slice of
// the weight to the pixels that it has read.
template <class T>
struct GradientStrip {
  using A = Acc<T>;
  using F = Factor<T>;
  static constexpr int64_t n = kPanel<A>;
  const PatchEmbedBackwardArgs& args;
  const Image &in, &out;
  PatchEmbedBackwardSizes<F> sizes;
  int64_t image, begin, end;      // rows of x
  int64_t first, count;           // rows of dy that reach them
  int64_t pixel, row;             // values of the band
  int64_t memory_stride, stride;  // of rows of dy
  A *band, *memory;
  F* factors;

  GradientStrip(const PatchEmbedBackwardArgs& args, int64_t task)
      : args(args),
        in(args.shape.in),
        out(args.shape.out),
        sizes(args),
        image(task / args.strips),
        begin(task % args.strips * in.height / args.strips),
        end((task % args.strips + 1) * in.height / args.strips),
        first(reached(args.shape.kernel[0] - 1, begin)),
        count(larger(reached(0, end) - first, 0)),
        pixel(sizes.channel_panels * n),
        row(args.columns * pixel),
        memory_stride(round_up(out.channels, kLanes<A>)),
        stride(round_up(out.channels, kStep<F>)) {
    int64_t band_size = (end - begin) * row, pixels = count * out.width;
    int64_t sums = band_size + pixels * memory_stride, values = pixels * stride + kLanes<A>;
    band = static_cast<A*>(scratch(sums * sizeof(A) + values * sizeof(F)));
    memory = band + band_size;
    factors = reinterpret_cast<F*>(memory + pixels * memory_stride);
    std::fill(band, memory, A(0));
  }

  // The first output row whose window has its row y at the row `from` of x or behind.
  int64_t reached(int64_t y, int64_t from) const {
    int64_t distance = from + args.shape.padding[0] - y, step = args.shape.stride[0];
    return distance > 0 ? smaller((distance + step - 1) / step, out.height) : 0;
  }

  // dy as factors in rows.
  const F* read_gradient() {
    int64_t channels = out.channels, at = image * out.pixels() + first * out.width;
    if constexpr (std::is_same_v<T, F> && !std::is_same_v<F, A>) {
      if (out.channels_last && stride == channels) return as<T>(out.data) + at * channels;
    }
    int64_t pixels = count * out.width;
    const A* rows = gradient_rows<T>(out, at, pixels, memory, memory_stride);
    if constexpr (std::is_same_v<F, A>) {
      stride = memory_stride;
      return rows;
    } else {
      for (int64_t i = 0; i < pixels; ++i) {
        F* to = factors + i * stride;
        for_each_vector<A>(channels, [&](int64_t c, auto lanes) {
          store_as(to + c, load_as<decltype(lanes)>(rows + i * memory_stride + c));
        });
        for (int64_t c = channels; c < stride; ++c) store1(to + c, A(0));
      }
      return factors;
    }
  }

  void multiply(const F* rows) {
    const int64_t* step = args.shape.stride;
    for (int64_t panel = 0; panel < args.panels; ++panel) {
      int64_t tap = panel / sizes.channel_panels, c = panel % sizes.channel_panels * n;
      int64_t y = tap / args.shape.kernel[1], x = tap % args.shape.kernel[1];
      const F* weight = static_cast<const F*>(args.factors) + panel * sizes.panel;
      for (int64_t i = reached(y, begin), last = reached(y, end); i < last; ++i) {
        A* to = band + (i * step[0] - args.shape.padding[0] + y - begin) * row + x * pixel + c;
        auto add = [&](auto vectors) {
          multiply_panels<false, F, vectors()>(
              out.width, steps_of<F>(out.channels), 1, rows + (i - first) * out.width * stride,
              stride, {weight, kPanelStep<F>, 0}, {to, step[1] * pixel, n}, true);
        };
        if (in.channels - c > kLanes<A>) {
          add(std::integral_constant<int, 2>{});
        } else {
          add(std::integral_constant<int, 1>{});
        }
      }
    }
  }

  void write() {
    for (int64_t y = begin; y < end; ++y) {
      Run run{image, y * in.width, 0, static_cast<int>(in.width)};
      write_rows_of_run(in, band + (y - begin) * row + args.shape.padding[1] * pixel, pixel, run,
                        static_cast<T*>(args.input_gradient));
    }
  }
};

static void patch_embed_backward_input(const PatchEmbedBackwardArgs& args, int64_t begin,
                                       int64_t end) {
  with_type(args.shape.in.dtype, [&](auto* type) {
    for (int64_t task = begin; task < end; ++task) {
      GradientStrip<std::remove_pointer_t<decltype(type)>> strip(args, task);
      strip.multiply(strip.read_gradient());
      strip.write();
    }
  });
}

// Some pixels: a group of rows of their windows, and dy in columns, as factors in steps of pixels.
template <class T>
struct WindowTile {
  using A = Acc<T>;
  using F = Factor<T>;
  static constexpr int64_t n = kPanel<A>, w = kLanes<A>, v = kStep<F>;
  const PatchEmbedBackwardArgs& args;
  Band band;
  int64_t line, first_line, last_line, width, stride;  // of a window
  int64_t gradient_stride;
  const A* gradient;  // dy
  const F* columns;   // as factors
  F* windows;

  WindowTile(const PatchEmbedBackwardArgs& args, int64_t group)
      : args(args),
        band(args.shape, false),
        line(PatchEmbedBackwardSizes<F>(args).line),
        first_line(group * args.lines),
        last_line(smaller(first_line + args.lines, args.shape.kernel[0])),
        width((last_line - first_line) * line),
        stride(round_up(width, n) + n) {}

  // Pixels that stay in the cache.
  int64_t most() const {
    int64_t size = l2_bytes() / 3 / ((width + args.shape.out.channels) * sizeof(A));
    return round_up(smaller(larger(size, 48), 256), v);
  }

  void read(int64_t first, int64_t count) {
    const Image& out = args.shape.out;
    int64_t pixels = round_up(count, v), row = round_up(out.channels, w);
    int64_t band_size = band_rows(args.shape, first, count) * band.row() + w;
    int64_t* places = static_cast<int64_t*>(scratch(pixels * sizeof(int64_t) +
                                                    (band_size + pixels * row) * sizeof(A) +
                                                    pixels * (stride + row) * sizeof(F)));
    A *data = reinterpret_cast<A*>(places + pixels), *memory = data + band_size;
    windows = reinterpret_cast<F*>(memory + pixels * row);
    fill_band<T>(args.shape, first, count, band, false, data, places);
    for (int64_t i = 0; i < count; i += v) {
      F* to = windows + i * stride;
      for (int64_t y = first_line; y < last_line; ++y, to += line * v) {
        for (int64_t j = 0; j < line; j += w) {  // what is beyond the line is written again
          store_raw<A, w>(to + j * v, step_of<F>(i, count, [&](int64_t pixel) {
                            return load(data + places[pixel] + y * band.row() + j);
                          }));
        }
      }
      std::fill(to, windows + i * stride + round_up(width, n) * v, F{});
    }
    gradient = gradient_rows<T>(out, first, count, memory, gradient_stride);
    make_columns(count, windows + pixels * stride);
  }

  void make_columns(int64_t count, F* to) {
    if constexpr (std::is_same_v<F, A>) {
      columns = gradient;
    } else {
      columns = to;
      for (int64_t i = 0; i < count; i += v, to += v * gradient_stride) {
        for (int64_t c = 0; c < args.shape.out.channels; c += w) {
          store_raw<A, w>(to + c * v, step_of<F>(i, count, [&](int64_t pixel) {
                            return load(gradient + pixel * gradient_stride + c);
                          }));
        }
      }
    }
  }
};

static void patch_embed_backward_weight(const PatchEmbedBackwardArgs& args, int64_t begin,
                                        int64_t end) {
  with_type(args.shape.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Acc<T>;
    using F = Factor<T>;
    constexpr int64_t n = kPanel<A>, v = kStep<F>;
    const Image& out = args.shape.out;
    int64_t pixels = out.batch * out.pixels(), blocks = (out.channels + kRows - 1) / kRows;
    for (int64_t task = begin; task < end; ++task) {
      int64_t q = task % args.channel_parts, group = task / args.channel_parts % args.groups;
      int64_t r = task / args.channel_parts / args.groups;
      int64_t first = q * blocks / args.channel_parts * kRows;
      int64_t rows = smaller((q + 1) * blocks / args.channel_parts * kRows, out.channels) - first;
      int64_t start = r * pixels / args.pixel_parts, stop = (r + 1) * pixels / args.pixel_parts;
      auto sums = PatchEmbedBackwardSizes<F>(args).gradient_panels(args, r, group, first);
      WindowTile<T> tile(args, group);
      for (int64_t at = start, step = tile.most(); at < stop; at += step) {
        int64_t count = smaller(step, stop - at);
        tile.read(at, count);
        if (group == 0) {
          add_columns(tile.gradient + first, tile.gradient_stride, count, rows,
                      args.column_sums + r * out.channels + first);
        }
        multiply_panels<true, F>(rows, steps_of<F>(count), (tile.width + n - 1) / n,
                                 tile.columns + first * v, v * tile.gradient_stride,
                                 {tile.windows, v * tile.stride, n * v}, sums, at > start);
      }
    }
  });
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

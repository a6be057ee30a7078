// z = x + k layer_scale (ka fc2(act(fc1(GN x))) + fc2_bias). The hidden channels are made and used
// in chunks, and stay in the cache.
#pragma once

#include "activations.inl"
#include "gemm.inl"
#include "group_norm.inl"
#include "rows.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

template <class A>
static void mlp_plan_typed(MlpArgs& args) {
  constexpr int64_t n = kPanel<A>, unit = sizeof(A) * n;
  const Image& in = args.in;
  args.panels = (in.batch * in.pixels() + n - 1) / n;
  args.chunk = smaller(args.hidden, POOLFORMER_CHUNK);
  int64_t most = l2_bytes() * 3 / 4 / ((2 * in.channels + args.chunk) * unit);
  most = smaller(larger(most, 16), 64);  // fewer would read the weights too often
  args.tiles = (args.panels + most - 1) / most;
  int64_t wanted = 8, chunks = (args.hidden + args.chunk - 1) / args.chunk;
  if (args.panels >= wanted * 4 || args.tiles >= wanted) {
    args.tiles = smaller(round_up(args.tiles, wanted), args.panels);
    args.splits = 1;
  } else {
    while (wanted % args.tiles) ++args.tiles;
    args.splits = smaller(wanted / args.tiles, chunks);
    // Few panels leave room in the cache: longer chunks, and as many for each part of the hidden.
    constexpr int64_t longest = POOLFORMER_CHUNK * 11 / 4;
    int64_t part = (args.hidden + args.splits - 1) / args.splits;
    int64_t steps = (part + longest - 1) / longest;
    args.chunk = smaller(round_up((part + steps - 1) / steps, kRows), args.hidden);
  }
  args.slots = (in.pixels() + n - 1) / n + 1;
  args.accumulator_bytes = args.splits == 1 ? 0 : args.splits * args.panels * in.channels * unit;
}

static void mlp_plan(MlpArgs& args) {
  if (args.in.dtype == Dtype::kFloat64) return mlp_plan_typed<double>(args);
  mlp_plan_typed<float>(args);
}

// Writes GN(x) of one run as (channels, lanes).
template <class T>
static void pack_run(const Image& in, const Run& run, const Acc<T>* center, const Acc<T>* scale,
                     const Acc<T>* shift, Acc<T>* out) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>, n = kPanel<A>;
  int64_t channels = in.channels, pixels = in.pixels();
  const T* x = as<T>(in.data) + run.image * channels * pixels;
  if (!in.channels_last) {
    for (int64_t c = 0; c < channels; ++c) {
      const T* from = x + c * pixels + run.pixel;
      A* to = out + c * n + run.lane;
      if (run.count == n) {
        store(to, (load(from) - center[c]) * scale[c] + shift[c]);
        store(to + w, (load(from + w) - center[c]) * scale[c] + shift[c]);
      } else {
        for (int i = 0; i < run.count; ++i) {
          to[i] = (load1(from + i) - center[c]) * scale[c] + shift[c];
        }
      }
    }
    return;
  }
  const T* from = x + run.pixel * channels;
  int lane = 0;
  for (; lane + w <= run.count; lane += w) {
    int64_t c = 0;
    for (; c + w <= channels; c += w) {
      Vec<A> m = load(center + c), a = load(scale + c), b = load(shift + c), rows[w];
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i) rows[i] = (load(from + (lane + i) * channels + c) - m) * a + b;
      transpose<A>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i) store(out + (c + i) * n + run.lane + lane, rows[i]);
    }
    for (; c < channels; ++c) {
      for (int i = lane; i < lane + w; ++i) {
        out[c * n + run.lane + i] =
            (load1(from + i * channels + c) - center[c]) * scale[c] + shift[c];
      }
    }
  }
  for (; lane < run.count; ++lane) {
    for (int64_t c = 0; c < channels; ++c) {
      out[c * n + run.lane + lane] =
          (load1(from + lane * channels + c) - center[c]) * scale[c] + shift[c];
    }
  }
}

// Writes h + bias of `lanes` pixels as rows (pixels, hidden): h (size, lanes), hidden channels from
// `start` on, `first` the first pixel.
template <class T>
static void keep_hidden(const MlpArgs& args, int64_t first, int64_t lanes, int64_t start,
                        int64_t size, const Acc<T>* h, const Acc<T>* bias) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>, n = kPanel<A>;
  T* out = static_cast<T*>(args.kept) + first * args.hidden + start;
  auto one = [&](int64_t lane, int64_t r) {
    store1(out + lane * args.hidden + r, h[r * n + lane] + bias[r]);
  };
  int64_t lane = 0;
  for (; lane + w <= lanes; lane += w) {
    int64_t r = 0;
    for (; r + w <= size; r += w) {
      Vec<A> block[w];
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i) block[i] = load(h + (r + i) * n + lane) + bias[r + i];
      transpose<A>(block);
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i) store(out + (lane + i) * args.hidden + r, block[i]);
    }
    for (; r < size; ++r) {
      for (int i = 0; i < w; ++i) one(lane + i, r);
    }
  }
  for (; lane < lanes; ++lane) {
    for (int64_t r = 0; r < size; ++r) one(lane, r);
  }
}

// h = act(h + bias) for h (rows, lanes).
template <Activation kActivation, class A>
static void activate_rows(A* h, const A* bias, int64_t rows) {
  constexpr int w = kLanes<A>, n = kPanel<A>;
  for (int64_t r = 0; r < rows; ++r, h += n) {
    if constexpr (std::is_same_v<A, double>) {
      for (int i = 0; i < n; ++i) h[i] = value_and_slope<kActivation>(h[i] + bias[r]).value;
    } else {
      Vec<A> first = value_and_slope<kActivation>(load(h) + bias[r]).value;
      Vec<A> second = value_and_slope<kActivation>(load(h + w) + bias[r]).value;
      store(h, first);
      store(h + w, second);
    }
  }
}

template <class A>
static void activate_panel(Activation activation, A* h, const A* bias, int64_t rows) {
  with_activation(activation, [&](auto known) { activate_rows<known()>(h, bias, rows); });
}

// The epilogue of one panel, with the statistics of what was stored.
template <class T>
static void write_panel(const MlpArgs& args, int64_t panel, const Acc<T>* sums, Acc<T>* gain,
                        int64_t& last_image) {
  using A = Acc<T>;
  const Image& in = args.in;
  A* shift = gain + in.channels;
  T* out = static_cast<T*>(args.out);
  for_each_run(in, panel * kPanel<A>, kPanel<A>, [&](const Run& run) {
    if (run.image != last_image) {
      last_image = run.image;
      A k = args.drop_path ? static_cast<A>(args.drop_path[run.image]) : A(1);
      A ka = args.hidden_drop_path ? static_cast<A>(args.hidden_drop_path[run.image]) : A(1);
      load_all<T>(as<T>(args.layer_scale), gain, in.channels, A(1));
      load_all<T>(as<T>(args.fc2_bias), shift, in.channels, A(0));
      for (int64_t c = 0; c < in.channels; ++c) {
        gain[c] *= k;
        shift[c] *= gain[c];
        gain[c] *= ka;
      }
    }
    const T* x = as<T>(in.data) + run.image * in.channels * in.pixels();
    write_run<T>(in, 0, in.channels, run, sums, out, [&](auto sum, int64_t at, auto of) {
      return load_as<decltype(sum)>(x + at) + (sum * of(gain) + of(shift));
    });
    for (int64_t g = 0; args.partials && g < in.groups; ++g) {
      int64_t slot = panel - run.image * in.pixels() / kPanel<A>;
      args.partials[(run.image * in.groups + g) * args.slots + slot] =
          pixel_statistics(in, out, run.image, g, run.pixel, run.count);
    }
  });
}

template <class T>
static void mlp_tile(const MlpArgs& args, int64_t tile, int64_t split, Acc<T>* memory) {
  using A = Acc<T>;
  constexpr int n = kPanel<A>;
  const Image& in = args.in;
  int64_t channels = in.channels, panel_size = channels * n;
  int64_t first = tile * args.panels / args.tiles, last = (tile + 1) * args.panels / args.tiles;
  int64_t count = last - first, left = in.batch * in.pixels() - (last - 1) * n;
  int64_t last_lanes = smaller(left, n);
  A* x = memory;
  A* sums = x + count * panel_size;
  A* hidden = sums + count * panel_size;
  A* spare = hidden + count * args.chunk * n;
  A* bias = spare + gemm_spare(larger(channels, args.chunk));
  A *center = bias + args.chunk, *scale = center + channels, *shift = scale + channels;
  if (args.splits > 1) {
    sums = static_cast<A*>(args.accumulators) + (split * args.panels + first) * panel_size;
  }
  int64_t image = -1;
  for (int64_t p = first; p < last; ++p) {
    A* to = x + (p - first) * panel_size;
    for_each_run(in, p * n, n, [&](const Run& run) {
      if (run.image != image) {
        norm_coefficients<T>(in, run.image, args.mean, args.rstd, args.norm_weight, args.norm_bias,
                             center, scale, shift);
        image = run.image;
      }
      pack_run<T>(in, run, center, scale, shift, to);
    });
    for (int64_t c = 0; p + 1 == last && last_lanes < n && c < channels; ++c) {
      for (int64_t i = last_lanes; i < n; ++i) to[c * n + i] = 0;
    }
  }
  const T *fc1 = as<T>(args.fc1_weight), *fc2 = as<T>(args.fc2_weight), *b1 = as<T>(args.fc1_bias);
  int64_t chunks = (args.hidden + args.chunk - 1) / args.chunk;
  int64_t from = chunks * split / args.splits, to = chunks * (split + 1) / args.splits;
  for (int64_t i = from; i < to; ++i) {
    int64_t start = i * args.chunk, size = smaller(args.chunk, args.hidden - start);
    load_all<T>(b1 ? b1 + start : nullptr, bias, size, A(0));
    gemm<T>(fc1 + start * channels, channels, size, channels, x, panel_size, count, last_lanes,
            hidden, size * n, false, spare);
    for (int64_t p = 0; p < count; ++p) {
      if (args.kept) {
        keep_hidden<T>(args, (first + p) * n, p + 1 < count ? n : last_lanes, start, size,
                       hidden + p * size * n, bias);
      }
      activate_panel<A>(args.activation, hidden + p * size * n, bias, size);
    }
    gemm<T>(fc2 + start, args.hidden, channels, size, hidden, size * n, count, last_lanes, sums,
            panel_size, i > from, spare);
  }
  image = -1;
  for (int64_t p = first; args.splits == 1 && p < last; ++p) {
    write_panel<T>(args, p, sums + (p - first) * panel_size, center, image);
  }
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

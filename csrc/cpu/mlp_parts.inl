// The pieces of the MLP's forward: panels of GN(x), rows of the hidden, and the epilogue.
#pragma once

#include "activations.inl"
#include "gemm.inl"
#include "group_norm.inl"
#include "rows.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

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

// Writes GN(x) of the panels [first, last), zeros in lanes without a pixel. memory: 3 * channels
// values.
template <class T>
static void pack_panels(const MlpArgs& args, int64_t first, int64_t last, Acc<T>* memory,
                        Acc<T>* to) {
  using A = Acc<T>;
  constexpr int n = kPanel<A>;
  const Image& in = args.in;
  A *center = memory, *scale = center + in.channels, *shift = scale + in.channels;
  int64_t image = -1;
  for (int64_t p = first; p < last; ++p, to += in.channels * n) {
    for_each_run(in, p * n, n, [&](const Run& run) {
      if (run.image != image) {
        norm_coefficients<T>(in, run.image, args.mean, args.rstd, args.norm_weight, args.norm_bias,
                             center, scale, shift);
        image = run.image;
      }
      pack_run<T>(in, run, center, scale, shift, to);
    });
    int64_t lanes = p + 1 < args.panels ? n : last_lanes_of<A>(in, args.panels);
    for (int64_t c = 0; lanes < n && c < in.channels; ++c) {
      std::fill(to + c * n + lanes, to + (c + 1) * n, A(0));
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

// h = act(h + bias) for the first `lanes` of h (rows, panel).
template <Activation kActivation, class A>
static void activate_rows(A* h, const A* bias, int64_t rows, int64_t lanes) {
  for (int64_t r = 0; r < rows; ++r, h += kPanel<A>) {
    for (int64_t i = 0; i < lanes; i += kLanes<A>) {
      if constexpr (std::is_same_v<A, double>) {
        for (int64_t j = i; j < i + kLanes<A>; ++j) {
          h[j] = value_and_slope<kActivation>(h[j] + bias[r]).value;
        }
      } else {
        store(h + i, value_and_slope<kActivation>(load(h + i) + bias[r]).value);
      }
    }
  }
}

template <class A>
static void activate_panel(Activation activation, A* h, const A* bias, int64_t rows,
                           int64_t lanes) {
  with_activation(activation, [&](auto known) { activate_rows<known()>(h, bias, rows, lanes); });
}

// `panels` panels from the pixel `first` on, the last of them `last_lanes` lanes wide, are
// multiplied with `size` rows of fc1 from `start` on; h = act(fc1 x + bias), and fc1's result is
// kept where that is wanted. bias: memory of `size` values.
template <class T>
static void hidden_rows(const MlpArgs& args, int64_t start, int64_t size, const Acc<T>* x,
                        int64_t first, int64_t panels, int64_t last_lanes, Acc<T>* h,
                        int64_t distance, Acc<T>* bias, Acc<T>* spare) {
  using A = Acc<T>;
  constexpr int n = kPanel<A>;
  int64_t channels = args.in.channels;
  const T *weight = as<T>(args.fc1_weight) + start * channels, *b = as<T>(args.fc1_bias);
  load_all<T>(b ? b + start : nullptr, bias, size, A(0));
  gemm<T>(weight, channels, size, channels, x, channels * n, panels, last_lanes, h, distance, false,
          spare);
  for (int64_t p = 0; p < panels; ++p) {
    int64_t lanes = p + 1 < panels ? n : last_lanes;
    if (args.kept) {
      keep_hidden<T>(args, first + p * n, lanes, start, size, h + p * distance, bias);
    }
    activate_panel<A>(args.activation, h + p * distance, bias, size, lanes);
  }
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

}  // namespace poolformer::cpu::POOLFORMER_ISA

// The pieces of the MLP's forward: panels of GN(x), rows of the hidden, and the epilogue.
#pragma once

#include "activations.inl"
#include "gemm.inl"
#include "group_norm.inl"
#include "rows.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

// The block of w pixels and w * kStep channels at `from`, normed, as w steps of w lanes.
template <class F, class T>
PF_INLINE void norm_block(const T* from, int64_t stride, const Acc<T>* center, const Acc<T>* scale,
                          const Acc<T>* shift, Vec<Acc<T>> (&rows)[kLanes<Acc<T>>]) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>;
  Vec<A> m = load(center), a = load(scale), b = load(shift);
#pragma GCC unroll 16
  for (int i = 0; i < w; ++i) rows[i] = (load(from + i * stride) - m) * a + b;
#if defined(POOLFORMER_BF16)
  if constexpr (kStep<F> == 2) {
    m = load(center + w), a = load(scale + w), b = load(shift + w);
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) {
      rows[i] = in_order(rows[i], (load(from + i * stride + w) - m) * a + b);
    }
  }
#endif
  transpose<A>(rows);
}

// Writes GN(x) of one run as a panel of factors (channels, lanes).
template <class F, class T>
static void pack_run(const Image& in, const Run& run, const Acc<T>* center, const Acc<T>* scale,
                     const Acc<T>* shift, F* out) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>, n = kPanel<A>, v = kStep<F>;
  int64_t channels = in.channels, pixels = in.pixels();
  const T* x = as<T>(in.data) + run.image * channels * pixels;
  auto one = [&](const T* from, int64_t c, int64_t lane) {
    store1(out + place<F>(c, lane), (load1(from) - center[c]) * scale[c] + shift[c]);
  };
  if (!in.channels_last) {
    const T* from = x + run.pixel;
    int64_t c = 0;
    for (; run.count == n && c + v <= channels; c += v) {
      for (int i = 0; i < n; i += w) {
        Vec<A> step = (load(from + c * pixels + i) - center[c]) * scale[c] + shift[c];
#if defined(POOLFORMER_BF16)
        if constexpr (v == 2) {
          const T* second = from + (c + 1) * pixels + i;
          step = in_turns(step, (load(second) - center[c + 1]) * scale[c + 1] + shift[c + 1]);
        }
#endif
        store_raw<A, w>(out + place<F>(c, i), step);
      }
    }
    for (; c < channels; ++c) {
      for (int i = 0; i < run.count; ++i) one(from + c * pixels + i, c, run.lane + i);
    }
    return;
  }
  const T* from = x + run.pixel * channels;
  int lane = 0;
  for (; lane + w <= run.count; lane += w) {
    int64_t c = 0;
    for (; c + v * w <= channels; c += v * w) {
      Vec<A> rows[w];
      norm_block<F>(from + lane * channels + c, channels, center + c, scale + c, shift + c, rows);
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i) {
        store_raw<A, w>(out + place<F>(c + i * v, run.lane + lane), rows[i]);
      }
    }
    for (; c < channels; ++c) {
      for (int i = lane; i < lane + w; ++i) one(from + i * channels + c, c, run.lane + i);
    }
  }
  for (; lane < run.count; ++lane) {
    for (int64_t c = 0; c < channels; ++c) one(from + lane * channels + c, c, run.lane + lane);
  }
}

// Writes GN(x) of the panels [first, last), zeros in lanes without a pixel. memory: 3 * channels
// values.
template <class F, class T>
static void pack_panels(const MlpArgs& args, int64_t first, int64_t last, Acc<T>* memory, F* to) {
  using A = Acc<T>;
  constexpr int n = kPanel<A>, v = kStep<F>;
  const Image& in = args.in;
  A *center = memory, *scale = center + in.channels, *shift = scale + in.channels;
  int64_t image = -1, steps = steps_of<F>(in.channels), size = panel_values<F>(in.channels);
  for (int64_t p = first; p < last; ++p, to += size) {
    if (steps * v > in.channels) std::fill(to + size - kPanelStep<F>, to + size, F{});
    for_each_run(in, p * n, n, [&](const Run& run) {
      if (run.image != image) {
        norm_coefficients<T>(in, run.image, args.mean, args.rstd, args.norm_weight, args.norm_bias,
                             center, scale, shift);
        image = run.image;
      }
      pack_run<F, T>(in, run, center, scale, shift, to);
    });
    int64_t lanes = p + 1 < args.panels ? n : last_lanes_of<A>(in, args.panels);
    for (int64_t k = 0; lanes < n && k < steps; ++k) {
      std::fill(to + k * n * v + lanes * v, to + (k + 1) * n * v, F{});
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

// out = act(h + bias) as factors, for the first `lanes` of h (rows, panel).
template <Activation kActivation, class F>
static void activate_rows(const Acc<F>* h, const Acc<F>* bias, int64_t rows, int64_t lanes,
                          F* out) {
  using A = Acc<F>;
  make_factors<F>(h, rows, lanes, out, [&](int64_t r, Vec<A> v) {
    v += bias[r];
    if constexpr (std::is_same_v<A, double>) {
      for (int i = 0; i < kLanes<A>; ++i) v[i] = value_and_slope<kActivation>(v[i]).value;
      return v;
    } else {
      return value_and_slope_as<kActivation, F>(v).value;
    }
  });
}

template <class F>
static void activate_panel(Activation activation, const Acc<F>* h, const Acc<F>* bias, int64_t rows,
                           int64_t lanes, F* out) {
  with_activation(activation,
                  [&](auto known) { activate_rows<known(), F>(h, bias, rows, lanes, out); });
}

// `panels` panels from the pixel `first` on, the last of them `last_lanes` lanes wide, are
// multiplied with `size` rows of fc1 from `start` on into h (panels, size, lanes);
// hidden = act(h + bias), which may be the same memory, and fc1's result is kept where that is
// wanted. bias: memory of `size` values.
template <class T, class W>
static void hidden_rows(const MlpArgs& args, int64_t start, int64_t size, const Factor<W>* x,
                        int64_t first, int64_t panels, int64_t last_lanes, const Panels<Acc<T>>& h,
                        const Panels<Factor<W>>& hidden, Acc<T>* bias, Acc<T>* spare) {
  using A = Acc<T>;
  using F = Factor<W>;
  constexpr int n = kPanel<A>;
  int64_t channels = args.in.channels;
  const W* weight = as<W>(args.fc1_weight) + start * channels;
  const T* b = as<T>(args.fc1_bias);
  load_all<T>(b ? b + start : nullptr, bias, size, A(0));
  gemm<W>(weight, channels, size, channels, x, panel_values<F>(channels), panels, last_lanes,
          h.data, h.distance, false, spare);
  for (int64_t p = 0; p < panels; ++p) {
    int64_t lanes = p + 1 < panels ? n : last_lanes;
    const A* from = h.data + p * h.distance;
    if (args.kept) keep_hidden<Kept<W>>(args, first + p * n, lanes, start, size, from, bias);
    activate_panel<F>(args.activation, from, bias, size, lanes, hidden.data + p * hidden.distance);
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

// Before and after the MLP's backward: the plan, the weights as its products read them, and the
// sums of what its tasks give. A task takes a part of the pixels and a part of the hidden channels:
// it gives the part of the weights' gradients that its pixels make, and the part of dn that its
// hidden channels make.
#pragma once

#include "gemm.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

// Sizes that follow from the arguments. Weights as panels of factors: n lanes of hidden channels
// and steps along the channels, fc1_rows n lanes of channels and steps along all of the hidden.
template <class F>
struct MlpBackwardSizes {
  using A = Acc<F>;
  static constexpr int n = kPanel<A>;
  int64_t channels, channel_panels, panels, panel, weight, rows, part;

  explicit MlpBackwardSizes(const MlpBackwardArgs& args)
      : channels(args.in.channels),
        channel_panels((channels + n - 1) / n),
        panels((args.hidden + n - 1) / n),
        panel(panel_values<F>(channels)),
        weight(panels * n * channels),
        rows(panels * n * channel_panels * n),
        part(2 * weight + panels * n) {}

  int64_t factors() const { return 2 * panels * panel + rows; }
  F* fc1_panels(const MlpBackwardArgs& args) const { return static_cast<F*>(args.factors); }
  F* fc2_panels(const MlpBackwardArgs& args) const { return fc1_panels(args) + panels * panel; }
  F* fc1_rows(const MlpBackwardArgs& args) const { return fc2_panels(args) + panels * panel; }
  // dW1 and D as [j / n][c][j % n], c < channels, j < hidden (padded), and db1, from a part of the
  // pixels.
  A* gradients(const MlpBackwardArgs& args, int64_t row_part) const {
    return static_cast<A*>(args.parts) + row_part * part;
  }
};

template <class F>
static void mlp_backward_plan_typed(MlpBackwardArgs& args) {
  int64_t pixels = args.in.batch * args.in.pixels(), hidden = args.hidden;
  MlpBackwardSizes<F> sizes(args);
  // A part of the pixels costs 2 hidden * channels sums, one of the hidden pixels * channels, and
  // as much again to make pairs of what it reads.
  int64_t r = 1, s = 1;
  while (r * s < backward_tasks()) {
    bool more_rows = 2 * r * kRows <= pixels, more_hidden = 2 * s <= sizes.panels;
    if (more_rows && (2 * r * hidden <= kStep<F> * s * pixels || !more_hidden)) {
      r *= 2;
    } else if (more_hidden) {
      s *= 2;
    } else {
      break;
    }
  }
  while (r < 64 && pixels / (2 * r) >= 2048) r *= 2;
  args.row_parts = r, args.hidden_parts = s, args.panels = sizes.panels;
  args.factors_bytes = sizes.factors() * sizeof(F);
  args.parts_bytes = r * sizes.part * sizeof(Acc<F>);
  args.gradient_bytes = s * pixels * args.in.channels * sizeof(Acc<F>);
}

static void mlp_backward_plan(MlpBackwardArgs& args) {
  with_types(args, [&](auto*, auto* weight) {
    mlp_backward_plan_typed<Factor<std::remove_pointer_t<decltype(weight)>>>(args);
  });
}

// A vector of steps along a row of a weight.
template <class T>
PF_INLINE Vec<Acc<T>> load_steps(const T* p) {
#if defined(POOLFORMER_BF16)
  if constexpr (std::is_same_v<T, rounded>) return in_order(load(p), load(p + kLanes<float>));
#endif
  if constexpr (kStep<Factor<T>> == 1) return load(p);
  return load_raw<Acc<T>, kLanes<Acc<T>>>(p);
}

// Lays out fc1 for one panel of hidden channels, `fc1` its first row.
template <class T>
static void pack_fc1(const MlpBackwardArgs& args, int64_t panel, const T* fc1) {
  using A = Acc<T>;
  using F = Factor<T>;
  constexpr int w = kLanes<A>, n = kPanel<A>, v = kStep<F>;
  MlpBackwardSizes<F> sizes(args);
  int64_t channels = sizes.channels, start = panel * n, count = smaller(n, args.hidden - start);
  F* to = sizes.fc1_panels(args) + panel * sizes.panel;
  int64_t c = 0;
  for (; count == n && c + w * v <= channels; c += w * v) {
    for (int half = 0; half < n; half += w) {
      Vec<A> block[w];
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i) block[i] = load_steps(fc1 + (half + i) * channels + c);
      transpose<A>(block);
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i) store_raw<A, w>(to + place<F>(c + i * v, half), block[i]);
    }
  }
  if (c < channels) std::fill(to + place<F>(c, 0), to + sizes.panel, F{});
  for (; c < channels; ++c) {
    for (int i = 0; i < count; ++i) {
      store1(to + place<F>(c, i), load1(fc1 + i * channels + c));
    }
  }

  to = sizes.fc1_rows(args) + start * n;
  int64_t distance = sizes.panels * n * n;
  for (c = 0; count == n && c + w <= channels; c += w) {
    F* column = to + c / n * distance + c % n * v;
    for (int j = 0; j < n; j += v) {
      store_raw<A, w>(column + place<F>(j, 0),
                      step_of<F>(j, n, [&](int64_t k) { return load(fc1 + k * channels + c); }));
    }
  }
  for (; c < sizes.channel_panels * n; ++c) {
    for (int j = 0; j < n; ++j) {
      A value = j < count && c < channels ? load1(fc1 + j * channels + c) : A(0);
      store1(to + c / n * distance + place<F>(j, c % n), value);
    }
  }
}

// Lays out layer scale times fc2 for one panel of hidden channels, `fc2` its first column; scale:
// memory of `channels` values.
template <class T>
static void pack_fc2(const MlpBackwardArgs& args, int64_t panel, const T* fc2,
                     const Acc<T>* scale) {
  using A = Acc<T>;
  using F = Factor<T>;
  constexpr int w = kLanes<A>, n = kPanel<A>;
  MlpBackwardSizes<F> sizes(args);
  int64_t channels = sizes.channels, count = smaller(n, args.hidden - panel * n);
  F* to = sizes.fc2_panels(args) + panel * sizes.panel;
  if (count < n) {
    std::fill(to, to + sizes.panel, F{});
    for (int64_t c = 0; c < channels; ++c) {
      for (int i = 0; i < count; ++i) {
        store1(to + place<F>(c, i), load1(fc2 + c * args.hidden + i) * scale[c]);
      }
    }
    return;
  }
  for (int64_t c = 0; c < channels; c += kStep<F>) {
    for (int half = 0; half < n; half += w) {
      store_raw<A, w>(to + place<F>(c, half), step_of<F>(c, channels, [&](int64_t k) {
                        return load(fc2 + k * args.hidden + half) * scale[k];
                      }));
    }
  }
}

// Adds up the gradients of one panel of hidden channels over the parts of the pixels, in order.
template <class T, class W>
static void finish_panel(const MlpBackwardArgs& args, int64_t panel, Acc<T>* memory) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>, n = kPanel<A>;
  MlpBackwardSizes<Factor<W>> sizes(args);
  int64_t channels = sizes.channels, start = panel * n, count = smaller(n, args.hidden - start);
  A *scale = memory + channels * n, *bias = scale + channels;
  auto add_parts = [&](int64_t offset, int64_t size, A* to) -> const A* {
    if (args.row_parts == 1) return sizes.gradients(args, 0) + offset;
    for (int64_t i = 0; i < size; i += w) {
      Vec<A> v = load(sizes.gradients(args, 0) + offset + i);
      for (int64_t r = 1; r < args.row_parts; ++r) {
        v += load(sizes.gradients(args, r) + offset + i);
      }
      store(to + i, v);
    }
    return to;
  };
  load_all<T>(as<T>(args.layer_scale), scale, channels, A(1));
  const A* bias_sums = add_parts(2 * sizes.weight + start, n, bias);
  T* fc1_bias = static_cast<T*>(args.fc1_bias_gradient) + start;
  for (int64_t j = 0; j < count; ++j) store1(fc1_bias + j, bias_sums[j]);

  const A* sums = add_parts(start * channels, channels * n, memory);
  W* fc1 = static_cast<W*>(args.fc1_gradient) + start * channels;
  int64_t c = 0;
  for (; count == n && c + w <= channels; c += w) {
    for (int half = 0; half < n; half += w) {
      Vec<A> block[w];
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i) block[i] = load(sums + (c + i) * n + half);
      transpose<A>(block);
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i) store(fc1 + (half + i) * channels + c, block[i]);
    }
  }
  for (; c < channels; ++c) {
    for (int64_t j = 0; j < count; ++j) store1(fc1 + j * channels + c, sums[c * n + j]);
  }

  sums = add_parts(sizes.weight + start * channels, channels * n, memory);
  W* fc2 = static_cast<W*>(args.fc2_gradient) + start;
  const W* weight = as<W>(args.fc2_weight) + start;
  for (c = 0; c < channels; ++c) {
    Vec<A> product = {};
    A rest = 0;
    for_each_vector<A>(count, [&](int64_t j, auto lanes) {
      using V = decltype(lanes);
      V v = load_as<V>(sums + c * n + j);
      V p = v * load_as<V>(weight + c * args.hidden + j);
      store_as(fc2 + c * args.hidden + j, v * scale[c]);
      if constexpr (std::is_same_v<V, A>) {
        rest += p;
      } else {
        product += p;
      }
    });
    args.scale_sums[panel * channels + c] = sum_lanes<A>(product) + rest;
  }
}

static void mlp_backward_pack(const MlpBackwardArgs& args, int64_t begin, int64_t end) {
  with_types(args, [&](auto* type, auto* weight) {
    using T = std::remove_pointer_t<decltype(type)>;
    using W = std::remove_pointer_t<decltype(weight)>;
    constexpr int n = kPanel<Acc<T>>;
    int64_t channels = args.in.channels;
    auto* scale = static_cast<Acc<T>*>(scratch(channels * sizeof(Acc<T>)));
    bool scaled = kStep<Factor<W>> == 1;  // else g is
    load_all<T>(scaled ? as<T>(args.layer_scale) : nullptr, scale, channels, Acc<T>(1));
    for (int64_t panel = begin; panel < end; ++panel) {
      pack_fc1<W>(args, panel, as<W>(args.fc1_weight) + panel * n * channels);
      pack_fc2<W>(args, panel, as<W>(args.fc2_weight) + panel * n, scale);
    }
  });
}

// Adds up dn over the parts of the hidden, in order, for the images [begin, end).
static void mlp_backward_add(const MlpBackwardArgs& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto* type) {
    using A = Acc<std::remove_pointer_t<decltype(type)>>;
    int64_t size = args.in.channels * args.in.pixels(), all = args.in.batch * size;
    A* dn = static_cast<A*>(args.gradient);
    for_each_vector<A>((end - begin) * size, [&](int64_t i, auto lanes) {
      A* to = dn + begin * size + i;
      auto v = load_as<decltype(lanes)>(to);
      for (int64_t s = 1; s < args.hidden_parts; ++s) {
        v += load_as<decltype(lanes)>(to + s * all);
      }
      store_as(to, v);
    });
  });
}

static void mlp_backward_finish(const MlpBackwardArgs& args, int64_t begin, int64_t end) {
  with_types(args, [&](auto* type, auto* weight) {
    using T = std::remove_pointer_t<decltype(type)>;
    using W = std::remove_pointer_t<decltype(weight)>;
    constexpr int n = kPanel<Acc<T>>;
    int64_t size = args.in.channels * (n + 1) + n;
    auto* memory = static_cast<Acc<T>*>(scratch(size * sizeof(Acc<T>)));
    for (int64_t panel = begin; panel < end; ++panel) finish_panel<T, W>(args, panel, memory);
  });
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

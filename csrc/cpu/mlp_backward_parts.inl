// Before and after the MLP's backward: the plan, the weights as its products read them, and the
// sums of what its tasks give. A task takes a part of the pixels and a part of the hidden channels:
// it gives the part of the weights' gradients that its pixels make, and the part of dn that its
// hidden channels make.
#pragma once

#include "gemm.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

// Sizes that follow from the arguments. Weights in panels, c < channels, j < hidden (padded):
// fc1_panels[j / n][c][j % n], fc1_rows[c / n][j][c % n], fc2_panels[j / n][c][j % n].
template <class A>
struct MlpBackwardSizes {
  static constexpr int n = kPanel<A>;
  int64_t channels, channel_panels, panels, weight, rows, part;

  explicit MlpBackwardSizes(const MlpBackwardArgs& args)
      : channels(args.in.channels),
        channel_panels((channels + n - 1) / n),
        panels((args.hidden + n - 1) / n),
        weight(panels * n * channels),
        rows(panels * n * channel_panels * n),
        part(2 * weight + panels * n) {}

  A* fc1_panels(const MlpBackwardArgs& args) const { return static_cast<A*>(args.weights); }
  A* fc2_panels(const MlpBackwardArgs& args) const { return fc1_panels(args) + weight; }
  A* fc1_rows(const MlpBackwardArgs& args) const { return fc2_panels(args) + weight; }
  // dW1 and D, laid out as fc2_panels, and db1, from a part of the pixels.
  A* gradients(const MlpBackwardArgs& args, int64_t row_part) const {
    return static_cast<A*>(args.parts) + row_part * part;
  }
};

template <class A>
static void mlp_backward_plan_typed(MlpBackwardArgs& args) {
  int64_t pixels = args.in.batch * args.in.pixels(), hidden = args.hidden;
  MlpBackwardSizes<A> sizes(args);
  // A part of the pixels costs 2 hidden * channels sums, one of the hidden pixels * channels.
  int64_t r = 1, s = 1;
  while (r * s < 8) {
    bool more_rows = 2 * r * kRows <= pixels, more_hidden = 2 * s <= sizes.panels;
    if (more_rows && (2 * r * hidden <= s * pixels || !more_hidden)) {
      r *= 2;
    } else if (more_hidden) {
      s *= 2;
    } else {
      break;
    }
  }
  while (r < 64 && pixels / (2 * r) >= 2048) r *= 2;
  args.row_parts = r, args.hidden_parts = s, args.panels = sizes.panels;
  args.weights_bytes = (2 * sizes.weight + sizes.rows) * sizeof(A);
  args.parts_bytes = r * sizes.part * sizeof(A);
  args.gradient_bytes = s * pixels * args.in.channels * sizeof(A);
}

static void mlp_backward_plan(MlpBackwardArgs& args) {
  if (args.in.dtype == Dtype::kFloat64) return mlp_backward_plan_typed<double>(args);
  mlp_backward_plan_typed<float>(args);
}

// Lays out the weights of one panel of hidden channels; scale: memory of `channels` values.
template <class T>
static void pack_weights(const MlpBackwardArgs& args, int64_t panel, Acc<T>* scale) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>, n = kPanel<A>;
  MlpBackwardSizes<A> sizes(args);
  int64_t channels = sizes.channels, start = panel * n, count = smaller(n, args.hidden - start);
  const T *fc1 = as<T>(args.fc1_weight) + start * channels, *fc2 = as<T>(args.fc2_weight) + start;
  A* fc1_panel = sizes.fc1_panels(args) + start * channels;
  A* fc2_panel = sizes.fc2_panels(args) + start * channels;
  A* fc1_rows = sizes.fc1_rows(args) + start * n;
  int64_t distance = sizes.panels * n * n;  // of the panels of fc1_rows
  load_all<T>(as<T>(args.layer_scale), scale, channels, A(1));
  for (int64_t c = 0; c < channels; ++c) {
    A* to = fc2_panel + c * n;
    const T* from = fc2 + c * args.hidden;
    if (count == n) {
      store(to, load(from) * scale[c]);
      store(to + w, load(from + w) * scale[c]);
    } else {
      for (int i = 0; i < n; ++i) to[i] = i < count ? load1(from + i) * scale[c] : A(0);
    }
  }
  int64_t c = 0;
  for (; count == n && c + w <= channels; c += w) {
    for (int half = 0; half < n; half += w) {
      Vec<A> block[w];
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i) {
        block[i] = load(fc1 + (half + i) * channels + c);
        store(fc1_rows + c / n * distance + (half + i) * n + c % n, block[i]);
      }
      transpose<A>(block);
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i) store(fc1_panel + (c + i) * n + half, block[i]);
    }
  }
  for (; c < sizes.channel_panels * n; ++c) {
    for (int i = 0; i < n; ++i) {
      A v = i < count && c < channels ? load1(fc1 + i * channels + c) : A(0);
      fc1_rows[c / n * distance + i * n + c % n] = v;
      if (c < channels) fc1_panel[c * n + i] = v;
    }
  }
}

// Adds up the gradients of one panel of hidden channels over the parts of the pixels, in order.
template <class T>
static void finish_panel(const MlpBackwardArgs& args, int64_t panel, Acc<T>* memory) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>, n = kPanel<A>;
  MlpBackwardSizes<A> sizes(args);
  int64_t channels = sizes.channels, start = panel * n, count = smaller(n, args.hidden - start);
  A *sums = memory, *scale = sums + channels * n, *bias = scale + channels;
  auto add_parts = [&](int64_t offset, int64_t size, A* to) {
    for (int64_t i = 0; i < size; i += w) {
      Vec<A> v = load(sizes.gradients(args, 0) + offset + i);
      for (int64_t r = 1; r < args.row_parts; ++r) {
        v += load(sizes.gradients(args, r) + offset + i);
      }
      store(to + i, v);
    }
  };
  load_all<T>(as<T>(args.layer_scale), scale, channels, A(1));
  add_parts(2 * sizes.weight + start, n, bias);
  T* fc1_bias = static_cast<T*>(args.fc1_bias_gradient) + start;
  for (int64_t j = 0; j < count; ++j) store1(fc1_bias + j, bias[j]);

  add_parts(start * channels, channels * n, sums);
  T* fc1 = static_cast<T*>(args.fc1_gradient) + start * channels;
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

  add_parts(sizes.weight + start * channels, channels * n, sums);
  T* fc2 = static_cast<T*>(args.fc2_gradient) + start;
  const T* weight = as<T>(args.fc2_weight) + start;
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
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto* scale = static_cast<Acc<T>*>(scratch(args.in.channels * sizeof(Acc<T>)));
    for (int64_t panel = begin; panel < end; ++panel) pack_weights<T>(args, panel, scale);
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
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int n = kPanel<Acc<T>>;
    int64_t size = args.in.channels * (n + 1) + n;
    auto* memory = static_cast<Acc<T>*>(scratch(size * sizeof(Acc<T>)));
    for (int64_t panel = begin; panel < end; ++panel) finish_panel<T>(args, panel, memory);
  });
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

// Before and after the backward of the convolution: the plan, the weight as panels, the sums of
// the weight's gradient. Windows have the order (rows, columns, channels) here.
#pragma once

#include "patch_embed_parts.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

// Sizes that follow from the arguments. The weight as panels of factors (taps, channel panels):
// n lanes of input channels, steps along the output channels. Its gradient as sums
// (groups of window rows, panels of their values, output channels, n), for each part of the pixels.
template <class F>
struct PatchEmbedBackwardSizes {
  using A = Acc<F>;
  static constexpr int n = kPanel<A>;
  int64_t line, taps, channel_panels, panel, group_panels, sums;

  explicit PatchEmbedBackwardSizes(const PatchEmbedBackwardArgs& args)
      : line(args.shape.kernel[1] * args.shape.in.channels),
        taps(args.shape.kernel[0] * args.shape.kernel[1]),
        channel_panels((args.shape.in.channels + n - 1) / n),
        panel(panel_values<F>(args.shape.out.channels)),
        group_panels((args.lines * line + n - 1) / n),
        sums(args.groups * group_panels * n * args.shape.out.channels) {}

  // The sums of a group of window rows.
  A* gradients(const PatchEmbedBackwardArgs& args, int64_t pixel_part, int64_t group) const {
    return static_cast<A*>(args.sums) + pixel_part * sums +
           group * group_panels * n * args.shape.out.channels;
  }
  // The same from the output channel `first` on, as products write them.
  Panels<A> gradient_panels(const PatchEmbedBackwardArgs& args, int64_t pixel_part, int64_t group,
                            int64_t first) const {
    if (args.in_place) {
      int64_t depth = args.shape.depth();
      A* gradient = static_cast<A*>(args.weight_gradient);
      return {gradient + first * depth + group * args.lines * line, depth, n};
    }
    return {gradients(args, pixel_part, group) + first * n, n, n * args.shape.out.channels};
  }
};

template <class T>
static void patch_embed_backward_plan_typed(PatchEmbedBackwardArgs& args) {
  using A = Acc<T>;
  using F = Factor<T>;
  const PatchEmbedArgs& shape = args.shape;
  const Image &in = shape.in, &out = shape.out;
  constexpr int64_t kWindow = 600, n = kPanel<A>;
  int64_t tasks = backward_tasks() * 3 / 4;  // groups often come in threes
  int64_t pixels = out.batch * out.pixels(), line = shape.kernel[1] * in.channels;
  args.lines = smaller(larger(kWindow / line, 1), shape.kernel[0]);
  args.groups = (shape.kernel[0] + args.lines - 1) / args.lines;
  // A part of the pixels costs a gradient's sums, one of the channels packs all windows again.
  int64_t r = 1, q = 1;
  while (r * args.groups < tasks && pixels / (2 * r) >= 2 * out.channels) r *= 2;
  while (r * q * args.groups < tasks && out.channels / (2 * q) >= 64) q *= 2;
  args.pixel_parts = r, args.channel_parts = q;
  args.in_place = r == 1 && std::is_same_v<T, A> && shape.weight_channels_last && line % n == 0;

  args.columns =
      larger((out.width - 1) * shape.stride[1] + shape.kernel[1], in.width + shape.padding[1]);
  int64_t row_bytes = args.columns * round_up(in.channels, n) * sizeof(A);
  int64_t strips = larger((in.height * row_bytes + l2_bytes() / 3 - 1) / (l2_bytes() / 3),
                          (tasks + in.batch - 1) / in.batch);
  args.strips = smaller(strips, in.height);

  PatchEmbedBackwardSizes<F> sizes(args);
  args.panels = sizes.taps * sizes.channel_panels;
  args.factors_bytes = args.panels * sizes.panel * sizeof(F);
  args.sums_bytes = args.in_place ? 0 : r * sizes.sums * sizeof(A);
}

static void patch_embed_backward_plan(PatchEmbedBackwardArgs& args) {
  with_type(args.shape.in.dtype, [&](auto* type) {
    patch_embed_backward_plan_typed<std::remove_pointer_t<decltype(type)>>(args);
  });
}

// Lays out panels of the weight.
static void patch_embed_backward_pack(const PatchEmbedBackwardArgs& args, int64_t begin,
                                      int64_t end) {
  with_type(args.shape.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Acc<T>;
    using F = Factor<T>;
    constexpr int w = kLanes<A>, n = kPanel<A>;
    const PatchEmbedArgs& shape = args.shape;
    PatchEmbedBackwardSizes<F> sizes(args);
    int64_t channels = shape.in.channels, rows = shape.out.channels, depth = shape.depth();
    for (int64_t task = begin; task < end; ++task) {
      int64_t tap = task / sizes.channel_panels, c = task % sizes.channel_panels * n;
      const T* weight = as<T>(shape.weight);
      auto get = [&](int64_t row, int64_t first) {
        const T* from = weight + row * depth + tap * channels + first;
        if (shape.weight_channels_last && first + w <= channels) return load(from);
        Vec<A> v = {};
        for (int i = 0; i < smaller(w, channels - first); ++i) {
          v[i] = load1(weight + row * depth + shape.place(tap, first + i));
        }
        return v;
      };
      F* to = static_cast<F*>(args.factors) + task * sizes.panel;
      for (int64_t row = 0; row < rows; row += kStep<F>) {
        for (int half = 0; half < n; half += w) {
          store_raw<A, w>(to + place<F>(row, half),
                          step_of<F>(row, rows, [&](int64_t k) { return get(k, c + half); }));
        }
      }
    }
  });
}

// Writes rows of the weight's gradient from its sums.
static void patch_embed_backward_finish(const PatchEmbedBackwardArgs& args, int64_t begin,
                                        int64_t end) {
  with_type(args.shape.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Acc<T>;
    constexpr int w = kLanes<A>, n = kPanel<A>;
    const PatchEmbedArgs& shape = args.shape;
    PatchEmbedBackwardSizes<Factor<T>> sizes(args);
    int64_t channels = shape.in.channels, rows = shape.out.channels, depth = shape.depth();
    A* line = static_cast<A*>(scratch((args.groups * sizes.group_panels * n) * sizeof(A)));
    for (int64_t row = begin; row < end; ++row) {
      A* to = line;
      for (int64_t g = 0; g < args.groups; ++g, to = line + g * args.lines * sizes.line) {
        for (int64_t p = 0; p < sizes.group_panels; ++p) {
          for (int64_t i = (p * rows + row) * n, half = 0; half < n; half += w, to += w) {
            Vec<A> v = load(sizes.gradients(args, 0, g) + i + half);
            for (int64_t r = 1; r < args.pixel_parts; ++r) {
              v += load(sizes.gradients(args, r, g) + i + half);
            }
            store(to, v);
          }
        }
      }
      T* out = static_cast<T*>(args.weight_gradient) + row * depth;
      if (shape.weight_channels_last) {
        for_each_vector<A>(depth, [&](int64_t i, auto lanes) {
          store_as(out + i, load_as<decltype(lanes)>(line + i));
        });
      } else {
        for (int64_t c = 0; c < channels; ++c) {
          for (int64_t tap = 0; tap < sizes.taps; ++tap) {
            store1(out + shape.place(tap, c), line[tap * channels + c]);
          }
        }
      }
    }
  });
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

// dx = scale dy + slope (x - mean) + offset (+ residual): the scale of each channel, the slope and
// offset of each group. They and the parameters' gradients need the sums of dy and dy (x - mean).
#pragma once

#include "group_norm.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

static void group_norm_backward_plan(GroupNormBackwardArgs& args) {
  const Image& in = args.in;
  int64_t units = in.channels_last ? in.pixels() : in.channels, step = group_norm_step(in);
  args.tasks = (units + step - 1) / step;
  args.parts = in.channels_last ? args.tasks : 1;
}

// The units (pixels in channels_last, else channels) of a task.
struct NormTask {
  int64_t image, part, first, last;

  NormTask(const GroupNormBackwardArgs& args, int64_t task) {
    int64_t step = group_norm_step(args.in);
    image = task / args.tasks, part = task % args.tasks, first = part * step;
    last = smaller(first + step, args.in.channels_last ? args.in.pixels() : args.in.channels);
  }
};

// (sum of dy, sum of dy (x - mean)) of one plane; in float32, of at most kChunk values at a time.
template <class T, class G>
PF_INLINE void plane_sums(const G* dy, const T* x, Acc<T> mean, int64_t pixels, double* plain,
                          double* centered) {
  using A = Acc<T>;
  *plain = *centered = 0;
  for (int64_t start = 0; start < pixels; start += kChunk) {
    Vec<A> sum = {}, product = {};
    A rest = 0, rest_product = 0;
    for_each_vector<A>(smaller(kChunk, pixels - start), [&](int64_t i, auto lanes) {
      using V = decltype(lanes);
      V g = load_as<V>(dy + start + i), d = load_as<V>(x + start + i) - mean;
      if constexpr (std::is_same_v<V, A>) {
        rest += g;
        rest_product += g * d;
      } else {
        sum += g;
        product += g * d;
      }
    });
    *plain += static_cast<double>(sum_lanes<A>(sum)) + rest;
    *centered += static_cast<double>(sum_lanes<A>(product)) + rest_product;
  }
}

template <class T, class G>
static void norm_sums(const GroupNormBackwardArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Image& in = args.in;
  int64_t channels = in.channels, pixels = in.pixels();
  A* plain = static_cast<A*>(scratch(3 * channels * sizeof(A)));
  A *centered = plain + channels, *mean = centered + channels;
  for (int64_t i = begin; i < end; ++i) {
    NormTask task(args, i);
    int64_t image = task.image * channels * pixels;
    const T* x = as<T>(in.data) + image;
    const G* dy = as<G>(args.dy) + image;
    double* sums = args.sums + (task.image * args.parts + task.part % args.parts) * 2 * channels;
    const double* means = args.mean + task.image * in.groups;
    if (!in.channels_last) {
      for (int64_t c = task.first; c < task.last; ++c) {
        A m = static_cast<A>(means[c / in.group_channels()]);
        plane_sums(dy + c * pixels, x + c * pixels, m, pixels, sums + c, sums + channels + c);
      }
      continue;
    }
    for (int64_t c = 0; c < channels; ++c) plain[c] = centered[c] = 0;
    spread_groups(in, means, mean);
    for (int64_t p = task.first; p < task.last; ++p) {
      for_each_vector<A>(channels, [&](int64_t c, auto lanes) {
        using V = decltype(lanes);
        V g = load_as<V>(dy + p * channels + c);
        V d = load_as<V>(x + p * channels + c) - load_as<V>(mean + c);
        store_as(plain + c, load_as<V>(plain + c) + g);
        store_as(centered + c, load_as<V>(centered + c) + g * d);
      });
    }
    for (int64_t c = 0; c < channels; ++c) {
      sums[c] = plain[c];
      sums[channels + c] = centered[c];
    }
  }
}

template <class T, class G>
static void norm_gradients(const GroupNormBackwardArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Image& in = args.in;
  int64_t channels = in.channels, pixels = in.pixels(), last_image = -1;
  A* mean = static_cast<A*>(scratch(4 * channels * sizeof(A)));
  A *scale = mean + channels, *slope = scale + channels, *offset = slope + channels;
  for (int64_t i = begin; i < end; ++i) {
    NormTask task(args, i);
    int64_t image = task.image * channels * pixels;
    if (task.image != last_image) {
      last_image = task.image;
      for (int64_t c = 0; c < channels; ++c) {
        scale[c] = static_cast<A>(args.scale[task.image * channels + c]);
      }
      spread_groups(in, args.mean + task.image * in.groups, mean);
      spread_groups(in, args.slope + task.image * in.groups, slope);
      spread_groups(in, args.offset + task.image * in.groups, offset);
    }
    const T* x = as<T>(in.data) + image;
    const G* dy = as<G>(args.dy) + image;
    const T* residual = args.residual ? as<T>(args.residual) + image : nullptr;
    T* dx = static_cast<T*>(args.out) + image;
    auto write = [&](int64_t at, auto m, auto a, auto b, auto shift) {
      using V = decltype(m);
      V v = load_as<V>(dy + at) * a + ((load_as<V>(x + at) - m) * b + shift);
      store_as(dx + at, residual ? load_as<V>(residual + at) + v : v);
    };
    for (int64_t unit = task.first; unit < task.last; ++unit) {
      if (in.channels_last) {
        for_each_vector<A>(channels, [&](int64_t c, auto lanes) {
          using V = decltype(lanes);
          write(unit * channels + c, load_as<V>(mean + c), load_as<V>(scale + c),
                load_as<V>(slope + c), load_as<V>(offset + c));
        });
      } else {
        for_each_vector<A>(pixels, [&](int64_t p, auto lanes) {
          auto all = [&](A value) { return value - lanes; };
          write(unit * pixels + p, all(mean[unit]), all(scale[unit]), all(slope[unit]),
                all(offset[unit]));
        });
      }
    }
  }
}

// Calls f(x's type, dy's type).
template <class F>
PF_INLINE void with_gradient_type(const GroupNormBackwardArgs& args, F&& f) {
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<T, Acc<T>>) {
      f(type, type);
    } else if (args.accumulated) {
      f(type, static_cast<Acc<T>*>(nullptr));
    } else {
      f(type, type);
    }
  });
}

static void group_norm_backward_sums(const GroupNormBackwardArgs& args, int64_t begin,
                                     int64_t end) {
  with_gradient_type(args, [&](auto* x, auto* dy) {
    norm_sums<std::remove_pointer_t<decltype(x)>, std::remove_pointer_t<decltype(dy)>>(args, begin,
                                                                                       end);
  });
}

static void group_norm_backward(const GroupNormBackwardArgs& args, int64_t begin, int64_t end) {
  with_gradient_type(args, [&](auto* x, auto* dy) {
    norm_gradients<std::remove_pointer_t<decltype(x)>, std::remove_pointer_t<decltype(dy)>>(
        args, begin, end);
  });
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

// y = (x - mean) * (rstd * weight) + bias.
#pragma once

#include "statistics.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

// Per channel of one image: centre, scale and shift of the normalisation.
template <class T>
static void norm_coefficients(const Image& in, int64_t image, const double* mean,
                              const double* rstd, const void* weight, const void* bias,
                              Acc<T>* center, Acc<T>* scale, Acc<T>* shift) {
  using A = Acc<T>;
  load_all<T>(as<T>(weight), scale, in.channels, A(1));
  load_all<T>(as<T>(bias), shift, in.channels, A(0));
  int64_t per_group = in.group_channels();
  for (int64_t g = 0; g < in.groups; ++g) {
    A m = static_cast<A>(mean[image * in.groups + g]),
      r = static_cast<A>(rstd[image * in.groups + g]);
    for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
      center[c] = m;
      scale[c] *= r;
    }
  }
}

// A task is a run of `step` pixels (channels_last) or channels (NCHW) of an image.
static int64_t group_norm_step(const Image& in) {
  int64_t step = 8192 / (in.channels_last ? in.channels : in.pixels());
  return step < 1 ? 1 : step;
}

static void group_norm_plan(GroupNormArgs& args) {
  int64_t units = args.in.channels_last ? args.in.pixels() : args.in.channels;
  int64_t step = group_norm_step(args.in);
  args.tasks = (units + step - 1) / step;
}

template <class T>
static void group_norm_typed(const GroupNormArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>;
  const Image& in = args.in;
  const T* x = as<T>(in.data);
  T* out = static_cast<T*>(args.out);
  int64_t channels = in.channels, pixels = in.pixels(), step = group_norm_step(in), last = -1;
  A* center = static_cast<A*>(scratch(3 * channels * sizeof(A)));
  A *scale = center + channels, *shift = scale + channels;
  for (int64_t task = begin; task < end; ++task) {
    int64_t image = task / args.tasks, first = task % args.tasks * step;
    if (image != last) {
      norm_coefficients<T>(in, image, args.mean, args.rstd, args.weight, args.bias, center, scale,
                           shift);
      last = image;
    }
    int64_t units = in.channels_last ? pixels : channels;
    int64_t stop = units - first < step ? units : first + step;
    for (int64_t unit = first; unit < stop; ++unit) {
      int64_t i = 0;
      if (in.channels_last) {
        int64_t at = (image * pixels + unit) * channels;
        for (; i + w <= channels; i += w) {
          Vec<A> v = load(x + at + i) - load(center + i);
          store(out + at + i, v * load(scale + i) + load(shift + i));
        }
        for (; i < channels; ++i) {
          store1(out + at + i, (load1(x + at + i) - center[i]) * scale[i] + shift[i]);
        }
      } else {
        int64_t at = (image * channels + unit) * pixels;
        A m = center[unit], a = scale[unit], b = shift[unit];
        for (; i + w <= pixels; i += w) store(out + at + i, (load(x + at + i) - m) * a + b);
        for (; i < pixels; ++i) store1(out + at + i, (load1(x + at + i) - m) * a + b);
      }
    }
  }
}

static void group_norm(const GroupNormArgs& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto* type) {
    group_norm_typed<std::remove_pointer_t<decltype(type)>>(args, begin, end);
  });
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

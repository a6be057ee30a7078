// y = x + k rstd s (P x - x), s = layer_scale * norm_weight: in P(GN x) - GN x the mean and the
// bias of the normalisation cancel.
#pragma once

#include "statistics.inl"
#include "stencil_planes.inl"
#include "stencil_rows.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

static void pool_mixer_plan(PoolMixerArgs& args) {
  PoolCut cut(args.in, args.pool_size);
  args.slots = cut.blocks * cut.strips;
  args.tasks = args.in.channels_last ? args.slots : args.slots * args.in.groups;
}

// scale[c] = k rstd layer_scale norm_weight of one image.
template <class T>
static void mixer_coefficients(const PoolMixerArgs& args, int64_t image, Acc<T>* scale,
                               Acc<T>* spare) {
  using A = Acc<T>;
  const Image& in = args.in;
  load_all<T>(as<T>(args.norm_weight), scale, in.channels, A(1));
  load_all<T>(as<T>(args.layer_scale), spare, in.channels, A(1));
  int64_t per_group = in.group_channels();
  for (int64_t g = 0; g < in.groups; ++g) {
    double k = args.rstd[image * in.groups + g];
    if (args.drop_path) k *= args.drop_path[image];
    A factor = static_cast<A>(k);
    for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c)
      scale[c] = scale[c] * spare[c] * factor;
  }
}

template <class T>
static void mix_planes(const PoolMixerArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Image& in = args.in;
  PoolCut cut(in, args.pool_size);
  int64_t size = PlanePool<T, false>::size(cut, in);
  A* memory = static_cast<A*>(scratch((size + 2 * in.channels) * sizeof(A)));
  A *scale = memory + size, *spare = scale + in.channels;
  const T *x = as<T>(in.data), *x_end = x + in.batch * in.channels * in.pixels();
  T* y = static_cast<T*>(args.out);
  PlanePool<T, false> pool(cut, in, x_end, memory);
  int64_t last_image = -1;
  for (int64_t i = begin; i < end; ++i) {
    PoolTask task(cut, in, i);
    if (task.image != last_image) mixer_coefficients<T>(args, task.image, scale, spare);
    last_image = task.image;
    for (int64_t c = task.channel; c < task.stop; ++c) {
      int64_t plane = (task.image * in.channels + c) * in.pixels();
      T *to = y + plane, *to_end = to + task.last * in.width;
      A gain = scale[c];
      pool(x + plane, task.first, task.last, [&](int64_t at, Vec<A> u, Vec<A> center, int64_t n) {
        store_row(to + at, center + u * gain, n, to_end);
      });
    }
    if (args.partials) {
      int64_t at = (task.image * in.channels + task.channel) * in.pixels() + task.first * in.width;
      int64_t count = (task.stop - task.channel) * (task.last - task.first) * in.width;
      args.partials[(task.image * in.groups + task.group) * args.slots + task.slot] =
          region_statistics(y + at, 1, count, 0);
    }
  }
}

template <class T>
static void mix_rows(const PoolMixerArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Image& in = args.in;
  PoolCut cut(in, args.pool_size);
  int64_t size = RowPool<T, false>::size(cut, in);
  A* memory = static_cast<A*>(scratch((size + 2 * in.channels) * sizeof(A)));
  A *scale = memory + size, *spare = scale + in.channels;
  T* y = static_cast<T*>(args.out);
  RowPool<T, false> pool(cut, in, memory);
  int64_t last_image = -1, image_size = in.pixels() * in.channels;
  for (int64_t i = begin; i < end; ++i) {
    PoolTask task(cut, in, i);
    if (task.image != last_image) mixer_coefficients<T>(args, task.image, scale, spare);
    last_image = task.image;
    T* to = y + task.image * image_size;
    int64_t pixels = (task.last - task.first) * in.width, count = pixels * in.channels;
    RunningStatistics<T> statistics(static_cast<A>(args.mean[task.image * in.groups]));
    pool(as<T>(in.data) + task.image * image_size, task.first, task.last,
         [&](int64_t at, int64_t c, auto u, auto center) {
           using V = decltype(u);
           V v = center + u * load_as<V>(scale + c);
           store_as(to + at, v);
           if constexpr (kManyRegisters) {
             statistics.add(std::is_same_v<T, A> ? v : load_as<V>(to + at));  // as it is rounded
           }
         });
    if (!args.partials) continue;
    Partial* partials = args.partials + task.image * in.groups * args.slots + task.strip;
    if (in.groups == 1 && statistics.get(count, *partials)) continue;
    for (int64_t g = 0; g < in.groups; ++g) {
      partials[g * args.slots] =
          pixel_statistics(in, y, task.image, g, task.first * in.width, pixels);
    }
  }
}

static void pool_mixer(const PoolMixerArgs& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (args.in.channels_last) {
      mix_rows<T>(args, begin, end);
    } else {
      mix_planes<T>(args, begin, end);
    }
  });
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

// dx = g + k rstd s (P' g - g) - slope (x - mean), P' the transpose of P. Its slope and the
// parameters' gradients need Q = sum of g (P x - x), which is the sum of (P' g - g) (x - mean).
#pragma once

#include "stencil_planes.inl"
#include "stencil_rows.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

static void pool_mixer_backward_plan(PoolMixerBackwardArgs& args) {
  PoolCut cut(args.in, args.pool_size);
  args.strips = cut.strips;
  args.tasks = cut.blocks * cut.strips * (args.in.channels_last ? 1 : args.in.groups);
}

// Calls f(task, c, at, u, g, count) for the vectors of channel c of tasks [begin, end) in NCHW:
// g = dy and u = P' g - g, `count` lanes of them, at offset `at`. After a channel, done(task, c).
template <class T, class F, class Done>
PF_INLINE void for_each_plane(const PoolMixerBackwardArgs& args, int64_t begin, int64_t end, F&& f,
                              Done&& done) {
  const Image& in = args.in;
  PoolCut cut(in, args.pool_size);
  const T* dy = as<T>(args.dy);
  PlanePool<T, true> pool(
      cut, in, dy + in.batch * in.channels * in.pixels(),
      static_cast<Acc<T>*>(scratch(PlanePool<T, true>::size(cut, in) * sizeof(Acc<T>))));
  for (int64_t i = begin; i < end; ++i) {
    PoolTask task(cut, in, i);
    for (int64_t c = task.channel; c < task.stop; ++c) {
      int64_t plane = (task.image * in.channels + c) * in.pixels();
      pool(dy + plane, task.first, task.last,
           [&](int64_t at, Vec<Acc<T>> u, Vec<Acc<T>> g, int64_t count) {
             f(task, c, plane + at, u, g, count);
           });
      done(task, c);
    }
  }
}

template <class T>
static void sum_planes(const PoolMixerBackwardArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Image& in = args.in;
  const T *x = as<T>(in.data), *x_end = x + in.batch * in.channels * in.pixels();
  Vec<A> sum = {};
  for_each_plane<T>(
      args, begin, end,
      [&](const PoolTask& task, int64_t, int64_t at, Vec<A> u, Vec<A>, int64_t count) {
        A mean = static_cast<A>(args.mean[task.image * in.groups + task.group]);
        if (count == kLanes<A>) {
          sum += u * (load(x + at) - mean);
        } else {
          sum += u * first_lanes<A>(load_first(x + at, count, x_end) - mean, count);
        }
      },
      [&](const PoolTask& task, int64_t c) {
        args.sums[(task.image * args.strips + task.strip) * in.channels + c] = sum_lanes<A>(sum);
        sum = Vec<A>{};
      });
}

template <class T>
static void write_planes(const PoolMixerBackwardArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Image& in = args.in;
  const T *x = as<T>(in.data), *x_end = x + in.batch * in.channels * in.pixels();
  T* dx = static_cast<T*>(args.out);
  for_each_plane<T>(
      args, begin, end,
      [&](const PoolTask& task, int64_t c, int64_t at, Vec<A> u, Vec<A> g, int64_t count) {
        int64_t group = task.image * in.groups + task.group;
        A mean = static_cast<A>(args.mean[group]), slope = static_cast<A>(args.slope[group]);
        A gain = static_cast<A>(args.gain[task.image * in.channels + c]);
        Vec<A> v = count == kLanes<A> ? load(x + at) : load_first(x + at, count, x_end);
        int64_t stop = (task.image * in.channels + c) * in.pixels() + task.last * in.width;
        store_row(dx + at, g + (u * gain - (v - mean) * slope), count, dx + stop);
      },
      [](const PoolTask&, int64_t) {});
}

// Calls start(task, memory) and then f(task, at, c, u, g) for the vectors and values of tasks
// [begin, end) in channels_last, and done(task, memory); memory: 3 values a channel.
template <class T, class Start, class F, class Done>
PF_INLINE void for_each_row(const PoolMixerBackwardArgs& args, int64_t begin, int64_t end,
                            Start&& start, F&& f, Done&& done) {
  const Image& in = args.in;
  PoolCut cut(in, args.pool_size);
  int64_t size = RowPool<T, true>::size(cut, in), image_size = in.channels * in.pixels();
  auto* memory = static_cast<Acc<T>*>(scratch((size + 3 * in.channels) * sizeof(Acc<T>)));
  RowPool<T, true> pool(cut, in, memory);
  for (int64_t i = begin; i < end; ++i) {
    PoolTask task(cut, in, i);
    int64_t image = task.image * image_size;
    start(task, memory + size);
    pool(as<T>(args.dy) + image, task.first, task.last,
         [&](int64_t at, int64_t c, auto u, auto g) { f(image + at, c, u, g, memory + size); });
    done(task, memory + size);
  }
}

template <class T>
static void sum_rows_of_images(const PoolMixerBackwardArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Image& in = args.in;
  int64_t channels = in.channels;
  const T* x = as<T>(in.data);
  for_each_row<T>(
      args, begin, end,
      [&](const PoolTask& task, A* sums) {
        for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
        spread_groups(in, args.mean + task.image * in.groups, sums + channels);
      },
      [&](int64_t at, int64_t c, auto u, auto, A* sums) {
        using V = decltype(u);
        V d = load_as<V>(x + at) - load_as<V>(sums + channels + c);
        store_as(sums + c, load_as<V>(sums + c) + u * d);
      },
      [&](const PoolTask& task, const A* sums) {
        double* to = args.sums + (task.image * args.strips + task.strip) * channels;
        for (int64_t c = 0; c < channels; ++c) to[c] = sums[c];
      });
}

template <class T>
static void write_rows(const PoolMixerBackwardArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Image& in = args.in;
  int64_t channels = in.channels, last_image = -1;
  const T* x = as<T>(in.data);
  T* dx = static_cast<T*>(args.out);
  for_each_row<T>(
      args, begin, end,
      [&](const PoolTask& task, A* gain) {
        if (task.image == last_image) return;
        last_image = task.image;
        for (int64_t c = 0; c < channels; ++c) {
          gain[c] = static_cast<A>(args.gain[task.image * channels + c]);
        }
        spread_groups(in, args.mean + task.image * in.groups, gain + channels);
        spread_groups(in, args.slope + task.image * in.groups, gain + 2 * channels);
      },
      [&](int64_t at, int64_t c, auto u, auto g, const A* gain) {
        using V = decltype(u);
        const A *mean = gain + channels, *slope = mean + channels;
        V d = (load_as<V>(x + at) - load_as<V>(mean + c)) * load_as<V>(slope + c);
        store_as(dx + at, g + (u * load_as<V>(gain + c) - d));
      },
      [](const PoolTask&, const A*) {});
}

static void pool_mixer_backward_sums(const PoolMixerBackwardArgs& args, int64_t begin,
                                     int64_t end) {
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (args.in.channels_last) {
      sum_rows_of_images<T>(args, begin, end);
    } else {
      sum_planes<T>(args, begin, end);
    }
  });
}

static void pool_mixer_backward(const PoolMixerBackwardArgs& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (args.in.channels_last) {
      write_rows<T>(args, begin, end);
    } else {
      write_planes<T>(args, begin, end);
    }
  });
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

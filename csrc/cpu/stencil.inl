// The pooling P, an average over the part of a window that is in the image, and its transpose,
// which divides by the window counts first. Sums are vertical first, then horizontal. P x - x is
// taken as (n P x - n x) / n: a rounded 1/n times P x would move all of an image to one side.
#pragma once

#include "vec.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

constexpr int64_t kStrip = 2048;                         // values of a task, about
constexpr int64_t kRowsAtOnce = kManyRegisters ? 2 : 1;  // in channels_last

// How an image is cut. NCHW: `planes` channels of one group, or `rows` rows of one channel.
// channels_last: `rows` rows.
struct PoolCut {
  int64_t planes, rows, strips;
  int64_t blocks;  // of planes, per group
  int64_t pad_h, pad_w;

  PoolCut(const Image& in, int64_t pool_size) {
    int64_t plane = in.channels_last ? in.width * in.channels * in.height : in.pixels();
    strips = smaller(in.height, larger(1, plane / kStrip));
    rows = (in.height + strips - 1) / strips;
    if (in.channels_last) rows = larger(rows, smaller(kRowsAtOnce, in.height));
    strips = (in.height + rows - 1) / rows;
    planes =
        in.channels_last ? in.channels : smaller(in.group_channels(), larger(1, kStrip / plane));
    blocks = in.channels_last ? 1 : (in.group_channels() + planes - 1) / planes;
    pad_h = smaller(pool_size / 2, in.height - 1);
    pad_w = smaller(pool_size / 2, in.width - 1);
  }
};

// The rows and channels of a task of an image.
struct PoolTask {
  int64_t image, strip, slot, group;
  int64_t first, last;    // rows
  int64_t channel, stop;  // channels

  PoolTask(const PoolCut& cut, const Image& in, int64_t task) {
    int64_t slots = cut.blocks * cut.strips, tasks = in.channels_last ? slots : slots * in.groups;
    image = task / tasks, slot = task % slots;
    strip = slot % cut.strips;
    first = strip * cut.rows, last = smaller(first + cut.rows, in.height);
    group = in.channels_last ? 0 : task / slots % in.groups;
    int64_t start = slot / cut.strips * cut.planes, size = in.group_channels();
    channel = in.channels_last ? 0 : group * size + start;
    stop = in.channels_last ? in.channels : channel + smaller(cut.planes, size - start);
  }
};

// Positions of [i - pad, i + pad] inside [0, n); the most that there are at any i.
PF_INLINE int64_t positions(int64_t i, int64_t pad, int64_t n) {
  return smaller(i + pad, n - 1) - larger(i - pad, 0) + 1;
}

PF_INLINE int64_t most_positions(int64_t pad, int64_t n) { return smaller(2 * pad + 1, n); }

// What a row or a column counts for: P divides by positions, its transpose weighs by the most that
// there are over them (without rounding, if the pool is three wide); 0 outside.
template <class A, bool kTransposed>
PF_INLINE A weight_at(int64_t i, int64_t pad, int64_t n) {
  if (i < 0 || i >= n) return 0;
  A count = static_cast<A>(positions(i, pad, n));
  return kTransposed ? static_cast<A>(most_positions(pad, n)) / count : count;
}

// The sum of `count` rows, `stride` apart, times `weights` if kWeighted.
template <bool kWeighted, class V, class T>
PF_INLINE V sum_rows(const T* p, int64_t stride, int64_t count, const Acc<T>* weights) {
  auto row = [&](int64_t j) {
    V v = load_as<V>(p + j * stride);
    if constexpr (kWeighted) v *= weights[j];
    return v;
  };
  V v = row(0);
  if (count == 3) return v + row(1) + row(2);
  for (int64_t j = 1; j < count; ++j) v += row(j);
  return v;
}

// The sum of 2 pad + 1 columns, `stride` apart.
template <class V, class A>
PF_INLINE V sum_columns(const A* p, int64_t stride, int64_t pad) {
  V v = load_as<V>(p);
  if (pad == 1) return v + load_as<V>(p + stride) + load_as<V>(p + 2 * stride);
  for (int64_t j = 1; j <= 2 * pad; ++j) v += load_as<V>(p + j * stride);
  return v;
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

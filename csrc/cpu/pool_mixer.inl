// y = x + k rstd s (P x - x), s = layer_scale * norm_weight: in P(GN x) - GN x the mean and the
// bias of the normalisation cancel. Sums are vertical first, then horizontal.
#pragma once

#include "statistics.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

constexpr int64_t kStrip = 2048;  // values of a task, about

static int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// How an image is cut. NCHW: `planes` channels of one group, or `rows` rows of one channel.
// channels_last: `rows` rows.
struct MixerCut {
  int64_t planes, rows, strips;
  int64_t blocks;  // of planes, per group
  int64_t pad_h, pad_w;

  MixerCut(const Image& in, int64_t pool_size) {
    int64_t plane = in.channels_last ? in.width * in.channels * in.height : in.pixels();
    strips = smaller(in.height, larger(1, plane / kStrip));
    rows = (in.height + strips - 1) / strips;
    strips = (in.height + rows - 1) / rows;
    planes =
        in.channels_last ? in.channels : smaller(in.group_channels(), larger(1, kStrip / plane));
    blocks = in.channels_last ? 1 : (in.group_channels() + planes - 1) / planes;
    pad_h = smaller(pool_size / 2, in.height - 1);
    pad_w = smaller(pool_size / 2, in.width - 1);
  }
};

static void pool_mixer_plan(PoolMixerArgs& args) {
  MixerCut cut(args.in, args.pool_size);
  args.slots = cut.blocks * cut.strips;
  args.tasks = args.in.channels_last ? args.slots : args.slots * args.in.groups;
}

// 1 / (number of positions of [i - pad, i + pad] inside [0, n)).
template <class A>
PF_INLINE A inverse_count(int64_t i, int64_t pad, int64_t n) {
  return A(1) / static_cast<A>(smaller(i + pad, n - 1) - larger(i - pad, 0) + 1);
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

// sums[i] = sum over j < count of rows[j * stride + i], for i < n rounded up to a vector.
template <class A>
static void add_rows(const A* rows, int64_t stride, int64_t count, A* sums, int64_t n) {
  constexpr int w = kLanes<A>;
  for (int64_t i = 0; i < n; i += w) {
    const A* p = rows + i;
    Vec<A> v = load(p);
    if (count == 3) {
      v = v + load(p + stride) + load(p + 2 * stride);
    } else {
      for (int64_t j = 1; j < count; ++j) v += load(p + j * stride);
    }
    store(sums + i, v);
  }
}

// Rows [first, last) of one plane. `plane`: rows first - pad_h .. last + pad_h of x, zero outside.
// `sums`: as many rows, pad_w zeros left and right.
template <class T>
static void mix_plane(const T* x, T* y, const MixerCut& cut, const Image& in, int64_t first,
                      int64_t last, Acc<T> scale, Acc<T>* plane, Acc<T>* sums,
                      const Acc<T>* inverse, const T* x_end) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>;
  int64_t width = in.width, wide = round_up(width, w), sums_stride = wide + 2 * cut.pad_w;
  int64_t tail = width % w;
  Vec<A> keep;
  for (int i = 0; i < w; ++i) keep[i] = i < tail ? A(1) : A(0);
  for (int64_t h = first - cut.pad_h; h < last + cut.pad_h; ++h) {
    const T* from = x + h * width;
    A* to = plane + (h - first + cut.pad_h) * wide;
    int64_t i = 0;
    if (h < 0 || h >= in.height) {
      for (; i < wide; i += w) store(to + i, Vec<A>{});
      continue;
    }
    for (; i + w <= width; i += w) store(to + i, load(from + i));
    if (tail && from + i + w <= x_end) {
      Vec<A> v = load(from + i);
      store(to + i, keep > A(0) ? v : Vec<A>{});
    } else if (tail) {
      for (int64_t j = 0; j < w; ++j) to[i + j] = j < tail ? load1(from + i + j) : A(0);
    }
  }
  for (int64_t h = first; h < last; ++h) {
    add_rows(plane + (h - first) * wide, wide, 2 * cut.pad_h + 1,
             sums + (h - first) * sums_stride + cut.pad_w, width);
  }
  const T* y_end = y + last * width;
  for (int64_t h = first; h < last; ++h) {
    const A *row = sums + (h - first) * sums_stride,
            *center = plane + (h - first + cut.pad_h) * wide;
    A inverse_h = inverse_count<A>(h, cut.pad_h, in.height);
    T* to = y + h * width;
    for (int64_t i = 0; i < width; i += w) {
      Vec<A> v = load(row + i);
      if (cut.pad_w == 1) {
        v = v + load(row + i + 1) + load(row + i + 2);
      } else {
        for (int64_t j = 1; j <= 2 * cut.pad_w; ++j) v += load(row + i + j);
      }
      Vec<A> c = load(center + i);
      v = c + (v * (load(inverse + i) * inverse_h) - c) * scale;
      if (to + i + w <= y_end) {
        store(to + i, v);  // past the end of a row: the next row is written later
      } else {
        for (int64_t j = 0; i + j < width; ++j) store1(to + i + j, v[j]);
      }
    }
  }
}

template <class T>
static void mix_planes(const PoolMixerArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>;
  const Image& in = args.in;
  MixerCut cut(in, args.pool_size);
  int64_t wide = round_up(in.width, w), plane_rows = cut.rows + 2 * cut.pad_h;
  int64_t plane_size = plane_rows * wide, sums_size = cut.rows * (wide + 2 * cut.pad_w);
  A* plane = static_cast<A*>(
      scratch((plane_size + sums_size + wide + 2 * in.channels + 2 * w) * sizeof(A)));
  A *sums = plane + plane_size, *inverse = sums + sums_size;
  A *scale = inverse + wide, *spare = scale + in.channels;
  for (int64_t i = 0; i < wide; ++i) {
    inverse[i] = i < in.width ? inverse_count<A>(i, cut.pad_w, in.width) : A(0);
  }
  for (int64_t i = 0; i < sums_size; ++i) sums[i] = 0;
  const T *x = as<T>(in.data), *x_end = x + in.batch * in.channels * in.pixels();
  T* y = static_cast<T*>(args.out);
  int64_t last_image = -1;
  for (int64_t task = begin; task < end; ++task) {
    int64_t image = task / args.tasks, slot = task % args.slots;
    int64_t group = task / args.slots % in.groups;
    int64_t strip = slot % cut.strips, block = slot / cut.strips;
    int64_t first = strip * cut.rows, last = smaller(first + cut.rows, in.height);
    if (image != last_image) mixer_coefficients<T>(args, image, scale, spare);
    last_image = image;
    int64_t start = block * cut.planes, stop = smaller(start + cut.planes, in.group_channels());
    int64_t channel = group * in.group_channels() + start;
    for (int64_t c = channel; c < channel + stop - start; ++c) {
      int64_t at = (image * in.channels + c) * in.pixels();
      mix_plane(x + at, y + at, cut, in, first, last, scale[c], plane, sums, inverse, x_end);
    }
    if (args.partials) {
      int64_t at = (image * in.channels + channel) * in.pixels() + first * in.width;
      int64_t count = (stop - start) * (last - first) * in.width;
      args.partials[(image * in.groups + group) * args.slots + slot] =
          region_statistics(y + at, 1, count, 0);
    }
  }
}

// Channels [start, stop) of row h. `sums`: (width + 2 pad_w, channels), its borders zero.
template <class T>
static void mix_row(const T* x, T* y, const MixerCut& cut, const Image& in, int64_t h,
                    int64_t start, int64_t stop, const Acc<T>* scale, Acc<T>* sums) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>;
  int64_t stride = in.width * in.channels, wide = stop - start, vectors = wide / w * w;
  int64_t top = larger(h - cut.pad_h, 0), rows = smaller(h + cut.pad_h, in.height - 1) - top + 1;
  for (int64_t i = 0; i < in.width; ++i) {
    const T* p = x + top * stride + i * in.channels + start;
    A* to = sums + (i + cut.pad_w) * wide;
    int64_t c = 0;
    if (rows == 3) {
      for (; c < vectors; c += w) {
        store(to + c, load(p + c) + load(p + stride + c) + load(p + 2 * stride + c));
      }
    }
    for (; c < vectors; c += w) {
      Vec<A> v = load(p + c);
      for (int64_t j = 1; j < rows; ++j) v += load(p + j * stride + c);
      store(to + c, v);
    }
    for (; c < wide; ++c) {
      A v = load1(p + c);
      for (int64_t j = 1; j < rows; ++j) v += load1(p + j * stride + c);
      to[c] = v;
    }
  }
  A inverse_h = inverse_count<A>(h, cut.pad_h, in.height);
  for (int64_t i = 0; i < in.width; ++i) {
    const A *p = sums + i * wide, *s = scale + start;
    A inverse = inverse_h * inverse_count<A>(i, cut.pad_w, in.width);
    const T* from = x + h * stride + i * in.channels + start;
    T* to = y + h * stride + i * in.channels + start;
    int64_t c = 0;
    for (; c < vectors; c += w) {
      Vec<A> v = load(p + c), center = load(from + c);
      if (cut.pad_w == 1) {
        v = v + load(p + wide + c) + load(p + 2 * wide + c);
      } else {
        for (int64_t j = 1; j <= 2 * cut.pad_w; ++j) v += load(p + j * wide + c);
      }
      store(to + c, center + (v * inverse - center) * load(s + c));
    }
    for (; c < wide; ++c) {
      A v = p[c], center = load1(from + c);
      for (int64_t j = 1; j <= 2 * cut.pad_w; ++j) v += p[j * wide + c];
      store1(to + c, center + (v * inverse - center) * s[c]);
    }
  }
}

template <class T>
static void mix_rows(const PoolMixerArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Image& in = args.in;
  MixerCut cut(in, args.pool_size);
  int64_t padded = in.width + 2 * cut.pad_w;
  int64_t block = smaller(in.channels, larger(64, 16384 / padded / 64 * 64));
  A* sums = static_cast<A*>(scratch((padded * block + 2 * in.channels) * sizeof(A)));
  A *scale = sums + padded * block, *spare = scale + in.channels;
  const T* x = as<T>(in.data);
  T* y = static_cast<T*>(args.out);
  int64_t last_image = -1, size = in.pixels() * in.channels;
  for (int64_t task = begin; task < end; ++task) {
    int64_t image = task / args.tasks, strip = task % args.tasks;
    int64_t first = strip * cut.rows, last = smaller(first + cut.rows, in.height);
    if (image != last_image) mixer_coefficients<T>(args, image, scale, spare);
    last_image = image;
    for (int64_t start = 0; start < in.channels; start += block) {
      int64_t stop = smaller(start + block, in.channels), border = cut.pad_w * (stop - start);
      for (int64_t i = 0; i < border; ++i) {
        sums[i] = 0;
        sums[in.width * (stop - start) + border + i] = 0;
      }
      for (int64_t h = first; h < last; ++h) {
        mix_row(x + image * size, y + image * size, cut, in, h, start, stop, scale, sums);
      }
    }
    for (int64_t g = 0; args.partials && g < in.groups; ++g) {
      args.partials[(image * in.groups + g) * args.slots + strip] =
          pixel_statistics(in, y, image, g, first * in.width, (last - first) * in.width);
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

// Which elements a block and a thread have. Plain C++: the host plans with it and tests it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define POOLFORMER_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define POOLFORMER_HOST_DEVICE inline
#endif

namespace poolformer::cuda {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16 };

constexpr int kWarp = 32;
constexpr int kThreads =
    224;  // of a block, at most: 7 warps, as PoolFormer's sizes are 7, 14, 28, 56
constexpr int kVectorBytes = 16;
constexpr int kRows = 4;            // so few that two rows of halo and a batch of 1 balance
constexpr int kMostPartials = 256;  // of a group: each block of the op that takes them merges all
constexpr int kReducingBlocks = 1024;  // enough to fill a GPU; more would write more partial sums
constexpr int kUnroll = 4;             // vectors that a thread has in flight
constexpr int64_t kIndexLimit = int64_t{1} << 30;  // elements of an image: 32-bit offsets inside it

POOLFORMER_HOST_DEVICE int ceil_div(int a, int b) { return (a - 1) / b + 1; }
POOLFORMER_HOST_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
POOLFORMER_HOST_DEVICE int larger(int a, int b) { return a > b ? a : b; }
POOLFORMER_HOST_DEVICE int whole_warps(int threads) { return ceil_div(threads, kWarp) * kWarp; }

// A dense (batch, channels, height, width) tensor.
struct Image {
  Dtype dtype;
  bool channels_last;
  int64_t batch;
  int channels, height, width, groups;

  POOLFORMER_HOST_DEVICE int group_channels() const { return channels / groups; }
  POOLFORMER_HOST_DEVICE int pixels() const { return height * width; }
  POOLFORMER_HOST_DEVICE int group_size() const { return group_channels() * pixels(); }
  POOLFORMER_HOST_DEVICE int column_stride() const { return channels_last ? channels : 1; }
  POOLFORMER_HOST_DEVICE int row_stride() const { return width * column_stride(); }
  POOLFORMER_HOST_DEVICE int channel_stride() const { return channels_last ? 1 : pixels(); }
  POOLFORMER_HOST_DEVICE int full_vector() const {
    return kVectorBytes / (dtype == Dtype::kFloat32 ? 4 : 2);
  }
  // Channels that a thread has: a vector where they lie side by side and divide the group.
  POOLFORMER_HOST_DEVICE int vector() const {
    return channels_last && group_channels() % full_vector() == 0 ? full_vector() : 1;
  }
  // Offset of the first element of an image's group.
  POOLFORMER_HOST_DEVICE int64_t offset(int64_t image, int group) const {
    return image * channels * pixels() + group * group_channels() * channel_stride();
  }
};

// Blocks that write a tensor row by row. A lane is one column and a vector of channels; a thread
// goes down `rows` rows of its lane. Neighbouring threads have neighbouring memory.
struct Tiling {
  int vector, lanes, threads, lane_blocks, rows, row_blocks;

  POOLFORMER_HOST_DEVICE int blocks() const { return lane_blocks * row_blocks; }  // of a group
};

inline Tiling choose_tiling(const Image& image) {
  Tiling t{};
  t.vector = image.vector();
  t.lanes = image.width * (image.group_channels() / t.vector);
  t.lane_blocks = ceil_div(t.lanes, kThreads);
  t.threads = whole_warps(ceil_div(t.lanes, t.lane_blocks));
  t.rows = smaller(kRows, image.height);
  const int64_t blocks = int64_t{ceil_div(image.height, t.rows)} * t.lane_blocks;
  const int64_t taller = t.rows * ((blocks + kMostPartials - 1) / kMostPartials);
  t.rows = taller < image.height ? static_cast<int>(taller) : image.height;
  t.row_blocks = ceil_div(image.height, t.rows);
  return t;
}

struct Place {
  int64_t image_group;
  int64_t image;
  int tile;             // of the group
  int row, end;         // rows [row, end)
  int column, channel;  // channel: of the image, the first of the vector
  int64_t offset;       // of the lane in row 0
  bool inside;          // else a copy of the last lane: it may read, and must not write
};

POOLFORMER_HOST_DEVICE Place place_of(const Image& image, const Tiling& t, int block, int thread) {
  Place p{};
  const int image_group = block / t.blocks(), group = image_group % image.groups;
  p.image_group = image_group;
  p.image = image_group / image.groups;
  p.tile = block % t.blocks();
  p.row = p.tile / t.lane_blocks * t.rows;
  p.end = smaller(p.row + t.rows, image.height);
  int lane = p.tile % t.lane_blocks * t.threads + thread;
  p.inside = lane < t.lanes;
  lane = smaller(lane, t.lanes - 1);
  const int vectors = image.group_channels() / t.vector;
  p.column = image.channels_last ? lane / vectors : lane % image.width;
  const int channel = (image.channels_last ? lane % vectors : lane / image.width) * t.vector;
  p.channel = group * image.group_channels() + channel;
  p.offset = image.offset(p.image, group) + p.column * image.column_stride() +
             channel * image.channel_stride();
  return p;
}

// Blocks that sum over positions, channel by channel: `columns` × `channels` vectors of threads,
// which lie side by side in memory; `parts` × `channel_blocks` blocks of a group.
struct Reduction {
  int vector, channels, columns, threads, channel_blocks;
  int steps;  // of a part: rows, or pixels of each thread
  int parts;

  POOLFORMER_HOST_DEVICE int blocks() const { return parts * channel_blocks; }
};

// across: positions that lie side by side.
inline Reduction lay_out_reduction(const Image& image, int across) {
  Reduction r{};
  r.vector = image.vector();
  const int vectors = image.group_channels() / r.vector;
  const int wide = image.channels_last ? vectors : across;
  const int tall = image.channels_last ? across : vectors;
  const int first = ceil_div(wide, ceil_div(wide, kThreads / 2));
  const int second = ceil_div(tall, ceil_div(tall, kThreads / first));
  r.channels = image.channels_last ? first : second;
  r.columns = image.channels_last ? second : first;
  r.threads = whole_warps(r.channels * r.columns);
  r.channel_blocks = ceil_div(vectors, r.channels);
  return r;
}

// Splits `walked` steps into parts: of at least `least`, and as few as still fill a GPU.
inline void split_reduction(const Image& image, int walked, int least, Reduction& r) {
  const int64_t blocks = image.batch * image.groups * r.channel_blocks * ceil_div(walked, least);
  const int64_t steps = least * (1 + blocks / kReducingBlocks);
  r.steps = steps < walked ? static_cast<int>(steps) : walked;
  r.parts = ceil_div(walked, r.steps);
}

// Of rows: each thread walks down the rows of its columns.
inline Reduction choose_row_reduction(const Image& image) {
  Reduction r = lay_out_reduction(image, image.width);
  split_reduction(image, image.height, 2 * kRows, r);
  return r;
}

// Of pixels: each thread walks over them, `columns` apart. A part has at least 96 of them, so that
// its row of partial sums costs little.
inline Reduction choose_pixel_reduction(const Image& image) {
  Reduction r = lay_out_reduction(image, image.pixels());
  split_reduction(image, ceil_div(image.pixels(), r.columns), ceil_div(96, r.columns), r);
  return r;
}

struct ReductionPlace {
  int64_t image_group, image;
  int tile, part;
  int column, lane;         // of the block's threads
  int first_channel, last;  // of the block's channels in the image: [first_channel, last)
  int64_t offset;           // of the thread's channels in row 0, column 0
  bool inside;
};

POOLFORMER_HOST_DEVICE ReductionPlace place_of(const Image& image, const Reduction& r, int block,
                                               int thread) {
  ReductionPlace p{};
  const int image_group = block / r.blocks(), group = image_group % image.groups;
  p.image_group = image_group;
  p.image = image_group / image.groups;
  p.tile = block % r.blocks();
  p.part = p.tile / r.channel_blocks;
  const int first = p.tile % r.channel_blocks * r.channels * r.vector;
  p.first_channel = group * image.group_channels() + first;
  p.last = smaller(p.first_channel + r.channels * r.vector, (group + 1) * image.group_channels());
  p.column = image.channels_last ? thread / r.channels : thread % r.columns;
  p.lane = image.channels_last ? thread % r.channels : thread / r.columns;
  p.offset = image.offset(p.image, group) + (first + p.lane * r.vector) * image.channel_stride();
  p.inside =
      p.column < r.columns && p.lane < r.channels && p.first_channel + p.lane * r.vector < p.last;
  return p;
}

// Where vector `index` of a group lies in it: groups of channels_last have gaps.
POOLFORMER_HOST_DEVICE int offset_in_group(const Image& image, int vector, int index) {
  if (!image.channels_last || image.groups == 1) return index * vector;
  const int vectors = image.group_channels() / vector;
  return index / vectors * image.channels + index % vectors * vector;
}

// The first of its channels, in the group. vector: image.vector().
POOLFORMER_HOST_DEVICE int channel_in_group(const Image& image, int vector, int index) {
  if (!image.channels_last) return index / image.pixels();
  return index % (image.group_channels() / vector) * vector;
}

// Blocks that write a tensor vector by vector, in the order of memory: a thread has kUnroll
// vectors, kThreads apart.
struct Span {
  int64_t image_group;
  int64_t offset;  // of the group
  int block;       // of the group
  int first_channel;
  int first, vectors;  // the thread's first vector; vectors of the group
};

POOLFORMER_HOST_DEVICE int span_blocks(const Image& image, int vector) {
  return ceil_div(image.group_size() / vector, kThreads * kUnroll);
}

POOLFORMER_HOST_DEVICE Span span_of(const Image& image, int vector, int block, int thread) {
  Span s{};
  const int blocks = span_blocks(image, vector);
  const int image_group = block / blocks, group = image_group % image.groups;
  s.image_group = image_group;
  s.offset = image.offset(image_group / image.groups, group);
  s.block = block % blocks;
  s.first_channel = group * image.group_channels();
  s.first = s.block * kUnroll * kThreads + thread;
  s.vectors = image.group_size() / vector;
  return s;
}

}  // namespace poolformer::cuda

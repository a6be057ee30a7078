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
constexpr int kRows = 4;  // of a thread with a vector: two rows of halo and a batch of 1 balance
constexpr int kScalarRows = 16;     // of a thread with one channel, of which there are more
constexpr int kMostPartials = 256;  // of a group: each block of the op that takes them merges all
constexpr int kReducingBlocks = 1024;  // enough to fill a GPU; more would write more partial sums
constexpr int kUnroll = 4;             // vectors that a thread has in flight
constexpr int kMostParts = 65535;      // what a grid may have in y and z
constexpr int kStagedRow = 4 * kThreads;           // the widest row of a tile in shared memory
constexpr int64_t kIndexLimit = int64_t{1} << 30;  // elements of an image: 32-bit offsets inside it

POOLFORMER_HOST_DEVICE int ceil_div(int a, int b) { return (a - 1) / b + 1; }
POOLFORMER_HOST_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
POOLFORMER_HOST_DEVICE int whole_warps(int threads) { return ceil_div(threads, kWarp) * kWarp; }

// A dense (batch, channels, height, width) tensor.
struct Image {
  Dtype dtype;
  bool channels_last;
  int64_t batch;
  int channels, height, width, groups;
  int group_channels;  // channels / groups
  int vector;          // channels of a thread: side by side, 16 bytes, and dividing the group; or 1

  Image(Dtype dtype, bool channels_last, int64_t batch, int channels, int height, int width,
        int groups)
      : dtype(dtype),
        channels_last(channels_last),
        batch(batch),
        channels(channels),
        height(height),
        width(width),
        groups(groups),
        group_channels(channels / groups),
        vector(channels_last && group_channels % full_vector() == 0 ? full_vector() : 1) {}

  int full_vector() const { return kVectorBytes / (dtype == Dtype::kFloat32 ? 4 : 2); }
  int64_t image_groups() const { return batch * groups; }

  POOLFORMER_HOST_DEVICE int pixels() const { return height * width; }
  POOLFORMER_HOST_DEVICE int group_size() const { return group_channels * pixels(); }
  POOLFORMER_HOST_DEVICE int column_stride() const { return channels_last ? channels : 1; }
  POOLFORMER_HOST_DEVICE int row_stride() const { return width * column_stride(); }
  POOLFORMER_HOST_DEVICE int channel_stride() const { return channels_last ? 1 : pixels(); }
  // Whether tiles go by way of shared memory: see Planes.
  POOLFORMER_HOST_DEVICE bool in_planes() const { return !channels_last && width <= kStagedRow; }
  // Threads that lie side by side in memory, in a group of `across` columns.
  POOLFORMER_HOST_DEVICE int side_by_side(int across) const {
    return channels_last ? group_channels / vector : across;
  }
};

// A group of an image, found from its number in the batch.
struct Group {
  int64_t number, image;
  int first_channel;
  int64_t offset;  // of its first element

  POOLFORMER_HOST_DEVICE Group(const Image& im, int64_t number) : number(number) {
    image = im.groups == 1 ? number : number / im.groups;
    const int group = static_cast<int>(number - image * im.groups);
    first_channel = group * im.group_channels;
    offset = image * im.channels * im.pixels() + int64_t{first_channel} * im.channel_stride();
  }
};

// Blocks that write a tensor row by row. A lane is one column and a vector of channels; a thread
// goes down `rows` rows of its lane. Neighbouring threads have neighbouring memory.
struct Tiling {
  int lanes, threads, lane_blocks, rows, row_blocks;
  int inner;  // lanes side by side: vectors of a pixel, or columns of a row

  POOLFORMER_HOST_DEVICE int blocks() const { return lane_blocks * row_blocks; }  // of a group
};

inline Tiling choose_tiling(const Image& im) {
  Tiling t{};
  t.inner = im.side_by_side(im.width);
  t.lanes = im.width * (im.group_channels / im.vector);
  t.lane_blocks = ceil_div(t.lanes, kThreads);
  t.threads = whole_warps(ceil_div(t.lanes, t.lane_blocks));
  t.rows = smaller(im.vector > 1 ? kRows : kScalarRows, im.height);
  const int64_t blocks = int64_t{ceil_div(im.height, t.rows)} * t.lane_blocks;
  const int64_t taller = t.rows * ((blocks + kMostPartials - 1) / kMostPartials);
  t.rows = taller < im.height ? static_cast<int>(taller) : im.height;
  t.row_blocks = ceil_div(im.height, t.rows);
  return t;
}

struct Place {
  int row, end;         // rows [row, end)
  int column, channel;  // channel: of the group, the first of the vector
  int offset;           // in the group, of the lane's pixel in row 0
  bool inside;          // else a copy of the last lane: it may read, and must not write
};

POOLFORMER_HOST_DEVICE Place place_of(const Image& im, const Tiling& t, int lane_block,
                                      int row_block, int thread) {
  Place p{};
  p.row = row_block * t.rows;
  p.end = smaller(p.row + t.rows, im.height);
  int lane = lane_block * t.threads + thread;
  p.inside = lane < t.lanes;
  lane = smaller(lane, t.lanes - 1);
  const int outer = lane / t.inner, inner = lane - outer * t.inner;
  p.column = im.channels_last ? outer : inner;
  p.channel = (im.channels_last ? inner : outer) * im.vector;
  p.offset = p.column * im.column_stride() + p.channel * im.channel_stride();
  return p;
}

// Blocks that sum over positions, channel by channel: `columns` × `channels` vectors of threads,
// which lie side by side in memory; `parts` × `channel_blocks` blocks of a group.
struct Reduction {
  int channels, columns, threads, channel_blocks;
  int steps;  // of a part: rows, or pixels of each thread
  int parts;

  POOLFORMER_HOST_DEVICE int blocks() const { return parts * channel_blocks; }
};

// across: positions that lie side by side.
inline Reduction lay_out_reduction(const Image& im, int across) {
  Reduction r{};
  const int vectors = im.group_channels / im.vector;
  const int inner = im.side_by_side(across), outer = im.channels_last ? across : vectors;
  const int first = ceil_div(inner, ceil_div(inner, kThreads / 2));
  const int second = ceil_div(outer, ceil_div(outer, kThreads / first));
  r.channels = im.channels_last ? first : second;
  r.columns = im.channels_last ? second : first;
  r.threads = whole_warps(r.channels * r.columns);
  r.channel_blocks = ceil_div(vectors, r.channels);
  return r;
}

// Splits `walked` steps into parts: of at least `least`, and as few as still fill a GPU.
inline void split_reduction(const Image& im, int walked, int least, Reduction& r) {
  const int64_t blocks = im.image_groups() * r.channel_blocks * ceil_div(walked, least);
  const int64_t fewest = ceil_div(walked, kMostParts);
  int64_t steps = least * (1 + blocks / kReducingBlocks);
  steps = steps < fewest ? fewest : steps;
  r.steps = steps < walked ? static_cast<int>(steps) : walked;
  r.parts = ceil_div(walked, r.steps);
}

// Of rows: each thread walks down the rows of its columns.
inline Reduction choose_row_reduction(const Image& im) {
  Reduction r = lay_out_reduction(im, im.width);
  split_reduction(im, im.height, im.vector > 1 ? 2 * kRows : kScalarRows, r);
  return r;
}

// Of pixels: each thread walks over them, `columns` apart. A part has at least 96 of them, so that
// its row of partial sums costs little.
inline Reduction choose_pixel_reduction(const Image& im) {
  Reduction r = lay_out_reduction(im, im.pixels());
  split_reduction(im, ceil_div(im.pixels(), r.columns), ceil_div(96, r.columns), r);
  return r;
}

struct ReductionPlace {
  int column, lane;         // of the block's threads
  int first_channel, last;  // of the block's channels in the group: [first_channel, last)
  int offset;               // in the group, of the thread's channels in row 0, column 0
  bool inside;
};

POOLFORMER_HOST_DEVICE ReductionPlace place_of(const Image& im, const Reduction& r,
                                               int channel_block, int thread) {
  ReductionPlace p{};
  p.first_channel = channel_block * r.channels * im.vector;
  p.last = smaller(p.first_channel + r.channels * im.vector, im.group_channels);
  p.column = im.channels_last ? thread / r.channels : thread % r.columns;
  p.lane = im.channels_last ? thread % r.channels : thread / r.columns;
  const int channel = p.first_channel + p.lane * im.vector;
  p.offset = channel * im.channel_stride();
  p.inside = p.column < r.columns && p.lane < r.channels && channel < p.last;
  return p;
}

// Blocks that write a tensor vector by vector, in the order of memory: a thread has kUnroll
// vectors, kThreads apart. In NCHW a vector may have pixels of several channels.
inline int span_vector(const Image& im) {
  if (im.channels_last) return im.vector;
  return im.group_size() % im.full_vector() == 0 ? im.full_vector() : 1;
}
POOLFORMER_HOST_DEVICE int span_blocks(const Image& im, int vector) {
  return ceil_div(im.group_size() / vector, kThreads * kUnroll);
}
POOLFORMER_HOST_DEVICE int span_index(int block, int thread, int step) {
  return (block * kUnroll + step) * kThreads + thread;
}

// Where vector `index` of a group lies in it: groups of channels_last have gaps.
POOLFORMER_HOST_DEVICE int offset_in_group(const Image& im, int vector, int index) {
  if (!im.channels_last || im.groups == 1) return index * vector;
  const int vectors = im.group_channels / vector;
  return index / vectors * im.channels + index % vectors * vector;
}

// Its first channel in the group and, in NCHW, pixel.
struct SpanPlace {
  int channel, pixel;
};
POOLFORMER_HOST_DEVICE SpanPlace span_place(const Image& im, int vector, int index) {
  if (im.channels_last) return {index % (im.group_channels / vector) * vector, 0};
  const int channel = index * vector / im.pixels();
  return {channel, index * vector - channel * im.pixels()};
}

}  // namespace poolformer::cuda

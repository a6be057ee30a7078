// Statistics of images, in chunks that stay in the first-level cache.
#pragma once

#include "vec.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

constexpr int64_t kChunk = 4096, kSample = 64;

// Statistics of (rows, columns) values, `stride` apart by row, at most about kChunk of them. Sums
// of differences from the mean of the first values: with at least kSample of them in it, the error
// of m2 stays below kChunk / kSample roundings, whatever the values are.
template <class T>
static Partial chunk_statistics(const T* p, int64_t rows, int64_t columns, int64_t stride) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>;
  int64_t sample_columns = columns < kSample ? columns : kSample,
          sample_rows = kSample / columns + 1;
  if (sample_rows > rows) sample_rows = rows;
  Vec<A> sum = {};
  A rest = 0;
  for (int64_t r = 0; r < sample_rows; ++r) {
    int64_t i = 0;
    for (; i + w <= sample_columns; i += w) sum += load(p + r * stride + i);
    for (; i < sample_columns; ++i) rest += load1(p + r * stride + i);
  }
  A mean = (sum_lanes<A>(sum) + rest) / static_cast<A>(sample_rows * sample_columns);

  Vec<A> center = splat(mean), differences[4] = {}, squares[4] = {};
  A rest_difference = 0, rest_square = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = p + r * stride;
    int64_t i = 0;
    for (; i + 4 * w <= columns; i += 4 * w) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        Vec<A> d = load(row + i + j * w) - center;
        differences[j] += d;
        squares[j] += d * d;
      }
    }
    for (; i + w <= columns; i += w) {
      Vec<A> d = load(row + i) - center;
      differences[0] += d;
      squares[0] += d * d;
    }
    for (; i < columns; ++i) {
      A d = load1(row + i) - mean;
      rest_difference += d;
      rest_square += d * d;
    }
  }
  double n = static_cast<double>(rows * columns);
  for (int j = 1; j < 4; ++j) {
    differences[0] += differences[j];
    squares[0] += squares[j];
  }
  double difference = sum_lanes<A>(differences[0]) + rest_difference;
  double square = sum_lanes<A>(squares[0]) + rest_square;
  double m2 = square - difference * difference / n;
  return {n, mean + difference / n, m2 < 0 ? 0 : m2};
}

template <class T>
static Partial region_statistics(const T* p, int64_t rows, int64_t columns, int64_t stride) {
  if (rows * columns <= kChunk) return chunk_statistics(p, rows, columns, stride);
  Partial total;
  int64_t wide = columns < kChunk ? columns : kChunk, high = kChunk / wide;
  for (int64_t r = 0; r < rows; r += high) {
    for (int64_t c = 0; c < columns; c += wide) {
      int64_t n = rows - r < high ? rows - r : high, m = columns - c < wide ? columns - c : wide;
      merge(total, chunk_statistics(p + r * stride + c, n, m, stride));
    }
  }
  return total;
}

// Statistics of pixels [first, first + count) of channel group `group` of the tensor at `base`.
template <class T>
static Partial pixel_statistics(const Image& in, const T* base, int64_t image, int64_t group,
                                int64_t first, int64_t count) {
  int64_t channels = in.group_channels(), start = group * channels;
  if (in.channels_last) {
    const T* p = base + (image * in.pixels() + first) * in.channels + start;
    if (in.groups == 1) return region_statistics(p, 1, count * in.channels, 0);
    return region_statistics(p, count, channels, in.channels);
  }
  const T* p = base + (image * in.channels + start) * in.pixels() + first;
  if (count == in.pixels()) return region_statistics(p, 1, channels * count, 0);
  return region_statistics(p, channels, count, in.pixels());
}

// Sums of differences from a value that is expected near the mean, taken while values are written:
// of y = x + k rstd s (P x - x), the mean of x. Where registers are few, they are not taken.
template <class T>
class RunningStatistics {
  using A = Acc<T>;
  static constexpr int64_t kMost = 2048 * kLanes<A>;  // values, for the rounding of their sums

 public:
  explicit RunningStatistics(A near) : near_(near) {}

  PF_INLINE_METHOD void add(Vec<A> v) {
    Vec<A> d = v - near_;
    differences_ += d;
    squares_ += d * d;
  }
  PF_INLINE_METHOD void add(A v) {
    A d = v - near_;
    difference_ += d;
    square_ += d * d;
  }

  // False if they are not to be had from here: `near` was so far from the mean that m2 would have
  // an error of more than kSample roundings, or there were too many values or registers too few.
  bool get(int64_t count, Partial& out) const {
    if (!kManyRegisters || count > kMost) return false;
    double n = static_cast<double>(count);
    double difference = static_cast<double>(sum_lanes<A>(differences_)) + difference_;
    double square = static_cast<double>(sum_lanes<A>(squares_)) + square_;
    double m2 = square - difference * difference / n;
    out = {n, near_ + difference / n, m2};
    return !(m2 * kSample < square);  // NaN is a result
  }

 private:
  A near_, difference_ = 0, square_ = 0;
  Vec<A> differences_ = {}, squares_ = {};
};

// A chunk is a run of channels (NCHW) or of pixels (channels_last) of one image and group.
static int64_t statistics_step(const Image& in) {
  int64_t unit = in.channels_last ? in.group_channels() : in.pixels();
  int64_t step = kChunk / unit;
  return step < 1 ? 1 : step;
}

static int64_t statistics_chunks(const Image& in) {
  int64_t units = in.channels_last ? in.pixels() : in.group_channels();
  int64_t step = statistics_step(in);
  return (units + step - 1) / step;
}

static void statistics(const StatisticsArgs& args, int64_t begin, int64_t end) {
  const Image& in = args.in;
  int64_t step = statistics_step(in);
  with_type(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* x = as<T>(in.data);
    for (int64_t task = begin; task < end; ++task) {
      int64_t chunk = task % args.chunks, group = task / args.chunks % in.groups;
      int64_t image = task / args.chunks / in.groups, first = chunk * step;
      int64_t units = in.channels_last ? in.pixels() : in.group_channels();
      int64_t count = units - first < step ? units - first : step;
      if (in.channels_last) {
        args.partials[task] = pixel_statistics(in, x, image, group, first, count);
      } else {
        int64_t channel = image * in.channels + group * in.group_channels() + first;
        args.partials[task] =
            region_statistics(x + channel * in.pixels(), 1, count * in.pixels(), 0);
      }
    }
  });
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

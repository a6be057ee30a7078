// Sums in a fixed order, and statistics merged without cancellation.
#pragma once

#include "common.cuh"

namespace poolformer::cuda {

constexpr int kMostWarps = kThreads / kWarp;

// Every lane gets the sum; the order is fixed.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    v += __shfl_xor_sync(0xffffffff, v, distance);
  }
  return v;
}

// Every thread gets the N sums over the block; `slots` is for this call alone.
template <int N>
__device__ __forceinline__ void block_sum(float (&values)[N], float (&slots)[N][kMostWarps]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    values[n] = warp_sum(values[n]);
    if (threadIdx.x % kWarp == 0) slots[n][threadIdx.x / kWarp] = values[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    values[n] = 0.f;
    for (int warp = 0; warp < blockDim.x / kWarp; ++warp) values[n] += slots[n][warp];
  }
}

// Statistics of `count` values; m2 is the sum of (value - mean)^2.
struct Partial {
  float count, mean, m2;

  // Chan, Golub and LeVeque 1983.
  __device__ __forceinline__ void merge(float other_count, float other_mean, float other_m2) {
    const float distance = other_mean - mean, total = count + other_count;
    const float share = __fdividef(other_count, total);
    mean += distance * share;
    m2 += other_m2 + distance * distance * count * share;
    count = total;
  }

  // In two steps: the mean, then the distances from it.
  template <int V>
  __device__ __forceinline__ void add(const float (&values)[V]) {
    float sum = values[0], squares = 0.f;
#pragma unroll
    for (int i = 1; i < V; ++i) sum += values[i];
    const float center = sum * (1.f / V);
    if constexpr (V > 1) {
#pragma unroll
      for (int i = 0; i < V; ++i) squares += (values[i] - center) * (values[i] - center);
    }
    merge(V, center, squares);
  }

  __device__ __forceinline__ void store(float* stats, int64_t index) const {
    stats[index * 3] = count, stats[index * 3 + 1] = mean, stats[index * 3 + 2] = m2;
  }
};

// The statistics of a block from those of its threads: in thread 0.
__device__ __forceinline__ Partial block_merge(const Partial& own) {
  __shared__ Partial warps[kMostWarps];
  Partial all;
  all.count = warp_sum(own.count);
  all.mean = warp_sum(own.count * own.mean) / fmaxf(all.count, 1.f);
  const float distance = own.mean - all.mean;
  all.m2 = warp_sum(own.m2 + own.count * distance * distance);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = all;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < blockDim.x / kWarp; ++warp) {
      const Partial& other = warps[warp];
      if (other.count > 0.f) all.merge(other.count, other.mean, other.m2);
    }
  }
  return all;
}

struct Moments {
  float mean, rstd;
};

// Of a group, from its `partials` rows of (count, mean, M2): all lanes of one warp call it.
// Means are taken relative to the first.
__device__ __forceinline__ Moments merge_statistics(const float* stats, int partials, float eps) {
  const float first = __ldg(stats + 1);
  float count = 0.f, shift = 0.f, m2 = 0.f;
  for (int i = threadIdx.x % kWarp; i < partials; i += kWarp) {
    const float part = __ldg(stats + i * 3);
    count += part;
    shift += part * (__ldg(stats + i * 3 + 1) - first);
  }
  count = warp_sum(count);
  const float mean = first + warp_sum(shift) / count;
  for (int i = threadIdx.x % kWarp; i < partials; i += kWarp) {
    const float distance = __ldg(stats + i * 3 + 1) - mean;
    m2 += __ldg(stats + i * 3 + 2) + __ldg(stats + i * 3) * distance * distance;
  }
  return {mean, 1.f / sqrtf(warp_sum(m2) / count + eps)};
}

// The same for a whole block, by its first warp; the block with `keeps` writes them down.
__device__ __forceinline__ Moments block_moments(const float* stats, int partials, float eps,
                                                 int64_t image_group, bool keeps, float* saved) {
  __shared__ Moments shared;
  if (threadIdx.x < kWarp) {
    const Moments merged = merge_statistics(stats + image_group * partials * 3, partials, eps);
    if (threadIdx.x == 0) {
      shared = merged;
      if (keeps) saved[image_group * 2] = merged.mean, saved[image_group * 2 + 1] = merged.rstd;
    }
  }
  __syncthreads();
  return shared;
}

// The N totals of a group's partial sums, (partials, N): a block's first warp adds, all get them.
template <int N>
__device__ __forceinline__ void group_totals(const float* sums, int partials, float (&totals)[N]) {
  __shared__ float shared[N];
  if (threadIdx.x < kWarp) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float total = 0.f;
      for (int i = threadIdx.x; i < partials; i += kWarp) total += __ldg(sums + i * N + n);
      total = warp_sum(total);
      if (threadIdx.x == 0) shared[n] = total;
    }
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) totals[n] = shared[n];
}

// Σ over a block's threads of each channel: `own` of a thread is that of its column and channels.
// sums: kThreads · V floats of shared memory; afterwards sums[c] is that of channel c of the block.
template <int V>
__device__ __forceinline__ void sum_columns(const Reduction& r, const ReductionPlace& place,
                                            const float (&own)[V], float* sums) {
  const int wide = r.channels * V;
  if (place.inside) {
#pragma unroll
    for (int i = 0; i < V; ++i) sums[place.column * wide + place.lane * V + i] = own[i];
  }
  __syncthreads();
  for (int c = threadIdx.x; c < place.last - place.first_channel; c += blockDim.x) {
    float total = 0.f;
    for (int column = 0; column < r.columns; ++column) total += sums[column * wide + c];
    sums[c] = total;  // its column 0, which no other thread reads
  }
}

constexpr int kSummedChannels = 8;  // one 32-byte piece of each row
constexpr int kSummingWarps = 16;

// Σ over the rows of a (rows, channels) matrix: in the block's first kSummedChannels threads, for
// the channels from blockIdx.x · kSummedChannels on. slots is for this call alone.
__device__ __forceinline__ float sum_rows(const float* matrix, int64_t rows, int channels,
                                          float (&slots)[kSummingWarps][kSummedChannels]) {
  const int lane = threadIdx.x % kSummedChannels;
  const int channel = blockIdx.x * kSummedChannels + lane;
  float total = 0.f;
  if (channel < channels) {
#pragma unroll 4
    for (int64_t row = threadIdx.x / kSummedChannels; row < rows;
         row += kSummingWarps * kWarp / kSummedChannels) {
      total += __ldg(matrix + row * channels + channel);
    }
  }
#pragma unroll
  for (int distance = kWarp / 2; distance >= kSummedChannels; distance /= 2) {
    total += __shfl_xor_sync(0xffffffff, total, distance);
  }
  if (threadIdx.x % kWarp < kSummedChannels) slots[threadIdx.x / kWarp][lane] = total;
  __syncthreads();
  total = 0.f;
#pragma unroll
  for (int warp = 0; warp < kSummingWarps; ++warp) total += slots[warp][lane];
  return total;
}

}  // namespace poolformer::cuda

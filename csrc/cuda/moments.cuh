// Partial statistics (count, mean, M2): collected, and merged in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace poolformer::cuda::mlp {

struct Moments {
  float count = 0, mean = 0, m2 = 0;

  __device__ void merge(const Moments& other) {
    const float total = count + other.count;
    const float weight = total > 0 ? other.count / total : 0.f;
    const float distance = other.mean - mean;
    m2 += other.m2 + distance * distance * count * weight;
    mean += distance * weight;
    count = total;
  }
};

// Sums of a thread around its first value.
class Collector {
 public:
  // The first `count` values; not for a count of 0.
  __device__ void add(const float (&values)[8], int count) {
    if (count_ == 0) first_ = values[0];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float distance = i < count ? values[i] - first_ : 0.f;
      sum_ += distance;
      squares_ = fmaf(distance, distance, squares_);
    }
    count_ += count;
  }

  __device__ Moments moments() const {
    if (count_ == 0) return {};
    const float count = static_cast<float>(count_), shift = sum_ / count;
    return {count, first_ + shift, fmaxf(squares_ - sum_ * shift, 0.f)};
  }

 private:
  int count_ = 0;
  float first_ = 0, sum_ = 0, squares_ = 0;
};

// (count, mean, M2) of `count` moments together, in their order.
__device__ __forceinline__ void store_merged(float* stats, const Moments* moments, int count) {
  Moments total = moments[0];
#pragma unroll 1
  for (int i = 1; i < count; ++i) total.merge(moments[i]);
  stats[0] = total.count;
  stats[1] = total.mean;
  stats[2] = total.m2;
}

// The moments of all lanes, in lane 0.
__device__ __forceinline__ Moments merge_lanes(Moments m) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    Moments other;
    other.count = __shfl_down_sync(0xffffffffu, m.count, step);
    other.mean = __shfl_down_sync(0xffffffffu, m.mean, step);
    other.m2 = __shfl_down_sync(0xffffffffu, m.m2, step);
    m.merge(other);
  }
  return m;
}

__device__ __forceinline__ float sum_of_lanes(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

// (mean, 1 / std) of one image and group from its `partials` rows of (count, mean, M2); the same in
// every lane of every warp.
__device__ __forceinline__ float2 merge_partials(const float* stats, int partials, float eps,
                                                 int lane) {
  const float first = __ldg(stats + 1);
  float count = 0, shift = 0;
  for (int i = lane; i < partials; i += 32) {
    const float part = __ldg(stats + i * 3);
    count += part;
    shift += __fmul_rn(part, __ldg(stats + i * 3 + 1) - first);
  }
  count = sum_of_lanes(count);
  const float mean = first + sum_of_lanes(shift) / count;
  float m2 = 0;
  for (int i = lane; i < partials; i += 32) {
    const float distance = __ldg(stats + i * 3 + 1) - mean;
    m2 += __ldg(stats + i * 3 + 2) + __ldg(stats + i * 3) * distance * distance;
  }
  m2 = sum_of_lanes(m2);
  return make_float2(mean, 1.f / sqrtf(m2 / count + eps));
}

}  // namespace poolformer::cuda::mlp

// Tiles of NCHW by way of shared memory: what lies together is read and written 16 bytes a thread,
// whatever the width, and threads go down the columns of what is on chip.
#pragma once

#include <cuda_pipeline.h>

#include "sums.cuh"

namespace poolformer::cuda {

// Elements [begin, end) of a group, in shared memory. An element lies as far from a multiple of 16
// bytes there as in the tensor; what shares a vector with the first or the last comes along.
template <class T>
class Staged {
 public:
  static constexpr int kVector = kFullVector<T>;

  // memory: staged_bytes(end - begin, sizeof(T)) bytes, on a multiple of 16.
  __device__ __forceinline__ Staged(void* memory, int64_t group_offset, int begin, int end)
      : memory_(static_cast<T*>(memory)),
        offset_(group_offset + begin),
        shift_(static_cast<int>(offset_ % kVector)),
        count_(shift_ + end - begin),
        begin_(begin) {}

  // Starts the copy from a tensor of `size` elements; staged_wait() and a barrier end it.
  __device__ __forceinline__ void load(const void* tensor, int64_t size) const {
    const T* from = static_cast<const T*>(tensor) + (offset_ - shift_);
    const int64_t left = (size - (offset_ - shift_)) / kVector;
    const int all = ceil_div(count_, kVector), whole = left < all ? static_cast<int>(left) : all;
    for (int v = threadIdx.x; v < whole; v += blockDim.x) {
      __pipeline_memcpy_async(memory_ + v * kVector, from + v * kVector, kVectorBytes);
    }
#pragma unroll 1
    for (int i = whole * kVector + threadIdx.x; i < count_; i += blockDim.x) memory_[i] = from[i];
    __pipeline_commit();
  }

  // All of it, and no more, to a tensor. Calls visit(values) with vectors and with single values.
  template <class Visit>
  __device__ __forceinline__ void store(void* tensor, Visit&& visit) const {
    T* to = static_cast<T*>(tensor) + (offset_ - shift_);
    for (int v = threadIdx.x; v * kVector < count_; v += blockDim.x) {
      const int first = v * kVector;
      if (first >= shift_ && first + kVector <= count_) {
        const uint4 bits = *reinterpret_cast<const uint4*>(memory_ + first);
        __stwb(reinterpret_cast<uint4*>(to + first), bits);  // the compiler splits a plain store
        const Pack<T, kVector> pack = {{bits.x, bits.y, bits.z, bits.w}};
        float values[kVector];
        unpack(pack, values);
        visit(values);
      } else {
#pragma unroll 1
        for (int i = max(first, shift_); i < min(first + kVector, count_); ++i) {
          to[i] = memory_[i];
          const float values[1] = {to_float(memory_[i])};
          visit(values);
        }
      }
    }
  }

  // at()[i] is element i of the group.
  __device__ __forceinline__ T* at() const { return memory_ + (shift_ - begin_); }

 private:
  T* memory_;
  int64_t offset_;
  int shift_, count_, begin_;
};

__device__ __forceinline__ void staged_wait() { __pipeline_wait_prior(0); }

// What a block has in shared memory, from the start on.
__device__ __forceinline__ unsigned char* block_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<unsigned char*>(memory);
}

// The shared memory of a block: a tile's elements `plain` times, and with `halo` once more with it.
template <class T>
__host__ __device__ inline int plane_bytes(const Image& image, const Planes& p, int plain,
                                           bool halo) {
  const int elements = p.elements(image.width), size = static_cast<int>(sizeof(T));
  return plain * staged_bytes(elements, size) +
         (halo ? staged_bytes(elements + 2 * image.width, size) : 0);
}

// sums: what each lane has of its plane. Afterwards sums[plane · lanes of a plane] is that plane's.
// The order is fixed.
__device__ __forceinline__ void sum_planes(const PlaneTile& tile, int lanes, float* sums) {
  for (int plane = threadIdx.x / kWarp; plane < tile.planes; plane += blockDim.x / kWarp) {
    float total = 0.f;
    for (int i = threadIdx.x % kWarp; i < lanes; i += kWarp) total += sums[plane * lanes + i];
    total = warp_sum(total);
    if (threadIdx.x % kWarp == 0) sums[plane * lanes] = total;
  }
}

}  // namespace poolformer::cuda

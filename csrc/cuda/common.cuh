// What the kernels share: dtypes, 16-byte vectors, parameters.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace poolformer::cuda {

// Three blocks a multiprocessor; with __launch_bounds__(kThreads, 3) ptxas stops at 80 registers
// and spills.
#if CUDART_VERSION >= 12040
#define POOLFORMER_BOUNDS __maxnreg__(88)
#else
#define POOLFORMER_BOUNDS __launch_bounds__(kThreads, 2)
#endif

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

// Rounded to nearest even.
__device__ __forceinline__ void from_float(float v, float& result) { result = v; }
__device__ __forceinline__ void from_float(float v, __nv_bfloat16& result) {
  result = __float2bfloat16_rn(v);
}
__device__ __forceinline__ void from_float(float v, __half& result) { result = __float2half_rn(v); }

// Two 16-bit values in a word, as they lie in memory.
__device__ __forceinline__ void unpack_word(uint32_t word, float* values, __nv_bfloat16) {
  values[0] = __uint_as_float(word << 16);
  values[1] = __uint_as_float(word & 0xffff0000);
}
__device__ __forceinline__ void unpack_word(uint32_t word, float* values, __half) {
  __half2 pair;
  memcpy(&pair, &word, sizeof(pair));
  values[0] = __low2float(pair), values[1] = __high2float(pair);
}
__device__ __forceinline__ uint32_t pack_word(const float* values, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(values[0], values[1]);
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}
__device__ __forceinline__ uint32_t pack_word(const float* values, __half) {
  const __half2 pair = __floats2half2_rn(values[0], values[1]);
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}

// V values as they lie in memory: one access. Words, since 16-bit values take a register each.
template <class T, int V>
struct Pack {
  static_assert(sizeof(T) * V == kVectorBytes);
  uint32_t words[kVectorBytes / 4];
};

template <class T>
struct Pack<T, 1> {
  T value;
};

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* p) {
  if constexpr (V == 1) {
    return {__ldg(p)};
  } else {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(p));
    return {{bits.x, bits.y, bits.z, bits.w}};
  }
}

template <class T, int V>
__device__ __forceinline__ void store(T* p, const Pack<T, V>& pack) {
  if constexpr (V == 1) {
    *p = pack.value;
  } else {
    const uint32_t (&w)[4] = pack.words;
    *reinterpret_cast<uint4*>(p) = make_uint4(w[0], w[1], w[2], w[3]);
  }
}

template <class T, int V>
__device__ __forceinline__ void unpack(const Pack<T, V>& pack, float (&values)[V]) {
  if constexpr (V == 1) {
    values[0] = to_float(pack.value);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        values[i] = __uint_as_float(pack.words[i]);
      } else {
        unpack_word(pack.words[i], values + 2 * i, T{});
      }
    }
  }
}

template <class T, int V>
__device__ __forceinline__ Pack<T, V> rounded(const float (&values)[V]) {
  Pack<T, V> pack;
  if constexpr (V == 1) {
    from_float(values[0], pack.value);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        pack.words[i] = __float_as_uint(values[i]);
      } else {
        pack.words[i] = pack_word(values + 2 * i, T{});
      }
    }
  }
  return pack;
}

// A vector of a parameter, or `missing` where there is none.
template <class T, int V>
__device__ __forceinline__ void load_parameter(const void* parameter, int channel, float missing,
                                               float (&values)[V]) {
  if (parameter != nullptr) {
    unpack(load<V>(static_cast<const T*>(parameter) + channel), values);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] = missing;
  }
}

// The parameter of each of V pixels that lie side by side in NCHW, from `at` on. Where planes have
// V pixels there are two channels at most, and all lanes load both.
template <class T, int V>
__device__ __forceinline__ void load_of_pixels(const void* parameter, const Image& image,
                                               int first_channel, SpanPlace at, float missing,
                                               float (&values)[V]) {
  const int pixels = image.pixels(), last = image.group_channels - 1;
  if (pixels >= V) {
    float first[1], second[1];
    load_parameter<T>(parameter, first_channel + at.channel, missing, first);
    load_parameter<T>(parameter, first_channel + min(at.channel + 1, last), missing, second);
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] = at.pixel + i < pixels ? first[0] : second[0];
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float own[1];
      load_parameter<T>(parameter, first_channel + at.channel + (at.pixel + i) / pixels, missing,
                        own);
      values[i] = own[0];
    }
  }
}

// The parameter of each element of a vector of a span.
template <class T, int V>
__device__ __forceinline__ void load_of_span(const void* parameter, const Image& image,
                                             int first_channel, SpanPlace at, float missing,
                                             float (&values)[V]) {
  if (image.channels_last) {
    load_parameter<T>(parameter, first_channel + at.channel, missing, values);
  } else {
    load_of_pixels<T>(parameter, image, first_channel, at, missing, values);
  }
}

template <class T>
__device__ __forceinline__ float image_factor(const Parameters& p, int64_t image) {
  if (p.drop_path == nullptr) return 1.f;
  if (p.drop_path_is_float) return static_cast<const float*>(p.drop_path)[image];
  return to_float(static_cast<const T*>(p.drop_path)[image]);
}

// k·γ·layer_scale of V channels.
template <class T, int V>
__device__ __forceinline__ void branch_scale(const Parameters& p, float k, int channel,
                                             float (&scale)[V]) {
  float layer_scale[V];
  load_parameter<T>(p.norm_weight, channel, 1.f, scale);
  load_parameter<T>(p.layer_scale, channel, 1.f, layer_scale);
#pragma unroll
  for (int i = 0; i < V; ++i) scale[i] = k * (scale[i] * layer_scale[i]);
}

// Calls launch(groups, first) for all image groups, as many at a time as a grid has in z: a
// kernel's group is first + blockIdx.z.
template <class Launch>
void for_groups(const Image& image, Launch&& launch) {
  const int64_t all = image.image_groups();
  for (int64_t first = 0; first < all; first += kMostParts) {
    launch(static_cast<unsigned>(std::min<int64_t>(all - first, kMostParts)), first);
  }
}

// The block and group of a kernel that goes from the last to the first.
__device__ __forceinline__ dim3 reversed_block() {
  return dim3(gridDim.x - 1 - blockIdx.x, gridDim.y - 1 - blockIdx.y, gridDim.z - 1 - blockIdx.z);
}

// Calls launch(T{}) with the C++ type of `dtype`.
template <class Launch>
cudaError_t with_type(Dtype dtype, Launch&& launch) {
  if (dtype == Dtype::kFloat32) {
    launch(float{});
  } else if (dtype == Dtype::kBFloat16) {
    launch(__nv_bfloat16{});
  } else {
    launch(__half{});
  }
  return cudaGetLastError();
}

template <class T>
constexpr int kFullVector = kVectorBytes / static_cast<int>(sizeof(T));

}  // namespace poolformer::cuda

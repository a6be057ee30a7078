// y = (x − mean)·r·γ + β, r = 1/std of each image and group: reads x and writes y once.
#include "sums.cuh"

namespace poolformer::cuda {
namespace {

// From the last image to the first, as in pool_mixer.cu.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks) group_norm_kernel(GroupNormArgs args) {
  const Image& image = args.image;
  const Span span = span_of(image, V, gridDim.x - 1 - blockIdx.x, threadIdx.x);
  const T* x = static_cast<const T*>(args.x) + span.offset;
  Pack<T, V> raw[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int index = span.first + u * kThreads;
    if (index < span.vectors) raw[u] = load<V>(x + offset_in_group(image, V, index));
  }
  const Moments moments = block_moments(args.stats, args.partials, args.eps, span.image_group,
                                        span.block == 0, args.saved);
  T* y = static_cast<T*>(args.y) + span.offset;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int index = span.first + u * kThreads;
    if (index >= span.vectors) break;
    const int channel = span.first_channel + channel_in_group(image, V, index);
    float values[V], weight[V], bias[V];
    unpack(raw[u], values);
    load_parameter<T>(args.weight, channel, 1.f, weight);
    load_parameter<T>(args.bias, channel, 0.f, bias);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      values[i] = (values[i] - moments.mean) * moments.rstd * weight[i] + bias[i];
    }
    store(y + offset_in_group(image, V, index), rounded<T>(values));
  }
}

}  // namespace

cudaError_t group_norm(const GroupNormArgs& args, cudaStream_t stream) {
  const Image& image = args.image;
  const int vector = image.vector();
  const auto blocks =
      static_cast<unsigned>(image.batch * image.groups * span_blocks(image, vector));
  return with_type(image.dtype, [&](auto value) {
    using T = decltype(value);
    if (vector > 1) {
      group_norm_kernel<T, kFullVector<T>><<<blocks, kThreads, 0, stream>>>(args);
    } else {
      group_norm_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(args);
    }
  });
}

}  // namespace poolformer::cuda

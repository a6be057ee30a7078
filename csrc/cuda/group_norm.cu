// y = (x − mean)·r·γ + β, r = 1/std of each image and group: reads x and writes y once.
#include "sums.cuh"

namespace poolformer::cuda {
namespace {

// From the last image to the first, as in pool_mixer.cu.
template <class T, int V>
__global__ void POOLFORMER_BOUNDS group_norm_kernel(GroupNormArgs args, int64_t first_group) {
  const Image& image = args.image;
  const dim3 block = reversed_block();
  const Group group(image, first_group + block.z);
  const int vectors = image.group_size() / V;
  const T* x = static_cast<const T*>(args.x) + group.offset;
  Pack<T, V> raw[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int index = span_index(block.x, threadIdx.x, u);
    if (index < vectors) raw[u] = load<V>(x + offset_in_group(image, V, index));
  }
  const Moments moments =
      block_moments(args.stats, args.partials, args.eps, group.number, block.x == 0, args.saved);
  T* y = static_cast<T*>(args.y) + group.offset;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int index = span_index(block.x, threadIdx.x, u);
    if (index >= vectors) break;
    const SpanPlace place = span_place(image, V, index);
    float values[V], weight[V], bias[V];
    unpack(raw[u], values);
    load_of_span<T>(args.weight, image, group.first_channel, place, 1.f, weight);
    load_of_span<T>(args.bias, image, group.first_channel, place, 0.f, bias);
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
  return with_type(image.dtype, [&](auto value) {
    using T = decltype(value);
    const int vector = span_vector(image);
    const auto kernel = vector > 1 ? group_norm_kernel<T, kFullVector<T>> : group_norm_kernel<T, 1>;
    for_groups(image, [&](unsigned groups, int64_t first) {
      const dim3 grid(span_blocks(image, vector), 1, groups);
      kernel<<<grid, kThreads, 0, stream>>>(args, first);
    });
  });
}

}  // namespace poolformer::cuda

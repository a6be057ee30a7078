// Partial statistics of each image and group: one pass over x, chunks merged in a fixed order.
#include "sums.cuh"

namespace poolformer::cuda {
namespace {

struct Chunks {
  int vectors;  // of a group
  int count;    // of a block, one after another: kUnroll vectors in each thread
  int blocks;   // of a group
};

// As long as its elements lie side by side a group is vectors, whatever their channels.
int vector_of(const Image& image) {
  const int full = image.full_vector();
  const bool gaps = image.channels_last && image.groups > 1;
  return (gaps ? image.group_channels : image.group_size()) % full == 0 ? full : 1;
}

Chunks choose_chunks(const Image& image) {
  Chunks chunks{};
  chunks.vectors = image.group_size() / vector_of(image);
  const int all = ceil_div(chunks.vectors, kThreads * kUnroll);
  chunks.count = ceil_div(all, kMostPartials);
  chunks.blocks = ceil_div(all, chunks.count);
  return chunks;
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(Image image, Chunks chunks, const T* x, float* stats, int64_t first_group) {
  const Group group(image, first_group + blockIdx.z);
  Partial own{};
  for (int chunk = 0; chunk < chunks.count; ++chunk) {
    const int block = blockIdx.x * chunks.count + chunk;
    Pack<T, V> raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int index = span_index(block, threadIdx.x, u);
      if (index < chunks.vectors) {
        raw[u] = load<V>(x + group.offset + offset_in_group(image, V, index));
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (span_index(block, threadIdx.x, u) < chunks.vectors) {
        float values[V];
        unpack(raw[u], values);
        own.add(values);
      }
    }
  }
  const Partial all = block_merge(own);
  if (threadIdx.x == 0) all.store(stats, group.number * gridDim.x + blockIdx.x);
}

}  // namespace

int statistics_partials(const Image& image) { return choose_chunks(image).blocks; }

int architecture() {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, statistics_kernel<float, 1>) == cudaSuccess) {
    return attributes.ptxVersion;
  }
  cudaGetLastError();  // forget it
  return 0;
}

cudaError_t statistics(const Image& image, const void* x, float* stats, cudaStream_t stream) {
  const Chunks chunks = choose_chunks(image);
  return with_type(image.dtype, [&](auto value) {
    using T = decltype(value);
    const auto kernel =
        vector_of(image) > 1 ? statistics_kernel<T, kFullVector<T>> : statistics_kernel<T, 1>;
    for_groups(image, [&](unsigned groups, int64_t first) {
      const dim3 grid(chunks.blocks, 1, groups);
      kernel<<<grid, kThreads, 0, stream>>>(image, chunks, static_cast<const T*>(x), stats, first);
    });
  });
}

}  // namespace poolformer::cuda

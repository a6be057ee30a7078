// With g = dL/dy and x̂ = (x − mean)·r, three launches: partial sums over pixels of g·x̂ and g (reads
// g and x), dx = r·(γ·g − mean(γ·g) − x̂·mean(γ·g·x̂)) (reads g and x again, from the end that L2
// still holds, and writes dx), and the parameters' gradients, where more than one part of an image
// has to be summed for them.
#include "planes.cuh"
#include "sums.cuh"

namespace poolformer::cuda {
namespace {

// What a part of an image adds to the sums of g·x̂ and g of a channel: kept for parameters_kernel,
// or all there is.
template <class T>
__device__ __forceinline__ void keep_sums(const GroupNormBackwardArgs& args, int64_t row,
                                          int64_t rows, int channel, float product,
                                          float gradient) {
  if (args.channel_sums != nullptr) {
    args.channel_sums[row * args.image.channels + channel] = product;
    args.channel_sums[(rows + row) * args.image.channels + channel] = gradient;
  } else {
    from_float(product, static_cast<T*>(args.dweight)[channel]);
    from_float(gradient, static_cast<T*>(args.dbias)[channel]);
  }
}

template <class T, int V>
__global__ void POOLFORMER_BOUNDS reduce_kernel(GroupNormBackwardArgs args, int64_t first_group) {
  const Image& image = args.image;
  const Reduction& r = args.reduction;
  const Group group(image, first_group + blockIdx.z);
  const ReductionPlace place = place_of(image, r, blockIdx.x, threadIdx.x);
  const int part = blockIdx.y, stride = image.column_stride();
  const float mean = __ldg(args.saved + group.number * 2);
  const float rstd = __ldg(args.saved + group.number * 2 + 1);
  float products[V] = {}, gradients[V] = {};
  if (place.inside) {
    const T* dy = static_cast<const T*>(args.dy) + group.offset + place.offset;
    const T* x = static_cast<const T*>(args.x) + group.offset + place.offset;
    const int first = part * r.steps * r.columns;
    const int end = min(first + r.steps * r.columns, image.pixels());
#pragma unroll 2
    for (int pixel = first + place.column; pixel < end; pixel += r.columns) {
      float g[V], values[V];
      unpack(load<V>(dy + pixel * stride), g);
      unpack(load<V>(x + pixel * stride), values);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        products[i] += g[i] * (values[i] - mean);
        gradients[i] += g[i];
      }
    }
  }

  __shared__ float product_sums[kThreads * V], gradient_sums[kThreads * V], slots[2][kMostWarps];
  sum_columns(r, place, products, product_sums);
  sum_columns(r, place, gradients, gradient_sums);
  const int64_t rows = image.batch * r.parts;
  const int64_t row = group.image * r.parts + part;
  float totals[2] = {0.f, 0.f};
  for (int c = threadIdx.x; c < place.last - place.first_channel; c += blockDim.x) {
    const int channel = group.first_channel + place.first_channel + c;
    const float product = rstd * product_sums[c], gradient = gradient_sums[c];
    keep_sums<T>(args, row, rows, channel, product, gradient);
    float gamma[1];
    load_parameter<T>(args.weight, channel, 1.f, gamma);
    totals[0] += gamma[0] * product;
    totals[1] += gamma[0] * gradient;
  }
  block_sum(totals, slots);
  if (threadIdx.x < 2) {
    const int tile = part * r.channel_blocks + blockIdx.x;
    args.group_sums[(group.number * r.blocks() + tile) * 2 + threadIdx.x] =
        threadIdx.x == 0 ? totals[0] : totals[1];
  }
}

// For NCHW, a tile in shared memory a block.
template <class T>
__global__ void POOLFORMER_BOUNDS reduce_planes_kernel(GroupNormBackwardArgs args, Planes p,
                                                       int64_t first_group) {
  const Image& image = args.image;
  const Group group(image, first_group + blockIdx.z);
  const PlaneTile tile = tile_of(image, p, blockIdx.x);
  const int64_t size = image.batch * image.channels * image.pixels();
  const int bytes = staged_bytes(p.elements(image.width), sizeof(T));
  const Staged<T> upstream(block_memory(), group.offset, tile.begin, tile.end);
  const Staged<T> input(block_memory() + bytes, group.offset, tile.begin, tile.end);
  float* product_sums = reinterpret_cast<float*>(block_memory() + 2 * bytes);
  float* gradient_sums = product_sums + p.lanes;
  upstream.load(args.dy, size);
  input.load(args.x, size);
  const float mean = __ldg(args.saved + group.number * 2);
  const float rstd = __ldg(args.saved + group.number * 2 + 1);
  staged_wait();
  __syncthreads();
  for (int i = threadIdx.x; i < p.lanes; i += blockDim.x) {
    const PlaneLane lane = lane_of(image, p, tile, i);
    float product = 0.f, sum = 0.f;
    for (int row = lane.row; lane.inside && row < lane.end; ++row) {
      const int element = lane.offset + row * image.width;
      const float g = to_float(upstream.at()[element]);
      product += g * (to_float(input.at()[element]) - mean);
      sum += g;
    }
    product_sums[i] = product, gradient_sums[i] = sum;
  }
  __syncthreads();
  const int plane_lanes = p.band_segments * image.width;
  sum_planes(tile, plane_lanes, product_sums);
  sum_planes(tile, plane_lanes, gradient_sums);
  __syncthreads();

  __shared__ float slots[2][kMostWarps];
  const int64_t rows = image.batch * p.bands;
  const int64_t row = group.image * p.bands + tile.band;
  float totals[2] = {0.f, 0.f};
  for (int plane = threadIdx.x; plane < tile.planes; plane += blockDim.x) {
    const int channel = group.first_channel + tile.first_plane + plane;
    const float product = rstd * product_sums[plane * plane_lanes];
    const float gradient = gradient_sums[plane * plane_lanes];
    keep_sums<T>(args, row, rows, channel, product, gradient);
    float gamma[1];
    load_parameter<T>(args.weight, channel, 1.f, gamma);
    totals[0] += gamma[0] * product;
    totals[1] += gamma[0] * gradient;
  }
  block_sum(totals, slots);
  if (threadIdx.x < 2) {
    args.group_sums[(group.number * p.tiles + blockIdx.x) * 2 + threadIdx.x] =
        threadIdx.x == 0 ? totals[0] : totals[1];
  }
}

template <class T, int V>
__global__ void POOLFORMER_BOUNDS apply_kernel(GroupNormBackwardArgs args, int64_t first_group) {
  const Image& image = args.image;
  const dim3 block = reversed_block();
  const Group group(image, first_group + block.z);
  const int vectors = image.group_size() / V;
  const T* dy = static_cast<const T*>(args.dy) + group.offset;
  const T* x = static_cast<const T*>(args.x) + group.offset;
  Pack<T, V> raw_dy[kUnroll], raw_x[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int index = span_index(block.x, threadIdx.x, u);
    if (index < vectors) {
      raw_dy[u] = load<V>(dy + offset_in_group(image, V, index));
      raw_x[u] = load<V>(x + offset_in_group(image, V, index));
    }
  }
  const int partials = args.reduction.blocks();
  float totals[2];
  group_totals(args.group_sums + group.number * partials * 2, partials, totals);
  const float mean = __ldg(args.saved + group.number * 2);
  const float rstd = __ldg(args.saved + group.number * 2 + 1);
  const float size = static_cast<float>(image.group_size());
  const float along_x = totals[0] * rstd / size, along_one = totals[1] / size;
  T* dx = static_cast<T*>(args.dx) + group.offset;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int index = span_index(block.x, threadIdx.x, u);
    if (index >= vectors) break;
    const SpanPlace place = span_place(image, V, index);
    float g[V], values[V], gamma[V];
    unpack(raw_dy[u], g);
    unpack(raw_x[u], values);
    load_of_span<T>(args.weight, image, group.first_channel, place, 1.f, gamma);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      values[i] = rstd * (g[i] * gamma[i] - along_one - (values[i] - mean) * along_x);
    }
    store(dx + offset_in_group(image, V, index), rounded<T>(values));
  }
}

// channel_sums: (2, rows, channels) → dweight and dbias.
template <class T>
__global__ void __launch_bounds__(kSummingWarps* kWarp)
    parameters_kernel(GroupNormBackwardArgs args) {
  __shared__ float slots[2][kSummingWarps][kSummedChannels];
  const int64_t rows = args.image.batch * args.reduction.parts;
  const int channels = args.image.channels;
  const float product = sum_rows(args.channel_sums, rows, channels, slots[0]);
  const float gradient = sum_rows(args.channel_sums + rows * channels, rows, channels, slots[1]);
  const int channel = blockIdx.x * kSummedChannels + threadIdx.x;
  if (threadIdx.x < kSummedChannels && channel < channels) {
    from_float(product, static_cast<T*>(args.dweight)[channel]);
    from_float(gradient, static_cast<T*>(args.dbias)[channel]);
  }
}

template <class T>
void reduce_planes(const GroupNormBackwardArgs& args, cudaStream_t stream) {
  const Planes p = choose_planes(args.image);
  const int bytes =
      2 * (plane_bytes<T>(args.image, p, 1, false) + p.lanes * static_cast<int>(sizeof(float)));
  for_groups(args.image, [&](unsigned groups, int64_t first) {
    const dim3 grid(p.tiles, 1, groups);
    reduce_planes_kernel<T><<<grid, p.threads, bytes, stream>>>(args, p, first);
  });
}

template <class T>
void reduce(const GroupNormBackwardArgs& args, cudaStream_t stream) {
  const Reduction& r = args.reduction;
  const auto kernel =
      args.image.vector > 1 ? reduce_kernel<T, kFullVector<T>> : reduce_kernel<T, 1>;
  for_groups(args.image, [&](unsigned groups, int64_t first) {
    const dim3 grid(r.channel_blocks, r.parts, groups);
    kernel<<<grid, r.threads, 0, stream>>>(args, first);
  });
}

template <class T>
void apply(const GroupNormBackwardArgs& args, cudaStream_t stream) {
  const int vector = span_vector(args.image);
  const auto kernel = vector > 1 ? apply_kernel<T, kFullVector<T>> : apply_kernel<T, 1>;
  for_groups(args.image, [&](unsigned groups, int64_t first) {
    const dim3 grid(span_blocks(args.image, vector), 1, groups);
    kernel<<<grid, kThreads, 0, stream>>>(args, first);
  });
}

}  // namespace

cudaError_t group_norm_backward(const GroupNormBackwardArgs& args, cudaStream_t stream) {
  return with_type(args.image.dtype, [&](auto value) {
    using T = decltype(value);
    args.image.in_planes() ? reduce_planes<T>(args, stream) : reduce<T>(args, stream);
    if (cudaPeekAtLastError() != cudaSuccess) return;
    apply<T>(args, stream);
    if (cudaPeekAtLastError() != cudaSuccess || args.channel_sums == nullptr) return;
    parameters_kernel<T>
        <<<ceil_div(args.image.channels, kSummedChannels), kSummingWarps * kWarp, 0, stream>>>(
            args);
  });
}

}  // namespace poolformer::cuda

// With g = dL/dy and x̂ = (x − mean)·r, three launches: partial sums over pixels of g·x̂ and g (reads
// g and x), dx = r·(γ·g − mean(γ·g) − x̂·mean(γ·g·x̂)) (reads g and x again, from the end that L2
// still holds, and writes dx), and the parameters' gradients.
#include "sums.cuh"

namespace poolformer::cuda {
namespace {

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
  float* row = args.channel_sums + (group.image * r.parts + part) * image.channels;
  float totals[2] = {0.f, 0.f};
  for (int c = threadIdx.x; c < place.last - place.first_channel; c += blockDim.x) {
    const int channel = group.first_channel + place.first_channel + c;
    const float product = rstd * product_sums[c], gradient = gradient_sums[c];
    row[channel] = product;
    row[rows * image.channels + channel] = gradient;
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
    const int channel = group.first_channel + channel_in_group(image, V, index);
    float g[V], values[V], gamma[V];
    unpack(raw_dy[u], g);
    unpack(raw_x[u], values);
    load_parameter<T>(args.weight, channel, 1.f, gamma);
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

template <class T, int V>
void reduce_and_apply(const GroupNormBackwardArgs& args, cudaStream_t stream) {
  const Reduction& r = args.reduction;
  for_groups(args.image, [&](unsigned groups, int64_t first) {
    const dim3 grid(r.channel_blocks, r.parts, groups);
    reduce_kernel<T, V><<<grid, r.threads, 0, stream>>>(args, first);
  });
  if (cudaPeekAtLastError() != cudaSuccess) return;
  for_groups(args.image, [&](unsigned groups, int64_t first) {
    const dim3 grid(span_blocks(args.image, V), 1, groups);
    apply_kernel<T, V><<<grid, kThreads, 0, stream>>>(args, first);
  });
}

}  // namespace

cudaError_t group_norm_backward(const GroupNormBackwardArgs& args, cudaStream_t stream) {
  return with_type(args.image.dtype, [&](auto value) {
    using T = decltype(value);
    if (args.image.vector > 1) {
      reduce_and_apply<T, kFullVector<T>>(args, stream);
    } else {
      reduce_and_apply<T, 1>(args, stream);
    }
    if (cudaPeekAtLastError() != cudaSuccess) return;
    parameters_kernel<T>
        <<<ceil_div(args.image.channels, kSummedChannels), kSummingWarps * kWarp, 0, stream>>>(
            args);
  });
}

}  // namespace poolformer::cuda

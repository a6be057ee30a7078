// With g = dL/dy, Q = Σ_hw g·(Px − x) and T = Σ_c k·s·Q, three launches: partial sums of Q and T
// (reads g and x), dx = g + k·r·s·(Pᵀg − g) − (r³·T/n)·(x − mean) (reads g and x again, from the
// end that L2 still holds, and writes dx), and the parameters' gradients.
#include "pooling.cuh"
#include "sums.cuh"

namespace poolformer::cuda {
namespace {

constexpr int kReducingBlocksOfSm = 2;  // with 3 it spills

template <class Pool>
__global__ void __launch_bounds__(kThreads, kReducingBlocksOfSm)
    reduce_kernel(PoolMixerBackwardArgs args, int64_t first_group) {
  using T = typename Pool::Type;
  constexpr int V = Pool::kVector;
  const Image& image = args.image;
  const Reduction& r = args.reduction;
  const Group group(image, first_group + blockIdx.z);
  const ReductionPlace place = place_of(image, r, blockIdx.x, threadIdx.x);
  const int part = blockIdx.y, column_stride = image.column_stride();
  const int first = part * r.steps, end = min(first + r.steps, image.height);
  const float mean = __ldg(args.saved + group.number * 2);
  float products[V] = {};
  if (place.inside) {
    for (int column = place.column; column < image.width; column += r.columns) {
      const int64_t lane = group.offset + (place.offset + column * column_stride);
      const T* dy = static_cast<const T*>(args.dy) + lane + first * image.row_stride();
      Pool pool({image, args.x, lane, column}, args.radius);
      pool.prefetch(first, end);
      pool.begin(first, mean);
      for (int row = first; row < end; ++row) {
        float g[V], difference[V], own[V];
        const Pack<T, V> raw = load<V>(dy);
        dy += image.row_stride();
        pool.next(row, difference, own);
        unpack(raw, g);
#pragma unroll
        for (int i = 0; i < V; ++i) products[i] += g[i] * difference[i];
      }
    }
  }

  __shared__ float sums[kThreads * V], slots[1][kMostWarps];
  sum_columns(r, place, products, sums);
  const float k = image_factor<T>(args.parameters, group.image);
  const float factor = k * __ldg(args.saved + group.number * 2 + 1);
  float* row = args.channel_sums + (group.image * r.parts + part) * image.channels;
  float t[1] = {0.f};
  for (int c = threadIdx.x; c < place.last - place.first_channel; c += blockDim.x) {
    const int channel = group.first_channel + place.first_channel + c;
    float scale[1];
    branch_scale<T>(args.parameters, k, channel, scale);
    row[channel] = factor * sums[c];
    t[0] += scale[0] * sums[c];
  }
  block_sum(t, slots);
  const int tile = part * r.channel_blocks + blockIdx.x;
  if (threadIdx.x == 0) args.group_sums[group.number * r.blocks() + tile] = t[0];
}

template <class Pool>
__global__ void POOLFORMER_BOUNDS apply_kernel(PoolMixerBackwardArgs args, int64_t first_group) {
  using T = typename Pool::Type;
  constexpr int V = Pool::kVector;
  const Image& image = args.image;
  const dim3 block = reversed_block();
  const Group group(image, first_group + block.z);
  const Place place = place_of(image, args.tiling, block.x, block.y, threadIdx.x);
  Pool pool({image, args.dy, group.offset + place.offset, place.column}, args.radius);
  pool.prefetch(place.row, place.end);
  float totals[1];
  const int partials = args.reduction.blocks();
  group_totals(args.group_sums + group.number * partials, partials, totals);
  const float mean = __ldg(args.saved + group.number * 2);
  const float rstd = __ldg(args.saved + group.number * 2 + 1);
  const float along_x = totals[0] * rstd * rstd * rstd / static_cast<float>(image.group_size());
  float scale[V];
  branch_scale<T>(args.parameters, rstd * image_factor<T>(args.parameters, group.image),
                  group.first_channel + place.channel, scale);

  const int row_stride = image.row_stride();
  const int64_t first = group.offset + (place.offset + place.row * row_stride);
  const T* x = static_cast<const T*>(args.x) + first;
  T* dx = static_cast<T*>(args.dx) + first;
  pool.begin(place.row, 0.f);
  for (int row = place.row; row < place.end; ++row) {
    float difference[V], g[V], values[V];
    const Pack<T, V> raw = load<V>(x);
    pool.next(row, difference, g);
    unpack(raw, values);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      values[i] = g[i] + scale[i] * difference[i] - along_x * (values[i] - mean);
    }
    if (place.inside) store(dx, rounded<T>(values));
    x += row_stride;
    dx += row_stride;
  }
}

// channel_sums: (rows, channels) of k·r·Q → dγ = layer_scale·Σ, dlayer_scale = γ·Σ.
template <class T>
__global__ void __launch_bounds__(kSummingWarps* kWarp)
    parameters_kernel(PoolMixerBackwardArgs args) {
  __shared__ float slots[kSummingWarps][kSummedChannels];
  const int64_t rows = args.image.batch * args.reduction.parts;
  const float q = sum_rows(args.channel_sums, rows, args.image.channels, slots);
  const int channel = blockIdx.x * kSummedChannels + threadIdx.x;
  if (threadIdx.x < kSummedChannels && channel < args.image.channels) {
    float gamma[1], layer_scale[1];
    load_parameter<T>(args.parameters.norm_weight, channel, 1.f, gamma);
    load_parameter<T>(args.parameters.layer_scale, channel, 1.f, layer_scale);
    from_float(layer_scale[0] * q, static_cast<T*>(args.dnorm_weight)[channel]);
    from_float(gamma[0] * q, static_cast<T*>(args.dlayer_scale)[channel]);
  }
}

}  // namespace

cudaError_t pool_mixer_backward(const PoolMixerBackwardArgs& args, cudaStream_t stream) {
  const Image& image = args.image;
  const Reduction& r = args.reduction;
  const Tiling& t = args.tiling;
  cudaError_t error = with_pool<false>(image, args.radius, [&](auto kind) {
    for_groups(image, [&](unsigned groups, int64_t first) {
      const dim3 grid(r.channel_blocks, r.parts, groups);
      reduce_kernel<typename decltype(kind)::type><<<grid, r.threads, 0, stream>>>(args, first);
    });
  });
  if (error != cudaSuccess) return error;
  error = with_pool<true>(image, args.radius, [&](auto kind) {
    for_groups(image, [&](unsigned groups, int64_t first) {
      const dim3 grid(t.lane_blocks, t.row_blocks, groups);
      apply_kernel<typename decltype(kind)::type><<<grid, t.threads, 0, stream>>>(args, first);
    });
  });
  if (error != cudaSuccess) return error;
  return with_type(image.dtype, [&](auto value) {
    parameters_kernel<decltype(value)>
        <<<ceil_div(image.channels, kSummedChannels), kSummingWarps * kWarp, 0, stream>>>(args);
  });
}

}  // namespace poolformer::cuda

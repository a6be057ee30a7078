// With g = dL/dy, P the window average, s = layer_scale·γ, k the drop-path factor, r = 1/std, n the
// elements of an image and group, Q = Σ_hw g·(Px − x) and T = Σ_c k·s·Q, three launches: partial
// sums of Q and T (reads g and x), dx = g + k·r·s·(Pᵀg − g) − (r³·T/n)·(x − mean) (reads g and x
// again, from the end that L2 still holds, and writes dx), and the parameters' gradients, where
// more than one part of an image has to be summed for them.
#include "planes.cuh"
#include "pooling.cuh"
#include "sums.cuh"

namespace poolformer::cuda {
namespace {

constexpr int kReducingBlocksOfSm = 2;  // with 3 it spills

// q: Σ k·r·Q of a channel.
template <class T>
__device__ __forceinline__ void store_gradients(const PoolMixerBackwardArgs& args, int channel,
                                                float q) {
  float gamma[1], layer_scale[1];
  load_parameter<T>(args.parameters.norm_weight, channel, 1.f, gamma);
  load_parameter<T>(args.parameters.layer_scale, channel, 1.f, layer_scale);
  from_float(layer_scale[0] * q, static_cast<T*>(args.dnorm_weight)[channel]);
  from_float(gamma[0] * q, static_cast<T*>(args.dlayer_scale)[channel]);
}

// What a part of an image adds to Q of a channel: kept for parameters_kernel, or all there is.
template <class T>
__device__ __forceinline__ void keep_sum(const PoolMixerBackwardArgs& args, int64_t row,
                                         int channel, float q) {
  if (args.channel_sums != nullptr) {
    args.channel_sums[row * args.image.channels + channel] = q;
  } else {
    store_gradients<T>(args, channel, q);
  }
}

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
  const int64_t row = group.image * r.parts + part;
  float t[1] = {0.f};
  for (int c = threadIdx.x; c < place.last - place.first_channel; c += blockDim.x) {
    const int channel = group.first_channel + place.first_channel + c;
    float scale[1];
    branch_scale<T>(args.parameters, k, channel, scale);
    keep_sum<T>(args, row, channel, factor * sums[c]);
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

// Both for NCHW, a tile in shared memory a block.
template <class Pool>
__global__ void POOLFORMER_BOUNDS reduce_planes_kernel(PoolMixerBackwardArgs args, Planes p,
                                                       int64_t first_group) {
  using T = typename Pool::Type;
  const Image& image = args.image;
  const Group group(image, first_group + blockIdx.z);
  const PlaneTile tile = tile_of(image, p, blockIdx.x);
  const int64_t size = image.batch * image.channels * image.pixels();
  const int bytes = staged_bytes(p.elements(image.width), sizeof(T));
  const Staged<T> gradient(block_memory(), group.offset, tile.begin, tile.end);
  const Staged<T> input(block_memory() + bytes, group.offset, tile.halo_begin, tile.halo_end);
  float* sums =
      reinterpret_cast<float*>(block_memory() + plane_bytes<T>(image, p, 1, Pool::kStaged));
  gradient.load(args.dy, size);
  if constexpr (Pool::kStaged) input.load(args.x, size);
  const float mean = __ldg(args.saved + group.number * 2);
  staged_wait();
  __syncthreads();
  for (int i = threadIdx.x; i < p.lanes; i += blockDim.x) {
    const PlaneLane lane = lane_of(image, p, tile, i);
    float product = 0.f;
    if (lane.inside) {
      const void* x = args.x;
      int64_t offset = group.offset + lane.offset;
      if constexpr (Pool::kStaged) x = input.at(), offset = lane.offset;
      Pool pool({image, x, offset, lane.column}, args.radius);
      pool.prefetch(lane.row, lane.end);
      pool.begin(lane.row, mean);
      const T* dy = gradient.at() + (lane.offset + lane.row * image.width);
      for (int row = lane.row; row < lane.end; ++row) {
        float difference[1], own[1];
        pool.next(row, difference, own);
        product += to_float(*dy) * difference[0];
        dy += image.width;
      }
    }
    sums[i] = product;
  }
  __syncthreads();
  const int plane_lanes = p.band_segments * image.width;
  sum_planes(tile, plane_lanes, sums);
  __syncthreads();

  __shared__ float slots[1][kMostWarps];
  const float k = image_factor<T>(args.parameters, group.image);
  const float factor = k * __ldg(args.saved + group.number * 2 + 1);
  const int64_t row = group.image * p.bands + tile.band;
  float t[1] = {0.f};
  for (int plane = threadIdx.x; plane < tile.planes; plane += blockDim.x) {
    const int channel = group.first_channel + tile.first_plane + plane;
    const float sum = sums[plane * plane_lanes];
    float scale[1];
    branch_scale<T>(args.parameters, k, channel, scale);
    keep_sum<T>(args, row, channel, factor * sum);
    t[0] += scale[0] * sum;
  }
  block_sum(t, slots);
  if (threadIdx.x == 0) args.group_sums[group.number * p.tiles + blockIdx.x] = t[0];
}

// dx takes x's place in shared memory.
template <class Pool>
__global__ void POOLFORMER_BOUNDS apply_planes_kernel(PoolMixerBackwardArgs args, Planes p,
                                                      int64_t first_group) {
  using T = typename Pool::Type;
  const Image& image = args.image;
  const dim3 block = reversed_block();
  const Group group(image, first_group + block.z);
  const PlaneTile tile = tile_of(image, p, block.x);
  const int64_t size = image.batch * image.channels * image.pixels();
  const int bytes = staged_bytes(p.elements(image.width), sizeof(T));
  const Staged<T> input(block_memory(), group.offset, tile.begin, tile.end);
  const Staged<T> gradient(block_memory() + bytes, group.offset, tile.halo_begin, tile.halo_end);
  input.load(args.x, size);
  if constexpr (Pool::kStaged) gradient.load(args.dy, size);
  float totals[1];
  group_totals(args.group_sums + group.number * p.tiles, p.tiles, totals);
  const float mean = __ldg(args.saved + group.number * 2);
  const float rstd = __ldg(args.saved + group.number * 2 + 1);
  const float along_x = totals[0] * rstd * rstd * rstd / static_cast<float>(image.group_size());
  const float factor = rstd * image_factor<T>(args.parameters, group.image);
  staged_wait();
  __syncthreads();
  for (int i = threadIdx.x; i < p.lanes; i += blockDim.x) {
    const PlaneLane lane = lane_of(image, p, tile, i);
    if (!lane.inside) break;
    const void* dy = args.dy;
    int64_t offset = group.offset + lane.offset;
    if constexpr (Pool::kStaged) dy = gradient.at(), offset = lane.offset;
    Pool pool({image, dy, offset, lane.column}, args.radius);
    pool.prefetch(lane.row, lane.end);
    float scale[1];
    branch_scale<T>(args.parameters, factor, group.first_channel + tile.first_plane + lane.plane,
                    scale);
    pool.begin(lane.row, 0.f);
    T* x = input.at() + (lane.offset + lane.row * image.width);
    for (int row = lane.row; row < lane.end; ++row) {
      float difference[1], g[1];
      pool.next(row, difference, g);
      from_float(g[0] + scale[0] * difference[0] - along_x * (to_float(*x) - mean), *x);
      x += image.width;
    }
  }
  __syncthreads();
  input.store(args.dx, [](const auto&) {});
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
    store_gradients<T>(args, channel, q);
  }
}

cudaError_t through_lanes(const PoolMixerBackwardArgs& args, cudaStream_t stream) {
  const Image& image = args.image;
  const Reduction& r = args.reduction;
  const Tiling& t = args.tiling;
  const cudaError_t error = with_pool<false>(image, args.radius, [&](auto kind) {
    for_groups(image, [&](unsigned groups, int64_t first) {
      const dim3 grid(r.channel_blocks, r.parts, groups);
      reduce_kernel<typename decltype(kind)::type><<<grid, r.threads, 0, stream>>>(args, first);
    });
  });
  if (error != cudaSuccess) return error;
  return with_pool<true>(image, args.radius, [&](auto kind) {
    for_groups(image, [&](unsigned groups, int64_t first) {
      const dim3 grid(t.lane_blocks, t.row_blocks, groups);
      apply_kernel<typename decltype(kind)::type><<<grid, t.threads, 0, stream>>>(args, first);
    });
  });
}

cudaError_t through_planes(const PoolMixerBackwardArgs& args, cudaStream_t stream) {
  const Image& image = args.image;
  const Planes p = choose_planes(image);
  const cudaError_t error = with_plane_pool<false>(image, args.radius, [&](auto kind) {
    using Pool = typename decltype(kind)::type;
    const int bytes = plane_bytes<typename Pool::Type>(image, p, 1, Pool::kStaged);
    const int with_sums = bytes + p.lanes * static_cast<int>(sizeof(float));
    for_groups(image, [&](unsigned groups, int64_t first) {
      const dim3 grid(p.tiles, 1, groups);
      reduce_planes_kernel<Pool><<<grid, p.threads, with_sums, stream>>>(args, p, first);
    });
  });
  if (error != cudaSuccess) return error;
  return with_plane_pool<true>(image, args.radius, [&](auto kind) {
    using Pool = typename decltype(kind)::type;
    const int bytes = plane_bytes<typename Pool::Type>(image, p, 1, Pool::kStaged);
    for_groups(image, [&](unsigned groups, int64_t first) {
      const dim3 grid(p.tiles, 1, groups);
      apply_planes_kernel<Pool><<<grid, p.threads, bytes, stream>>>(args, p, first);
    });
  });
}

}  // namespace

cudaError_t pool_mixer_backward(const PoolMixerBackwardArgs& args, cudaStream_t stream) {
  const cudaError_t error =
      args.image.in_planes() ? through_planes(args, stream) : through_lanes(args, stream);
  if (error != cudaSuccess || args.channel_sums == nullptr) return error;
  return with_type(args.image.dtype, [&](auto value) {
    parameters_kernel<decltype(value)>
        <<<ceil_div(args.image.channels, kSummedChannels), kSummingWarps * kWarp, 0, stream>>>(
            args);
  });
}

}  // namespace poolformer::cuda

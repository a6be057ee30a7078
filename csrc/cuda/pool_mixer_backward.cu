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
    reduce_kernel(PoolMixerBackwardArgs args) {
  using T = typename Pool::Type;
  constexpr int V = Pool::kVector;
  const Image& image = args.image;
  const Reduction& r = args.reduction;
  const ReductionPlace place = place_of(image, r, blockIdx.x, threadIdx.x);
  const float mean = __ldg(args.saved + place.image_group * 2);
  const int first = place.part * r.steps, end = min(first + r.steps, image.height);
  float products[V] = {};
  if (place.inside) {
    const Lane<T, V> dy(image, args.dy, place.offset, 0);
    for (int column = place.column; column < image.width; column += r.columns) {
      Pool pool({image, args.x, place.offset, column}, args.radius);
      pool.prefetch(first, end);
      pool.begin(first, mean);
      for (int row = first; row < end; ++row) {
        float g[V], pooled[V], own[V];
        const Pack<T, V> raw = dy.at(row, column);
        pool.next(row, pooled, own);
        unpack(raw, g);
#pragma unroll
        for (int i = 0; i < V; ++i) products[i] += g[i] * (pooled[i] - (own[i] - mean));
      }
    }
  }

  __shared__ float sums[kThreads * V], slots[1][kMostWarps];
  sum_columns(r, place, products, sums);
  const float k = image_factor<T>(args.parameters, place.image);
  const float factor = k * __ldg(args.saved + place.image_group * 2 + 1);
  float* row = args.channel_sums + (place.image * r.parts + place.part) * image.channels;
  float t[1] = {0.f};
  for (int c = threadIdx.x; c < place.last - place.first_channel; c += blockDim.x) {
    const int channel = place.first_channel + c;
    float scale[1];
    branch_scale<T>(args.parameters, k, channel, scale);
    row[channel] = factor * sums[c];
    t[0] += scale[0] * sums[c];
  }
  block_sum(t, slots);
  if (threadIdx.x == 0) args.group_sums[place.image_group * r.blocks() + place.tile] = t[0];
}

template <class Pool>
__global__ void __launch_bounds__(kThreads, kBlocks) apply_kernel(PoolMixerBackwardArgs args) {
  using T = typename Pool::Type;
  constexpr int V = Pool::kVector;
  const Image& image = args.image;
  const Place place = place_of(image, args.tiling, gridDim.x - 1 - blockIdx.x, threadIdx.x);
  Pool pool({image, args.dy, place.offset - place.column * image.column_stride(), place.column},
            args.radius);
  pool.prefetch(place.row, place.end);
  float totals[1];
  const int partials = args.reduction.blocks();
  group_totals(args.group_sums + place.image_group * partials, partials, totals);
  const float mean = __ldg(args.saved + place.image_group * 2);
  const float rstd = __ldg(args.saved + place.image_group * 2 + 1);
  const float along_x = totals[0] * rstd * rstd * rstd / static_cast<float>(image.group_size());
  float scale[V];
  branch_scale<T>(args.parameters, rstd * image_factor<T>(args.parameters, place.image),
                  place.channel, scale);

  const T* x = static_cast<const T*>(args.x) + place.offset;
  T* dx = static_cast<T*>(args.dx) + place.offset;
  pool.begin(place.row, 0.f);
  for (int row = place.row; row < place.end; ++row) {
    float pooled[V], g[V], values[V];
    const Pack<T, V> raw = load<V>(x + row * image.row_stride());
    pool.next(row, pooled, g);
    unpack(raw, values);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      values[i] = g[i] + scale[i] * (pooled[i] - g[i]) - along_x * (values[i] - mean);
    }
    if (place.inside) store(dx + row * image.row_stride(), rounded<T>(values));
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
  const int64_t groups = image.batch * image.groups;
  if (image.batch > 0) {
    cudaError_t error =
        with_pool<false>(image.dtype, args.reduction.vector, args.radius, [&](auto kind) {
          using Pool = typename decltype(kind)::type;
          const auto blocks = static_cast<unsigned>(groups * args.reduction.blocks());
          reduce_kernel<Pool><<<blocks, args.reduction.threads, 0, stream>>>(args);
        });
    if (error != cudaSuccess) return error;
    error = with_pool<true>(image.dtype, args.tiling.vector, args.radius, [&](auto kind) {
      using Pool = typename decltype(kind)::type;
      const auto blocks = static_cast<unsigned>(groups * args.tiling.blocks());
      apply_kernel<Pool><<<blocks, args.tiling.threads, 0, stream>>>(args);
    });
    if (error != cudaSuccess) return error;
  }
  return with_type(image.dtype, [&](auto value) {
    parameters_kernel<decltype(value)>
        <<<ceil_div(image.channels, kSummedChannels), kSummingWarps * kWarp, 0, stream>>>(args);
  });
}

}  // namespace poolformer::cuda

// Gradients of the MLP's parameters from their parts. Symbols: see mlp_weight_gradients.cu.
#include "mlp_tile.cuh"
#include "moments.cuh"

namespace poolformer::cuda {
namespace mlp {
namespace {

constexpr int kUnits = 32, kChannels = 8;  // of a block of weights: a warp a channel
constexpr int kVectorWarps = 8;

// dW1, db1, dW2 from all parts; parts of dgamma, dbeta and dls. Grid: tiles of kUnits units, tiles
// of kChannels channels.
__global__ void __launch_bounds__(kUnits* kChannels)
    weights_kernel(const __grid_constant__ MlpBackward a) {
  __shared__ float of_x[kChannels][kUnits + 4], unit_sums[kUnits];
  __shared__ float2 warp_sums[kChannels][kChannels];
  const MlpShape& s = a.shape;
  const MlpParameters& p = a.parameters;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t size = static_cast<int64_t>(s.channels) * s.hidden;
  {
    const int unit = blockIdx.x * kUnits + lane, channel = blockIdx.y * kChannels + warp;
    const bool there = unit < s.hidden && channel < s.channels;
    const int64_t at = static_cast<int64_t>(channel) * s.hidden + unit;
    float e = 0, d = 0;
    if (there) {
      const float* from = a.products + at;
#pragma unroll 8
      for (int part = 0; part < a.split.parts; ++part, from += 2 * size) {
        e += __ldg(from);
        d += __ldg(from + size);
      }
      store(a.fc2_weight, at, d * load(p.layer_scale, channel, 1.f));
      d *= load(Vector{p.fc2_weight, s.product_dtype}, at, 0.f);
    }
    of_x[warp][lane] = e;
    d = sum_of_lanes(d);
    if (lane == 0 && channel < s.channels) {
      a.vector_parts[(static_cast<int64_t>(blockIdx.x) * 3 + 2) * s.channels + channel] = d;
    }
    if (warp == 0) {
      float sum = 0;
      if (unit < s.hidden) {
#pragma unroll 8
        for (int part = 0; part < a.split.parts; ++part) {
          sum += __ldg(a.unit_sums + static_cast<int64_t>(part) * s.hidden + unit);
        }
        if (blockIdx.y == 0) store(a.fc1_bias, unit, sum);
      }
      unit_sums[lane] = sum;
    }
  }
  __syncthreads();
  const int local_channel = threadIdx.x % kChannels, local_unit = threadIdx.x / kChannels;
  const int channel = blockIdx.y * kChannels + local_channel;
  const int unit = blockIdx.x * kUnits + local_unit;
  const float e = of_x[local_channel][local_unit], sum = unit_sums[local_unit];
  float2 of_norm = {};
  if (unit < s.hidden && channel < s.channels) {
    const int64_t at = static_cast<int64_t>(unit) * s.channels + channel;
    const float weight = load(Vector{p.fc1_weight, s.product_dtype}, at, 0.f);
    store(a.fc1_weight, at,
          fmaf(e, load(p.norm_weight, channel, 1.f), sum * load(p.norm_bias, channel, 0.f)));
    of_norm = make_float2(weight * e, weight * sum);
  }
#pragma unroll
  for (int step = kWarp / 2; step >= kChannels; step /= 2) {
    of_norm.x += __shfl_down_sync(0xffffffffu, of_norm.x, step);
    of_norm.y += __shfl_down_sync(0xffffffffu, of_norm.y, step);
  }
  if (lane < kChannels) warp_sums[warp][lane] = of_norm;
  __syncthreads();
  if (threadIdx.x < kChannels && channel < s.channels) {
    of_norm = warp_sums[0][threadIdx.x];
#pragma unroll
    for (int i = 1; i < kChannels; ++i) {
      of_norm.x += warp_sums[i][threadIdx.x].x;
      of_norm.y += warp_sums[i][threadIdx.x].y;
    }
    float* to = a.vector_parts + static_cast<int64_t>(blockIdx.x) * 3 * s.channels + channel;
    to[0] = of_norm.x;
    to[s.channels] = of_norm.y;
  }
}

// dgamma, dbeta, db2, dls from their parts. A lane a channel.
__global__ void __launch_bounds__(kVectorWarps* kWarp)
    vectors_kernel(const __grid_constant__ MlpBackward a) {
  __shared__ float slots[4][kVectorWarps][kWarp];
  const MlpShape& s = a.shape;
  const MlpParameters& p = a.parameters;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int channel = blockIdx.x * kWarp + lane, tiles = (s.hidden - 1) / kUnits + 1;
  float sums[4] = {};
  if (channel < s.channels) {
#pragma unroll 4
    for (int tile = warp; tile < tiles; tile += kVectorWarps) {
      const float* from = a.vector_parts + static_cast<int64_t>(tile) * 3 * s.channels + channel;
#pragma unroll
      for (int i = 0; i < 3; ++i) sums[i] += __ldg(from + static_cast<int64_t>(i) * s.channels);
    }
#pragma unroll 4
    for (int part = warp; part < a.split.parts; part += kVectorWarps) {
      sums[3] += __ldg(a.channel_sums + static_cast<int64_t>(part) * s.channels + channel);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) slots[i][warp][lane] = sums[i];
  __syncthreads();
  if (warp > 0 || channel >= s.channels) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int w = 1; w < kVectorWarps; ++w) sums[i] += slots[i][w][lane];
  }
  store(a.norm_weight, channel, sums[0]);
  store(a.norm_bias, channel, sums[1]);
  store(a.fc2_bias, channel, sums[3] * load(p.layer_scale, channel, 1.f));
  store(a.layer_scale, channel, fmaf(load(p.fc2_bias, channel, 0.f), sums[3], sums[2]));
}

}  // namespace
}  // namespace mlp

int64_t mlp_vector_parts(int64_t hidden) { return (hidden - 1) / mlp::kUnits + 1; }

cudaError_t mlp_sum_parts(const MlpBackward& a, cudaStream_t stream) {
  const MlpShape& s = a.shape;
  const dim3 grid(static_cast<unsigned>(mlp_vector_parts(s.hidden)),
                  (s.channels - 1) / mlp::kChannels + 1);
  mlp::weights_kernel<<<grid, mlp::kUnits * mlp::kChannels, 0, stream>>>(a);
  if (cudaError_t e = cudaGetLastError(); e != cudaSuccess) return e;
  mlp::vectors_kernel<<<(s.channels - 1) / kWarp + 1, mlp::kVectorWarps * kWarp, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace poolformer::cuda

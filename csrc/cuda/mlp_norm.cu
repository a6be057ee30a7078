// The norm's part of the MLP where no kernel with products does it. Symbols: see mlp_backward.cu.
#include "mlp_tile.cuh"
#include "moments.cuh"

namespace poolformer::cuda {
namespace mlp {
namespace {

constexpr int kFoldWarps = 8;
constexpr int kNormThreads = 256;

// saved of each image and group. Grid: as many warps.
__global__ void merge_saved_kernel(const __grid_constant__ MlpForward a) {
  const int64_t i = blockIdx.x;
  const float2 norm = merge_partials(a.stats + i * a.partials * 3, a.partials, a.eps, threadIdx.x);
  if (threadIdx.x == 0) {
    a.saved[2 * i] = norm.x;
    a.saved[2 * i + 1] = norm.y;
  }
}

// merged: (count, mean, M2) of each image and group. Grid: as many warps.
__global__ void merge_moments_kernel(const float* stats, int partials, float* merged) {
  const int64_t i = blockIdx.x;
  stats += i * partials * 3;
  Moments own;
  for (int part = threadIdx.x; part < partials; part += kWarp) {
    own.merge({stats[3 * part], stats[3 * part + 1], stats[3 * part + 2]});
  }
  own = merge_lanes(own);
  if (threadIdx.x == 0) store_merged(merged + 3 * i, &own, 1);
}

// folded: w~, b~. A warp a hidden unit.
__global__ void fold_kernel(const __grid_constant__ MlpBackward a) {
  const MlpShape& s = a.shape;
  const MlpParameters& p = a.parameters;
  const int lane = threadIdx.x % kWarp, unit = blockIdx.x * kFoldWarps + threadIdx.x / kWarp;
  if (unit >= s.hidden) return;
  const Vector weight = {p.fc1_weight, s.product_dtype};
  float scaled = 0, shifted = 0;
  for (int c = lane; c < s.channels; c += kWarp) {
    const float w = load(weight, static_cast<int64_t>(unit) * s.channels + c, 0.f);
    scaled = fmaf(w, load(p.norm_weight, c, 1.f), scaled);
    shifted = fmaf(w, load(p.norm_bias, c, 0.f), shifted);
  }
  scaled = sum_of_lanes(scaled);
  shifted = sum_of_lanes(shifted);
  if (lane == 0) {
    a.folded[unit] = scaled;
    a.folded[s.hidden + unit] = shifted + load(p.fc1_bias, unit, 0.f);
  }
}

// dx from gamma dn, in its place. A block an image and group.
__global__ void __launch_bounds__(kNormThreads)
    norm_gradient_kernel(const __grid_constant__ MlpBackward a) {
  __shared__ float2 warp_sums[kNormThreads / kWarp];
  const MlpShape& s = a.shape;
  const Vector x = {a.x, s.dtype}, dz = {a.dz, s.dtype};
  const Gradient dx = {a.dx, s.dtype};
  const int group_channels = s.channels / s.groups, size = s.rows * group_channels;
  const int first = blockIdx.x % s.groups * group_channels;
  const int64_t start = static_cast<int64_t>(blockIdx.x / s.groups) * s.rows * s.channels;
  const float mean = a.saved[2 * static_cast<int64_t>(blockIdx.x)];
  const float rstd = a.saved[2 * static_cast<int64_t>(blockIdx.x) + 1];
  const auto index_of = [&](int i) {
    return start + (s.channels_last ? i / group_channels * s.channels + first + i % group_channels
                                    : first * s.rows + i);
  };
  float2 sums = {};
  for (int i = threadIdx.x; i < size; i += kNormThreads) {
    const int64_t at = index_of(i);
    const float gradient = read(dx, at);
    sums.x += gradient;
    sums.y = fmaf(gradient, (load(x, at, 0.f) - mean) * rstd, sums.y);
  }
  sums = make_float2(sum_of_lanes(sums.x), sum_of_lanes(sums.y));
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sums;
  __syncthreads();
  sums = {};
#pragma unroll
  for (int i = 0; i < kNormThreads / kWarp; ++i) {
    sums.x += warp_sums[i].x;
    sums.y += warp_sums[i].y;
  }
  const float along_one = sums.x / static_cast<float>(size);
  const float along_x = sums.y / static_cast<float>(size) * rstd;
  for (int i = threadIdx.x; i < size; i += kNormThreads) {
    const int64_t at = index_of(i);
    const float rest = read(dx, at) - along_one - (load(x, at, 0.f) - mean) * along_x;
    store(dx, at, fmaf(rest, rstd, load(dz, at, 0.f)));
  }
}

}  // namespace
}  // namespace mlp

cudaError_t mlp_merge_saved(const MlpForward& a, cudaStream_t stream) {
  const int64_t image_groups = a.shape.batch * a.shape.groups;
  mlp::merge_saved_kernel<<<static_cast<unsigned>(image_groups), kWarp, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t mlp_merge_statistics(const float* stats, int partials, int64_t image_groups,
                                 float* merged, cudaStream_t stream) {
  mlp::merge_moments_kernel<<<static_cast<unsigned>(image_groups), kWarp, 0, stream>>>(
      stats, partials, merged);
  return cudaGetLastError();
}

cudaError_t mlp_fold(const MlpBackward& a, cudaStream_t stream) {
  const int blocks = (a.shape.hidden - 1) / mlp::kFoldWarps + 1;
  mlp::fold_kernel<<<blocks, mlp::kFoldWarps * kWarp, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t mlp_norm_gradient(const MlpBackward& a, cudaStream_t stream) {
  const int64_t image_groups = a.shape.batch * a.shape.groups;
  mlp::norm_gradient_kernel<<<static_cast<unsigned>(image_groups), mlp::kNormThreads, 0, stream>>>(
      a);
  return cudaGetLastError();
}

}  // namespace poolformer::cuda

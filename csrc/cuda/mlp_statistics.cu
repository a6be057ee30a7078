// Partial statistics of the MLP's input and result, merged where no other kernel does it.
#include <cuda_runtime.h>

#include "mlp.h"
#include "moments.cuh"

namespace poolformer::cuda {
namespace mlp {
namespace {

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

}  // namespace poolformer::cuda

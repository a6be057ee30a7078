#include "probe.h"

#include <algorithm>

namespace poolformer::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1024;

__global__ void probe_kernel(int32_t* out, int64_t n) {
#ifdef __CUDA_ARCH__
  constexpr int32_t kArch = __CUDA_ARCH__ / 10;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    out[i] = static_cast<int32_t>(i) + kArch;
  }
#endif
}

}  // namespace

cudaError_t probe(int32_t* out, int64_t n, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const int64_t blocks = std::min((n + kThreads - 1) / kThreads, kMaxBlocks);
  probe_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(out, n);
  return cudaGetLastError();
}

}  // namespace poolformer::cuda

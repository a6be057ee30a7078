#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace poolformer::cuda {

// out[i] = i + the architecture that the kernel was compiled for (80 for sm_80). Shows that the
// device runs this build's code, and which of it. out: n values on the current device.
cudaError_t probe(int32_t* out, int64_t n, cudaStream_t stream);

}  // namespace poolformer::cuda

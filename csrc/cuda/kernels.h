// What bindings.cpp calls. No PyTorch in here. Tensors are dense; those of images lie on 16 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include "planes.h"

namespace poolformer::cuda {

// Per-channel vectors and per-image factors may be null: 1, or for `bias` 0.
struct Parameters {
  const void *norm_weight, *layer_scale;  // (channels), the image's dtype
  const void* drop_path;                  // (batch)
  bool drop_path_is_float;                // else it has the image's dtype
};

// The architecture that the code which runs on the current device was compiled for, such as 80 for
// sm_80 and compute_80; 0 where none of this build's runs there.
int architecture();

// stats: (batch, groups, statistics_partials(image), 3) of x.
int statistics_partials(const Image& image);
cudaError_t statistics(const Image& image, const void* x, float* stats, cudaStream_t stream);

// The launches return the first error of a launch; a batch of 0 is launched nothing for.
struct PoolMixerArgs {
  Image image;
  Tiling tiling;
  const void* x;
  void* y;
  const float* stats;  // (batch, groups, partials, 3)
  int partials, radius;
  float eps;
  Parameters parameters;
  float* saved;      // (batch, groups, 2)
  float* stats_out;  // (batch, groups, result_partials(image), 3) of y, or null
};
cudaError_t pool_mixer(const PoolMixerArgs& args, cudaStream_t stream);

struct PoolMixerBackwardArgs {
  Image image;
  Tiling tiling;
  Reduction reduction;
  const void *dy, *x;
  void* dx;
  const float* saved;
  int radius;
  Parameters parameters;
  float* channel_sums;  // (batch, reduction.parts, channels), or null: there is one row
  float* group_sums;    // (batch, groups, reduction.blocks())
  void *dnorm_weight, *dlayer_scale;
};
cudaError_t pool_mixer_backward(const PoolMixerBackwardArgs& args, cudaStream_t stream);

struct GroupNormArgs {
  Image image;
  const void* x;
  void* y;
  const float* stats;
  int partials;
  float eps;
  const void *weight, *bias;
  float* saved;
};
cudaError_t group_norm(const GroupNormArgs& args, cudaStream_t stream);

struct GroupNormBackwardArgs {
  Image image;
  Reduction reduction;
  const void *dy, *x;
  void* dx;
  const float* saved;
  const void* weight;
  float* channel_sums;  // (2, batch, reduction.parts, channels): of g·x̂ and of g; or null: one row
  float* group_sums;    // (batch, groups, reduction.blocks(), 2)
  void *dweight, *dbias;
};
cudaError_t group_norm_backward(const GroupNormBackwardArgs& args, cudaStream_t stream);

}  // namespace poolformer::cuda

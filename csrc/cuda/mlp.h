// The MLP's half of a block on GPUs: z = x + k ls (ka act(GN(x) W1^T + b1) W2^T + b2).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../math.h"
#include "layout.h"

namespace poolformer::cuda {

// A parameter of one element a channel, hidden unit or image; no data where there is none.
struct Vector {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
};

// All tensors are dense and start at multiples of 16 bytes. Those of x's shape are (B, C, H, W) in
// `dtype`, in x's memory format. fc1_weight: (hidden, C), fc2_weight: (C, hidden), in
// `product_dtype`, which is `dtype` or, beside float32, bfloat16 or float16.
struct MlpShape {
  int64_t batch;
  int rows;  // pixels of an image
  int channels, hidden, groups;
  bool channels_last;
  Dtype dtype, product_dtype;
  Activation act;
  bool tf32;  // whether products of float32 may round their operands
};

struct MlpParameters {
  Vector norm_weight, norm_bias, fc1_bias, fc2_bias, layer_scale;
  Vector drop_path, hidden_drop_path;
  const void *fc1_weight, *fc2_weight;
};

struct MlpForward {
  MlpShape shape;
  MlpParameters parameters;
  const void* x;
  const float* stats;  // (B, G, partials, 3): count, mean, M2 of x
  int partials;
  float eps;
  float* saved;     // (B, G, 2): mean and 1 / std of x
  void* activated;  // (B rows, mlp_hidden_stride) in product_dtype if not mlp_is_fused
  void* hidden;     // (B rows, hidden) in product_dtype, or null
  void* z;
  float* stats_out;  // (B, 1, mlp_partials, 3) of z, or null, as always with several groups
};

// Whether one kernel does it all. A function of what decides the number of partial statistics.
bool mlp_is_fused(int64_t channels, int64_t groups, int64_t product_bytes);

// P of the (B, G, P, 3) statistics of z.
int64_t mlp_partials(int64_t rows, int64_t channels, int64_t groups, int64_t product_bytes);

// Each row of `partials` partial statistics to one: (image_groups, 3).
cudaError_t mlp_merge_statistics(const float* stats, int partials, int64_t image_groups,
                                 float* merged, cudaStream_t stream);

// Elements from one row of `activated` to the next.
int64_t mlp_hidden_stride(int64_t hidden);

// Of x, unless mlp_is_fused.
int64_t mlp_most_channels();

cudaError_t mlp_forward(const MlpForward& arguments, cudaStream_t stream);

// The two for mlp_is_fused alone.
int64_t mlp_fused_partials(int64_t rows);
cudaError_t mlp_fused_forward(const MlpForward& arguments, cudaStream_t stream);

// `saved` from `stats`, of each image and group.
cudaError_t mlp_merge_saved(const MlpForward& arguments, cudaStream_t stream);

// As Vector, to be written.
struct Gradient {
  void* data;
  Dtype dtype;
};

// How the sums over all rows are shared out: `blocks` blocks of rows, `a_part` of them to a part.
struct MlpSplit {
  int blocks, a_part, parts;
};

struct MlpBackward {
  MlpShape shape;
  MlpParameters parameters;
  const void *dz, *x;
  const float* saved;         // (B, G, 2): mean and 1 / std of x
  const void* hidden;         // (B rows, hidden) in product_dtype, or null: recomputed from x
  void *activated, *dhidden;  // (B rows, mlp_hidden_stride) in product_dtype
  float* folded;              // (2, hidden), or null with several groups
  float* norm_sums;           // (B, norm_parts, 2), or null with several groups
  int norm_parts;             // mlp_norm_parts
  MlpSplit split;
  float* products;      // (parts, 2, C, hidden)
  float* unit_sums;     // (parts, hidden)
  float* channel_sums;  // (parts, C)
  float* vector_parts;  // (mlp_vector_parts, 3, C)
  void* dx;
  Gradient norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale;
};

int mlp_norm_parts(const MlpShape& shape);
int64_t mlp_vector_parts(int64_t hidden);
MlpSplit mlp_split(const MlpShape& shape);

// dx, and activated and dhidden of which mlp_weight_gradients makes the other gradients.
cudaError_t mlp_input_gradient(const MlpBackward& arguments, cudaStream_t stream);
cudaError_t mlp_weight_gradients(const MlpBackward& arguments, cudaStream_t stream);

// Steps of these two: `folded`; dx from gamma dn, with several groups; all gradients from parts.
cudaError_t mlp_fold(const MlpBackward& arguments, cudaStream_t stream);
cudaError_t mlp_norm_gradient(const MlpBackward& arguments, cudaStream_t stream);
cudaError_t mlp_sum_parts(const MlpBackward& arguments, cudaStream_t stream);

}  // namespace poolformer::cuda

// What csrc/bindings.cpp calls: one table of kernels per instruction set. No PyTorch in here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace poolformer {
enum class Activation : int;  // see math.h
}

namespace poolformer::cpu {

constexpr Activation kReluSquared{4};  // of the CPU alone: max(x, 0)^2

enum class Dtype { kFloat32, kBFloat16, kFloat16, kFloat64 };

// A (batch, channels, height, width) tensor, contiguous or channels_last.
struct Image {
  const void* data;
  Dtype dtype;
  bool channels_last;
  int64_t batch, channels, height, width, groups;

  int64_t pixels() const { return height * width; }
  int64_t group_channels() const { return channels / groups; }
};

// Statistics of `count` values; m2 is the sum of (value - mean)^2.
struct Partial {
  double count = 0, mean = 0, m2 = 0;
};

// Merges b into a (Chan, Golub and LeVeque 1983).
static inline void merge(Partial& a, const Partial& b) {
  if (b.count == 0) return;
  double count = a.count + b.count, delta = b.mean - a.mean;
  a.mean += delta * (b.count / count);
  a.m2 += b.m2 + delta * delta * (a.count * b.count / count);
  a.count = count;
}

// Statistics of an image as (batch, groups, chunks) partials; a task is one chunk.
struct StatisticsArgs {
  Image in;
  int64_t chunks;
  Partial* partials;
};

struct GroupNormArgs {
  Image in;
  void* out;
  const void *weight, *bias;  // (channels) or null
  const double *mean, *rstd;  // (batch, groups)
  int64_t tasks;              // per image
};

struct PoolMixerArgs {
  Image in;
  void* out;
  const void *norm_weight, *layer_scale;  // (channels) or null
  const double* drop_path;                // (batch) or null
  const double *mean, *rstd;              // (batch, groups)
  int64_t pool_size;
  int64_t tasks;      // per image
  int64_t slots;      // per image and group
  Partial* partials;  // (batch, groups, slots) of the output, or null
};

struct GroupNormBackwardArgs {
  Image in;  // x
  const void* dy;
  bool accumulated;      // dy has the accumulation type, else x's
  const void* residual;  // what is added to dx, or null
  void* out;             // dx
  const double* mean;    // (batch, groups)
  // dx = scale dy + slope (x - mean) + offset: scale (batch, channels), the others (batch, groups).
  const double *scale, *slope, *offset;
  int64_t tasks;  // per image
  int64_t parts;  // of the sums of an image
  double* sums;   // (batch, parts, 2, channels), of dy and of dy (x - mean)
};

struct PoolMixerBackwardArgs {
  Image in;  // x
  const void* dy;
  void* out;           // dx
  const double* mean;  // (batch, groups)
  // dx = dy + gain (P' dy - dy) - slope (x - mean): gain (batch, channels), slope (batch, groups).
  const double *gain, *slope;
  int64_t pool_size;
  int64_t tasks;   // per image
  int64_t strips;  // of an image
  double* sums;    // (batch, strips, channels), of (P' dy - dy) (x - mean)
};

struct MlpArgs {
  Image in;
  void* out;
  bool rounded_weights;  // float32 x and weights: products and `kept` are of bfloat16, natively
  const void *norm_weight, *norm_bias;         // (channels) or null
  const double *mean, *rstd;                   // (batch, groups)
  const void* fc1_weight;                      // (hidden, channels)
  const void* fc1_bias;                        // (hidden) or null
  const void* fc2_weight;                      // (channels, hidden)
  const void* fc2_bias;                        // (channels) or null
  const void* layer_scale;                     // (channels) or null
  const double *drop_path, *hidden_drop_path;  // (batch) or null
  Activation activation;
  int64_t hidden;
  void* kept;  // (batch * pixels, hidden), fc1's result, or null
  int64_t threads;
  // Set by mlp_plan. Pixels of all images in a row make panels. Where there are enough for all
  // threads, a task is a tile of them and takes the hidden in chunks. Else tiles is 0 and the two
  // products are phases: a task is a block of a weight's rows, and threads share what lies between.
  int64_t panels, tiles, chunk, slots, fc1_blocks, fc2_blocks;
  size_t shared_bytes;
  void* shared;       // GN(x), the hidden and fc2's sums of all panels, null with tiles
  Partial* partials;  // (batch, groups, slots) of the output, or null
};

struct MlpBackwardArgs {
  Image in;  // x
  const void* dz;
  bool rounded_weights;                        // as in MlpArgs
  const void* kept;                            // (batch * pixels, hidden), fc1's result, or null
  const void *norm_weight, *norm_bias;         // (channels) or null
  const double *mean, *rstd;                   // (batch, groups)
  const void* fc1_weight;                      // (hidden, channels)
  const void* fc1_bias;                        // (hidden) or null
  const void* fc2_weight;                      // (channels, hidden)
  const void* layer_scale;                     // (channels) or null
  const double *drop_path, *hidden_drop_path;  // (batch) or null
  Activation activation;
  int64_t hidden;
  void *fc1_gradient, *fc1_bias_gradient, *fc2_gradient;  // like the parameters
  // Set by mlp_backward_plan. A task is one part of the pixels and one of the hidden channels.
  int64_t row_parts, hidden_parts, panels;
  size_t factors_bytes, parts_bytes, gradient_bytes;
  void* factors;        // the weights as the products read them
  void* parts;          // gradients of the weights and of fc1's bias, for each part of the pixels
  void* gradient;       // dn, like x in the accumulation type, for each part of the hidden
  double* column_sums;  // (row_parts, channels), of drop_path * dz
  double* scale_sums;   // (panels, channels), of fc2_weight times its unscaled gradient
};

struct PatchEmbedArgs {
  Image in, out;  // out.data is null
  void* y;
  const void* weight;                        // (out.channels, in.channels, kernel), dense
  bool weight_channels_last;                 // its memory is (out.channels, kernel, in.channels)
  const void* bias;                          // (out.channels) or null
  int64_t kernel[2], stride[2], padding[2];  // of height and width
  int64_t threads;
  // Set by patch_embed_plan. Output pixels make panels. Where there are enough for all threads, a
  // task is a tile of them; else tiles is 0, threads share the panels, and a task is a block of the
  // weight's rows.
  int64_t panels, tiles, blocks;
  size_t shared_bytes;
  void* shared;  // (panels, depth, lanes), null with tiles

  int64_t depth() const { return in.channels * kernel[0] * kernel[1]; }
  // Where a row of the weight has the channel c of a place in the window.
  int64_t place(int64_t tap, int64_t c) const {
    return weight_channels_last ? tap * in.channels + c : c * kernel[0] * kernel[1] + tap;
  }
};

struct PatchEmbedBackwardArgs {
  PatchEmbedArgs shape;   // of the forward; out is dy, and nothing is planned
  void* input_gradient;   // like x
  void* weight_gradient;  // like the weight
  // Set by patch_embed_backward_plan. dx: a task is one of the strips of an image's rows. The
  // weight's gradient: a task is a part of the output's pixels, a group of the window's rows
  // (`lines` of them) and a part of the output channels.
  int64_t panels, strips, columns, lines, groups, pixel_parts, channel_parts;
  bool in_place;  // products write the weight's gradient where it belongs
  size_t factors_bytes, sums_bytes;
  void* factors;        // the weight as products read it
  void* sums;           // the weight's gradient, for each part of the pixels
  double* column_sums;  // (pixel_parts, out.channels), of dy, added to
};

// Every function works on tasks [begin, end).
struct Kernels {
  const char* name;
  bool native_bf16;  // products of bfloat16 are taken without a conversion
  int64_t (*statistics_chunks)(const Image&);                             // per image and group
  void (*statistics)(const StatisticsArgs&, int64_t begin, int64_t end);  // batch * groups * chunks
  void (*group_norm_plan)(GroupNormArgs&);
  void (*group_norm)(const GroupNormArgs&, int64_t begin, int64_t end);  // batch * tasks
  void (*pool_mixer_plan)(PoolMixerArgs&);
  void (*pool_mixer)(const PoolMixerArgs&, int64_t begin, int64_t end);  // batch * tasks
  void (*group_norm_backward_plan)(GroupNormBackwardArgs&);
  void (*group_norm_backward_sums)(const GroupNormBackwardArgs&, int64_t begin, int64_t end);
  void (*group_norm_backward)(const GroupNormBackwardArgs&, int64_t begin, int64_t end);
  void (*pool_mixer_backward_plan)(PoolMixerBackwardArgs&);
  void (*pool_mixer_backward_sums)(const PoolMixerBackwardArgs&, int64_t begin, int64_t end);
  void (*pool_mixer_backward)(const PoolMixerBackwardArgs&, int64_t begin, int64_t end);
  void (*mlp_plan)(MlpArgs&);
  void (*mlp_tiles)(const MlpArgs&, int64_t begin, int64_t end);   // tiles; else the four phases:
  void (*mlp_pack)(const MlpArgs&, int64_t begin, int64_t end);    // panels
  void (*mlp_fc1)(const MlpArgs&, int64_t begin, int64_t end);     // fc1_blocks
  void (*mlp_fc2)(const MlpArgs&, int64_t begin, int64_t end);     // fc2_blocks
  void (*mlp_finish)(const MlpArgs&, int64_t begin, int64_t end);  // panels
  void (*mlp_backward_plan)(MlpBackwardArgs&);
  void (*mlp_backward_pack)(const MlpBackwardArgs&, int64_t begin, int64_t end);    // panels
  void (*mlp_backward)(const MlpBackwardArgs&, int64_t begin, int64_t end);         // parts * parts
  void (*mlp_backward_add)(const MlpBackwardArgs&, int64_t begin, int64_t end);     // batch
  void (*mlp_backward_finish)(const MlpBackwardArgs&, int64_t begin, int64_t end);  // panels
  void (*patch_embed_plan)(PatchEmbedArgs&);
  void (*patch_embed_tiles)(const PatchEmbedArgs&, int64_t begin, int64_t end);  // tiles; else:
  void (*patch_embed_pack)(const PatchEmbedArgs&, int64_t begin, int64_t end);   // panels
  void (*patch_embed_rows)(const PatchEmbedArgs&, int64_t begin, int64_t end);   // blocks
  void (*patch_embed_backward_plan)(PatchEmbedBackwardArgs&);
  // panels; batch * strips; parts * groups * parts; output channels
  void (*patch_embed_backward_pack)(const PatchEmbedBackwardArgs&, int64_t begin, int64_t end);
  void (*patch_embed_backward_input)(const PatchEmbedBackwardArgs&, int64_t begin, int64_t end);
  void (*patch_embed_backward_weight)(const PatchEmbedBackwardArgs&, int64_t begin, int64_t end);
  void (*patch_embed_backward_finish)(const PatchEmbedBackwardArgs&, int64_t begin, int64_t end);
};

extern const Kernels kernels_default, kernels_avx2, kernels_avx512, kernels_avx512_bf16;

// The table in use: the best this machine runs, or POOLFORMER_CPU_CAPABILITY, or what was set.
const Kernels& kernels();
std::vector<std::string> capabilities();       // best first
void set_capability(const std::string& name);  // throws std::invalid_argument
bool has_amx_bf16();     // PyTorch's products then run on matrix units, which no kernel here uses
bool has_native_fp16();  // PyTorch's products then run in float16, which no kernel here uses

// Memory of this thread, aligned to 64 bytes, valid until its next call with the same purpose. It
// is kept, so that a model that runs again asks the system for no memory.
enum class Scratch { kTask, kSums, kActivation, kCount };
void* scratch(size_t bytes, Scratch purpose = Scratch::kTask);
int64_t l2_bytes();

// Tasks that the backward of products is cut into where there is enough to cut: a power of two by
// the machine's cores (8 to 64) and not by threads, so that sums have one order. Tests set another
// number, 0 for the machine's.
int64_t backward_tasks();
void set_backward_tasks(int64_t tasks);

}  // namespace poolformer::cpu

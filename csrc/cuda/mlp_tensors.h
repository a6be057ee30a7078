// What the bindings of the MLP share: its parameters and their checks.
#pragma once

#include <string>
#include <vector>

#include "mlp.h"
#include "tensors.h"

namespace poolformer::cuda {

inline constexpr const char* kMlp = "mlp";

// A parameter, and the memory that holds it until the launch.
class Parameter {
 public:
  Parameter(const char* name, const OptionalTensor& t, int64_t size, const Tensor& x,
            const Tensor& weight) {
    if (!t) return;
    TORCH_CHECK_VALUE(t->numel() == size, kMlp, ": ", name, " has shape ", t->sizes(),
                      "; it needs (", size, ").");
    check_device(kMlp, name, *t, x);
    const auto type = t->scalar_type();
    TORCH_CHECK_TYPE(type == x.scalar_type() || type == weight.scalar_type() || type == at::kFloat,
                     kMlp, ": ", name, " is ", type, "; it has to be ", x.scalar_type(),
                     " as x, or as fc1_weight. Convert it with .to(dtype).");
    dense_ = t->contiguous();
    vector_ = {dense_.const_data_ptr(), dtype_of(dense_)};
  }
  operator Vector() const { return vector_; }

 private:
  Tensor dense_;
  Vector vector_;
};

// x itself, if the kernels take it and weights of these shapes and dtypes.
inline const Tensor& checked_mlp(const Tensor& x, const Tensor& w1, const Tensor& w2,
                                 int64_t num_groups, double eps) {
  check_input(kMlp, x, num_groups, eps);
  const int64_t channels = x.size(1), hidden = w1.dim() >= 2 ? w1.size(0) : 0;
  TORCH_CHECK_VALUE(hidden > 0, kMlp, ": fc1_weight has shape ", w1.sizes(),
                    "; it has to be (hidden, C) with hidden >= 1.");
  TORCH_CHECK_VALUE(hidden * channels < kIndexLimit, kMlp, ": fc1_weight has ", hidden * channels,
                    " elements; the CUDA kernels index fewer than ", kIndexLimit,
                    ". Use backend='torch'.");
  TORCH_CHECK_VALUE(
      w1.numel() == hidden * channels && w2.numel() == hidden * channels && w2.size(0) == channels,
      kMlp, ": fc1_weight has shape ", w1.sizes(), " and fc2_weight ", w2.sizes(), "; x of shape ",
      x.sizes(), " needs (hidden, ", channels, ") and (", channels, ", hidden).");
  check_device(kMlp, "fc1_weight", w1, x);
  check_device(kMlp, "fc2_weight", w2, x);
  const auto type = w1.scalar_type();
  const bool mixed = x.scalar_type() == at::kFloat && (type == at::kBFloat16 || type == at::kHalf);
  TORCH_CHECK_TYPE(w2.scalar_type() == type && (type == x.scalar_type() || mixed), kMlp, ": x is ",
                   x.scalar_type(), ", fc1_weight ", type, ", fc2_weight ", w2.scalar_type(),
                   "; the weights have to be of x's dtype or, if that is float32, of bfloat16 or "
                   "float16. Convert them with .to(dtype).");
  return x;
}

inline void check_mlp_channels(int64_t channels) {
  TORCH_CHECK_VALUE(channels <= mlp_most_channels(), kMlp, ": x has ", channels,
                    " channels; the CUDA kernels take at most ", mlp_most_channels(),
                    ". Use backend='triton' or 'torch'.");
}

// The kept hidden as the kernels read it.
inline Tensor checked_hidden(const Tensor& hidden, const MlpShape& s, const Tensor& weight) {
  TORCH_CHECK_VALUE(hidden.numel() == s.batch * s.rows * s.hidden, kMlp, ": hidden has shape ",
                    hidden.sizes(), "; it has to be (", s.batch, ", H, W, ", s.hidden,
                    "), what the forward returned.");
  TORCH_CHECK_TYPE(hidden.scalar_type() == weight.scalar_type(), kMlp, ": hidden is ",
                   hidden.scalar_type(), "; it has to be ", weight.scalar_type(),
                   " as fc1_weight.");
  check_device(kMlp, "hidden", hidden, weight);
  return dense(hidden);
}

// What is the same forward and backward, and the memory that holds it until the launch.
struct MlpInputs {
  MlpShape shape{};
  MlpParameters parameters;

  MlpInputs(const Input& in, const Tensor& x, const OptionalTensor& norm_weight,
            const OptionalTensor& norm_bias, const Tensor& fc1_weight,
            const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
            const OptionalTensor& fc2_bias, const OptionalTensor& layer_scale,
            const OptionalTensor& drop_path, const OptionalTensor& hidden_drop_path,
            const std::string& act)
      : weights_{dense(fc1_weight), dense(fc2_weight)} {
    shape.batch = in.image.batch, shape.rows = in.image.pixels();
    shape.channels = in.image.channels, shape.hidden = static_cast<int>(fc1_weight.size(0));
    shape.groups = in.image.groups, shape.channels_last = in.image.channels_last;
    shape.dtype = in.image.dtype, shape.product_dtype = dtype_of(fc1_weight);
    shape.act = activation_of(kMlp, act), shape.tf32 = at::globalContext().allowTF32CuBLAS();
    const auto add = [&](const char* name, const OptionalTensor& t, int64_t size) {
      return Vector(vectors_.emplace_back(name, t, size, x, fc1_weight));
    };
    parameters.norm_weight = add("norm_weight", norm_weight, shape.channels);
    parameters.norm_bias = add("norm_bias", norm_bias, shape.channels);
    parameters.fc1_bias = add("fc1_bias", fc1_bias, shape.hidden);
    parameters.fc2_bias = add("fc2_bias", fc2_bias, shape.channels);
    parameters.layer_scale = add("layer_scale", layer_scale, shape.channels);
    parameters.drop_path = add("drop_path", drop_path, shape.batch);
    parameters.hidden_drop_path = add("hidden_drop_path", hidden_drop_path, shape.batch);
    parameters.fc1_weight = weights_[0].const_data_ptr();
    parameters.fc2_weight = weights_[1].const_data_ptr();
  }

 private:
  Tensor weights_[2];
  std::vector<Parameter> vectors_;
};

inline Gradient gradient_of(const Tensor& t) { return {t.mutable_data_ptr(), dtype_of(t)}; }

}  // namespace poolformer::cuda

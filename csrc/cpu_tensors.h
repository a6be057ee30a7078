// What the CPU ops share: tensors as the kernels see them, and threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <string>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"

namespace poolformer {

inline cpu::Dtype dtype_of(const Tensor& t) {
  if (t.scalar_type() == at::kFloat) return cpu::Dtype::kFloat32;
  if (t.scalar_type() == at::kBFloat16) return cpu::Dtype::kBFloat16;
  return t.scalar_type() == at::kHalf ? cpu::Dtype::kFloat16 : cpu::Dtype::kFloat64;
}

// An op's x in the memory format of its output, and the output.
struct Tensors {
  Tensor x, out;
  at::MemoryFormat format;
  cpu::Image image;

  Tensors(const Tensor& input, int64_t num_groups) : format(input.suggest_memory_format()) {
    x = input.contiguous(format);
    out = at::empty(x.sizes(), x.options().memory_format(format));
    image.data = x.const_data_ptr();
    image.channels_last = format == at::MemoryFormat::ChannelsLast;
    image.dtype = dtype_of(x);
    image.batch = x.size(0), image.channels = x.size(1);
    image.height = x.size(2), image.width = x.size(3), image.groups = num_groups;
  }
};

// A contiguous copy of what is not contiguous.
class Contiguous {
 public:
  explicit Contiguous(const OptionalTensor& t) {
    if (t) tensor_ = t->contiguous();
  }
  const void* data() const { return tensor_.defined() ? tensor_.const_data_ptr() : nullptr; }

 private:
  Tensor tensor_;
};

class Factors {
 public:
  explicit Factors(const OptionalTensor& t) {
    if (t) tensor_ = t->to(at::kDouble).contiguous();
  }
  const double* data() const {
    return tensor_.defined() ? tensor_.const_data_ptr<double>() : nullptr;
  }

 private:
  Tensor tensor_;
};

template <class F>
inline void run(int64_t tasks, int64_t grain, F&& f) {
  at::parallel_for(0, tasks, grain, f);
}

inline void check_backend(const char* op, const std::string& backend) {
  TORCH_CHECK_VALUE(backend == "cpu", op, ": the tensors are on the CPU and backend is '", backend,
                    "'; this op runs backend 'cpu' there.");
}

inline Activation cpu_activation_of(const char* op, const std::string& act) {
  return act == "relu2" ? cpu::kReluSquared : activation_of(op, act);
}

// Checks the parameters of the MLP; returns its hidden channels.
inline int64_t check_mlp(const char* op, const Tensor& x, const OptionalTensor& norm_weight,
                         const OptionalTensor& norm_bias, const Tensor& fc1_weight,
                         const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
                         const OptionalTensor& fc2_bias, const OptionalTensor& layer_scale,
                         const OptionalTensor& drop_path, const OptionalTensor& hidden_drop_path) {
  int64_t channels = x.size(1), hidden = fc1_weight.dim() ? fc1_weight.size(0) : 0;
  TORCH_CHECK_VALUE(hidden > 0, op, ": fc1_weight has shape ", fc1_weight.sizes(),
                    "; it has to be (hidden, ", channels, ") with hidden >= 1.");
  check_weight(op, "fc1_weight", fc1_weight, hidden, channels, x);
  check_weight(op, "fc2_weight", fc2_weight, channels, hidden, x);
  check_parameter(op, "norm_weight", norm_weight, {channels}, x);
  check_parameter(op, "norm_bias", norm_bias, {channels}, x);
  check_parameter(op, "fc1_bias", fc1_bias, {hidden}, x);
  check_parameter(op, "fc2_bias", fc2_bias, {channels}, x);
  check_parameter(op, "layer_scale", layer_scale, {channels}, x);
  check_factor(op, "drop_path", drop_path, x);
  check_factor(op, "hidden_drop_path", hidden_drop_path, x);
  return hidden;
}

}  // namespace poolformer

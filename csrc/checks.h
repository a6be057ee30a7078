// Checks of the arguments of the C++ ops: called directly with anything, they fail and never read
// outside a tensor.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>

#include "math.h"

namespace poolformer {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// float64 for float64, else float32.
inline at::ScalarType accumulate_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_input(const char* op, const Tensor& x, int64_t num_groups, double eps) {
  TORCH_CHECK_VALUE(x.dim() == 4, op, ": x has shape ", x.sizes(), "; it has to be (B, C, H, W).");
  auto type = x.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble, op,
      ": x is ", type, "; it has to be float32, bfloat16, float16 or float64.");
  TORCH_CHECK_VALUE(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, op, ": x has shape ",
                    x.sizes(), "; C, H and W have to be at least 1.");
  TORCH_CHECK_VALUE(num_groups > 0 && x.size(1) % num_groups == 0, op, ": num_groups is ",
                    num_groups, "; it has to be positive and divide the ", x.size(1),
                    " channels of x.");
  TORCH_CHECK_VALUE(eps >= 0, op, ": eps is ", eps,
                    "; it has to be a number that is not negative.");
}

inline void check_pool_size(const char* op, int64_t pool_size) {
  TORCH_CHECK_VALUE(pool_size > 0 && pool_size % 2 == 1, op, ": pool_size is ", pool_size,
                    "; it has to be odd and positive.");
}

inline Activation activation_of(const char* op, const std::string& act) {
  if (act == "gelu") return Activation::kGelu;
  if (act == "gelu_pytorch_tanh") return Activation::kGeluTanh;
  if (act == "relu") return Activation::kRelu;
  TORCH_CHECK_VALUE(
      act == "silu", op, ": act is '", act,
      "'; it has to be 'gelu', 'gelu_pytorch_tanh', 'relu' or 'silu', on the CPU also "
      "'relu2'.");
  return Activation::kSilu;
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  TORCH_CHECK_VALUE(t.device() == x.device(), op, ": ", name, " is on ", t.device(),
                    " and x is on ", x.device(), "; move one with .to(device).");
}

inline void check_parameter(const char* op, const char* name, const OptionalTensor& t,
                            at::IntArrayRef shape, const Tensor& x) {
  if (!t) return;
  TORCH_CHECK_VALUE(t->sizes() == shape, op, ": ", name, " has shape ", t->sizes(), "; x of shape ",
                    x.sizes(), " needs ", shape, ".");
  TORCH_CHECK_TYPE(t->scalar_type() == x.scalar_type(), op, ": ", name, " is ", t->scalar_type(),
                   " and x is ", x.scalar_type(), "; convert one of them with .to(dtype).");
  check_device(op, name, *t, x);
}

// Factors of the images: (B), float32 or x's dtype.
inline void check_factor(const char* op, const char* name, const OptionalTensor& t,
                         const Tensor& x) {
  if (!t) return;
  TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == x.size(0), op, ": ", name, " has shape ",
                    t->sizes(), "; it has to hold one factor an image, (", x.size(0), ").");
  TORCH_CHECK_TYPE(t->scalar_type() == x.scalar_type() || t->scalar_type() == at::kFloat, op, ": ",
                   name, " is ", t->scalar_type(), "; it has to be float32 or ", x.scalar_type(),
                   ".");
  check_device(op, name, *t, x);
}

// stats: (B, G, P, 3).
inline void check_stats(const char* op, const OptionalTensor& t, int64_t num_groups,
                        const Tensor& x) {
  if (!t) return;
  TORCH_CHECK_VALUE(t->dim() == 4 && t->size(0) == x.size(0) && t->size(1) == num_groups &&
                        t->size(2) > 0 && t->size(3) == 3,
                    op, ": stats has shape ", t->sizes(), "; it has to be (", x.size(0), ", ",
                    num_groups, ", P, 3) with P >= 1.");
  TORCH_CHECK_TYPE(t->scalar_type() == accumulate_type(x), op, ": stats is ", t->scalar_type(),
                   "; it has to be ", accumulate_type(x), ".");
  check_device(op, "stats", *t, x);
}

}  // namespace poolformer

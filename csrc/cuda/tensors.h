// What the bindings of all ops share: checks, memory, the device, the stream.
#pragma once

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>

#include "../checks.h"
#include "kernels.h"

namespace poolformer::cuda {

// Dense in `format` and on a multiple of 16 bytes: copied only where it is not.
inline Tensor dense(const Tensor& t, at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  Tensor result = t.contiguous(format);
  const auto address = reinterpret_cast<uintptr_t>(result.const_data_ptr());
  return address % kVectorBytes == 0 ? result : result.clone(format);
}

// A tensor that may be missing, dense while this lives.
class Dense {
 public:
  explicit Dense(const OptionalTensor& t) {
    if (t) tensor_ = dense(*t);
  }
  const void* data() const { return tensor_.defined() ? tensor_.const_data_ptr() : nullptr; }

 private:
  Tensor tensor_;
};

// Of a tensor that `check_input`, or a check of its own, let pass.
inline Dtype dtype_of(const Tensor& t) {
  return t.scalar_type() == at::kFloat      ? Dtype::kFloat32
         : t.scalar_type() == at::kBFloat16 ? Dtype::kBFloat16
                                            : Dtype::kFloat16;
}

inline Image image_of(const Tensor& x, int64_t num_groups) {
  const bool channels_last = x.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  return {dtype_of(x),
          channels_last,
          x.size(0),
          static_cast<int>(x.size(1)),
          static_cast<int>(x.size(2)),
          static_cast<int>(x.size(3)),
          static_cast<int>(num_groups)};
}

inline void check_input(const char* op, const Tensor& x, int64_t num_groups, double eps) {
  TORCH_CHECK_VALUE(x.is_cuda(), op, ": x is on ", x.device(),
                    "; this backend runs on CUDA devices. Move x with .cuda().");
  poolformer::check_input(op, x, num_groups, eps);
  TORCH_CHECK_TYPE(x.scalar_type() != at::kDouble, op,
                   ": x is Double; the CUDA kernels take float32, bfloat16 and float16. Convert x, "
                   "or use backend='torch'.");
  const int64_t elements = x.size(1) * x.size(2) * x.size(3);
  TORCH_CHECK_VALUE(elements < kIndexLimit, op, ": one image of x has ", elements,
                    " elements; the CUDA kernels index fewer than ", kIndexLimit,
                    " in an image. Use smaller images, or backend='torch'.");
}

// x as the kernels read it; while this lives its device is the current one.
struct Input {
  c10::cuda::CUDAGuard guard;
  Tensor x;
  Image image;
  cudaStream_t stream;

  Input(const Tensor& t, int64_t num_groups)
      : guard(t.device()),
        x(dense(t, t.suggest_memory_format())),
        image(image_of(x, num_groups)),
        stream(at::cuda::getCurrentCUDAStream()) {}

  Tensor like_x() const {
    return at::empty(x.sizes(), x.options().memory_format(x.suggest_memory_format()));
  }
  Tensor floats(at::IntArrayRef shape) const {
    return at::empty(shape, x.options().dtype(at::kFloat));
  }
};

// Partial statistics of x: those given, or else by a launch of their own.
inline Tensor statistics_of(const char* op, const Input& in, const OptionalTensor& stats) {
  if (stats) {
    TORCH_CHECK_VALUE(stats->size(2) < kIndexLimit / 3, op, ": stats has shape ", stats->sizes(),
                      "; the CUDA kernels merge fewer than ", kIndexLimit / 3,
                      " partial statistics of a group. Merge some of them, or leave stats out.");
    return stats->contiguous();
  }
  const int partials = statistics_partials(in.image);
  Tensor result = in.floats({in.image.batch, in.image.groups, partials, 3});
  C10_CUDA_CHECK(
      statistics(in.image, in.x.const_data_ptr(), result.mutable_data_ptr<float>(), in.stream));
  return result;
}

// The gradient of x's shape as the kernels read it, beside x.
inline Tensor gradient(const char* op, const char* name, const Tensor& dy, const Tensor& x,
                       const Tensor& dense_x) {
  TORCH_CHECK_VALUE(dy.sizes() == x.sizes(), op, ": ", name, " has shape ", dy.sizes(),
                    "; it has to be that of x, ", x.sizes(), ".");
  check_device(op, name, dy, x);
  return dense(dy.to(x.scalar_type()), dense_x.suggest_memory_format());
}

// saved as the kernels read it: (B, G, 2).
inline Tensor moments(const char* op, const Tensor& saved, const Tensor& x) {
  TORCH_CHECK_VALUE(saved.dim() == 3 && saved.size(0) == x.size(0) && saved.size(2) == 2, op,
                    ": saved has shape ", saved.sizes(), "; it has to be (", x.size(0),
                    ", G, 2), what the forward returned.");
  TORCH_CHECK_TYPE(saved.scalar_type() == at::kFloat, op, ": saved is ", saved.scalar_type(),
                   "; it has to be float32.");
  check_device(op, "saved", saved, x);
  return saved.contiguous();
}

// Windows that reach over the image on all sides are all the same.
inline int window_radius(const Image& image, int64_t pool_size) {
  const int64_t most = std::max(image.height, image.width);
  return static_cast<int>(std::min(pool_size / 2, most));
}

}  // namespace poolformer::cuda

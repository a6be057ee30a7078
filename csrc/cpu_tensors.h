// What the CPU ops share: tensors as the kernels see them, and threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <optional>
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

// A dense tensor as kernels see it; one group.
inline cpu::Image image_of(const Tensor& t) {
  bool channels_last = t.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  return {t.const_data_ptr(), dtype_of(t), channels_last, t.size(0),
          t.size(1),          t.size(2),   t.size(3),     1};
}

// An op's x in the memory format of its output, and the output.
struct Tensors {
  Tensor x, out;
  at::MemoryFormat format;
  cpu::Image image;

  Tensors(const Tensor& input, int64_t num_groups) : format(input.suggest_memory_format()) {
    x = input.contiguous(format);
    out = at::empty(x.sizes(), x.options().memory_format(format));
    image = image_of(x);
    image.groups = num_groups;
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

// The values of a tensor in order. Small ones: PyTorch would take microseconds for a conversion.
inline std::vector<double> values_of(const Tensor& t) {
  Tensor dense = t.contiguous();
  std::vector<double> values(dense.numel());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dense.scalar_type(), "values_of", [&] {
    const scalar_t* from = dense.const_data_ptr<scalar_t>();
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(from[i]);
  });
  return values;
}

class Factors {
 public:
  explicit Factors(const OptionalTensor& t) : given_(t.has_value()) {
    if (t) values_ = values_of(*t);
  }
  const double* data() const { return given_ ? values_.data() : nullptr; }

 private:
  bool given_;
  std::vector<double> values_;
};

// Calls f(begin, end) to cover [0, tasks), `grain` or more at a time. A thread begins with its
// share, the same in every op, and then takes what others have left: one that the machine holds up
// does not hold up the rest.
template <class F>
inline void run(int64_t tasks, int64_t grain, F&& f) {
  int64_t threads = std::min<int64_t>(at::get_num_threads(), (tasks + grain - 1) / grain);
  if (threads <= 1 || at::in_parallel_region()) {
    if (tasks > 0) f(0, tasks);
    return;
  }
  constexpr int64_t kTakes = 8;  // of a share, if no one else takes any
  int64_t step = std::max(grain, tasks / (threads * kTakes));
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares(threads);
  for (int64_t i = 0; i < threads; ++i) {
    shares[i].next = i * tasks / threads;
    shares[i].end = (i + 1) * tasks / threads;
  }
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    for (int64_t i = 0; i < threads; ++i) {
      Share& share = shares[(first + i) % threads];
      for (int64_t begin; (begin = share.next.fetch_add(step)) < share.end;) {
        f(begin, std::min(begin + step, share.end));
      }
    }
  });
}

// The same for a function of cpu::Kernels.
template <class Args>
inline void run_kernel(void (*kernel)(const Args&, int64_t, int64_t), const Args& args,
                       int64_t tasks, int64_t grain) {
  run(tasks, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// The sum of `count` rows of `columns`, in order.
inline void add_rows(const double* rows, int64_t count, int64_t columns, double* sums) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < columns; ++c) sums[c] += rows[i * columns + c];
  }
}

// Sums as a parameter's gradient, of x's type.
inline Tensor as_parameter(const std::vector<double>& values, const Tensor& x) {
  Tensor result = at::empty({static_cast<int64_t>(values.size())}, x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "as_parameter", [&] {
    scalar_t* to = result.mutable_data_ptr<scalar_t>();
    for (size_t i = 0; i < values.size(); ++i) to[i] = static_cast<scalar_t>(values[i]);
  });
  return result;
}

inline void check_backend(const char* op, const std::string& backend) {
  TORCH_CHECK_VALUE(backend == "cpu", op, ": the tensors are on the CPU and backend is '", backend,
                    "'; this op runs backend 'cpu' there.");
}

inline Activation cpu_activation_of(const char* op, const std::string& act) {
  return act == "relu2" ? cpu::kReluSquared : activation_of(op, act);
}

// A weight of the MLP: (rows, columns) or (rows, columns, 1, 1).
inline void check_weight(const char* op, const char* name, const Tensor& t, int64_t rows,
                         int64_t columns, const Tensor& x) {
  int64_t shape[] = {rows, columns, 1, 1};
  check_parameter(op, name, t, at::IntArrayRef(shape, t.dim() == 4 ? 4 : 2), x);
}

// Whether the MLP's weights are float32 that products take as bfloat16.
inline bool rounds_weights(const char* op, std::optional<at::ScalarType> product, const Tensor& x) {
  if (!product || *product == x.scalar_type()) return false;
  const auto& kernels = cpu::kernels();
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat && *product == at::kBFloat16, op, ": product is ",
                   *product, " and x is ", x.scalar_type(),
                   "; it has to be x's dtype or, beside float32, bfloat16.");
  TORCH_CHECK_TYPE(kernels.native_bf16, op, ": product is ", *product, ", which these kernels (",
                   kernels.name, ") do not multiply natively; leave it out.");
  return true;
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

// Connects the MLP's kernels with PyTorch: shapes, memory, launches.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <tuple>

#include "kernels.h"
#include "mlp.h"

namespace {

namespace cuda = poolformer::cuda;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using poolformer::Activation;

using cuda::kIndexLimit;

cuda::Dtype dtype_of(const char* name, const Tensor& t) {
  const auto type = t.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, "mlp: ", name,
                   " is ", type,
                   "; the CUDA kernels take float32, bfloat16 and float16. Convert it, or use "
                   "backend='torch'.");
  return type == at::kFloat      ? cuda::Dtype::kFloat32
         : type == at::kBFloat16 ? cuda::Dtype::kBFloat16
                                 : cuda::Dtype::kFloat16;
}

Activation activation_of(const std::string& act) {
  if (act == "gelu") return Activation::kGelu;
  if (act == "gelu_pytorch_tanh") return Activation::kGeluTanh;
  if (act == "relu") return Activation::kRelu;
  TORCH_CHECK_VALUE(act == "silu", "mlp: act is '", act,
                    "'; it has to be 'gelu', 'gelu_pytorch_tanh', 'relu' or 'silu'.");
  return Activation::kSilu;
}

// t, dense in `format`, from a multiple of 16 bytes on: a copy where it is not.
Tensor aligned(const Tensor& t, at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  Tensor dense = t.contiguous(format);
  const bool fits = reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0;
  return fits ? dense : dense.clone(format);
}

// A parameter, and the memory that holds it until the launch.
class Parameter {
 public:
  Parameter(const char* name, const OptionalTensor& t, int64_t size, const Tensor& x,
            const Tensor& weight) {
    if (!t) return;
    TORCH_CHECK_VALUE(t->numel() == size, "mlp: ", name, " has shape ", t->sizes(), "; it needs (",
                      size, ").");
    TORCH_CHECK_VALUE(t->device() == x.device(), "mlp: ", name, " is on ", t->device(),
                      " and x on ", x.device(), "; move one with .to(device).");
    const auto type = t->scalar_type();
    TORCH_CHECK_TYPE(type == x.scalar_type() || type == weight.scalar_type() || type == at::kFloat,
                     "mlp: ", name, " is ", type, "; it has to be ", x.scalar_type(),
                     " as x, or as fc1_weight. ", "Convert it with .to(dtype).");
    dense_ = t->contiguous();
    vector_ = {dense_.const_data_ptr(), dtype_of(name, dense_)};
  }
  operator cuda::Vector() const { return vector_; }

 private:
  Tensor dense_;
  cuda::Vector vector_;
};

at::MemoryFormat format_of(const Tensor& x) { return x.suggest_memory_format(); }

// The checked arguments of both directions.
struct Arguments {
  Tensor x, fc1_weight, fc2_weight;
  Parameter norm_weight, norm_bias, fc1_bias, fc2_bias, layer_scale, drop_path, hidden_drop_path;
  cuda::MlpShape shape;

  Arguments(const Tensor& given, const OptionalTensor& gamma, const OptionalTensor& beta,
            const Tensor& w1, const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2,
            const OptionalTensor& scale, const OptionalTensor& drop,
            const OptionalTensor& hidden_drop, const std::string& act, int64_t groups)
      : norm_weight("norm_weight", gamma, channels(given), given, w1),
        norm_bias("norm_bias", beta, channels(given), given, w1),
        fc1_bias("fc1_bias", b1, hidden(w1), given, w1),
        fc2_bias("fc2_bias", b2, channels(given), given, w1),
        layer_scale("layer_scale", scale, channels(given), given, w1),
        drop_path("drop_path", drop, given.size(0), given, w1),
        hidden_drop_path("hidden_drop_path", hidden_drop, given.size(0), given, w1) {
    const int64_t c = channels(given), h = hidden(w1), rows = given.size(2) * given.size(3);
    TORCH_CHECK_VALUE(rows > 0 && c > 0, "mlp: x has shape ", given.sizes(),
                      "; C, H and W have to be at least 1.");
    TORCH_CHECK_VALUE(c * rows < kIndexLimit && h * c < kIndexLimit, "mlp: one image of x has ",
                      c * rows, " elements and fc1_weight ", h * c,
                      "; the CUDA kernels index fewer than ", kIndexLimit,
                      " in either. Use smaller images, or backend='torch'.");
    TORCH_CHECK_VALUE(groups > 0 && c % groups == 0, "mlp: num_groups is ", groups,
                      "; it has to be positive and divide the ", c, " channels of x.");
    TORCH_CHECK_VALUE(w1.numel() == h * c && w2.numel() == h * c && w2.size(0) == c,
                      "mlp: fc1_weight has shape ", w1.sizes(), " and fc2_weight ", w2.sizes(),
                      "; x of shape ", given.sizes(), " needs (hidden, ", c, ") and (", c,
                      ", hidden).");
    TORCH_CHECK_VALUE(w1.device() == given.device() && w2.device() == given.device(),
                      "mlp: the weights are on ", w1.device(), " and ", w2.device(), " and x on ",
                      given.device(), "; move them with .to(device).");
    shape.dtype = dtype_of("x", given);
    shape.product_dtype = dtype_of("fc1_weight", w1);
    TORCH_CHECK_TYPE(w2.scalar_type() == w1.scalar_type() &&
                         (w1.scalar_type() == given.scalar_type() ||
                          (given.scalar_type() == at::kFloat && w1.scalar_type() != at::kFloat)),
                     "mlp: x is ", given.scalar_type(), ", fc1_weight ", w1.scalar_type(),
                     ", fc2_weight ", w2.scalar_type(),
                     "; the weights have to be of x's dtype or, if that is float32, of bfloat16 or "
                     "float16. Convert them with .to(dtype).");
    x = aligned(given, format_of(given));
    fc1_weight = aligned(w1), fc2_weight = aligned(w2);
    shape.batch = given.size(0), shape.rows = static_cast<int>(rows);
    shape.channels = static_cast<int>(c), shape.hidden = static_cast<int>(h);
    shape.groups = static_cast<int>(groups);
    shape.channels_last = format_of(given) == at::MemoryFormat::ChannelsLast;
    shape.act = activation_of(act);
    shape.tf32 = at::globalContext().allowTF32CuBLAS();
  }

  cuda::MlpParameters parameters() const {
    return {norm_weight,
            norm_bias,
            fc1_bias,
            fc2_bias,
            layer_scale,
            drop_path,
            hidden_drop_path,
            fc1_weight.const_data_ptr(),
            fc2_weight.const_data_ptr()};
  }

 private:
  static int64_t channels(const Tensor& x) {
    TORCH_CHECK_VALUE(x.dim() == 4 && x.is_cuda(), "mlp: x has shape ", x.sizes(), " and is on ",
                      x.device(), "; it has to be (B, C, H, W) on a CUDA device.");
    dtype_of("x", x);
    return x.size(1);
  }
  static int64_t hidden(const Tensor& weight) {
    TORCH_CHECK_VALUE(weight.dim() >= 2 && weight.size(0) > 0, "mlp: fc1_weight has shape ",
                      weight.sizes(), "; it has to be (hidden, C) with hidden >= 1.");
    return weight.size(0);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const OptionalTensor& stats, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, const Tensor& fc1_weight, const OptionalTensor& fc1_bias,
    const Tensor& fc2_weight, const OptionalTensor& fc2_bias, const OptionalTensor& layer_scale,
    const OptionalTensor& drop_path, const OptionalTensor& hidden_drop_path, const std::string& act,
    int64_t num_groups, double eps, bool return_stats, bool save_hidden) {
  const Arguments given(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
                        layer_scale, drop_path, hidden_drop_path, act, num_groups);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto stream = at::cuda::getCurrentCUDAStream();
  const cuda::MlpShape& shape = given.shape;
  const auto float_options = x.options().dtype(at::kFloat);
  const int64_t product_bytes = fc1_weight.element_size();
  const bool fused = cuda::mlp_is_fused(shape.channels, num_groups, product_bytes);
  TORCH_CHECK_VALUE(fused || shape.channels <= cuda::mlp_most_channels(), "mlp: x has ",
                    shape.channels, " channels; the CUDA kernels take at most ",
                    cuda::mlp_most_channels(), ". Use backend='triton' or 'torch'.");
  const Tensor z = at::empty(x.sizes(), x.options().memory_format(format_of(x)));
  const Tensor saved = at::empty({shape.batch, num_groups, 2}, float_options);
  const Tensor hidden =
      save_hidden ? at::empty({x.size(0), x.size(2), x.size(3), shape.hidden}, fc1_weight.options())
                  : at::empty({0}, fc1_weight.options());
  const auto statistics = [&](const Tensor& of) {
    const cuda::Image image = {
        shape.dtype,    shape.channels_last,         shape.batch,
        shape.channels, static_cast<int>(x.size(2)), static_cast<int>(x.size(3)),
        shape.groups};
    const int64_t parts = cuda::statistics_partials(image);
    const Tensor result = at::empty({shape.batch, num_groups, parts, 3}, float_options);
    C10_CUDA_CHECK(
        cuda::statistics(image, of.const_data_ptr(), result.mutable_data_ptr<float>(), stream));
    return result;
  };

  cuda::MlpForward a{};
  Tensor stats_out = at::empty({0}, float_options), stats_in;
  if (return_stats) {
    const int64_t parts = cuda::mlp_partials(shape.rows, shape.channels, num_groups, product_bytes);
    stats_out = at::empty({shape.batch, num_groups, parts, 3}, float_options);
    if (num_groups == 1) a.stats_out = stats_out.mutable_data_ptr<float>();
  }
  if (shape.batch == 0) return {z, saved, stats_out, hidden};
  if (stats) {
    TORCH_CHECK_VALUE(stats->dim() == 4 && stats->size(0) == shape.batch &&
                          stats->size(1) == num_groups && stats->size(2) > 0 && stats->size(3) == 3,
                      "mlp: stats has shape ", stats->sizes(), "; it has to be (", shape.batch,
                      ", ", num_groups, ", P, 3) with P >= 1.");
    TORCH_CHECK_TYPE(stats->scalar_type() == at::kFloat && stats->device() == x.device(),
                     "mlp: stats is ", stats->scalar_type(), " on ", stats->device(),
                     "; it has to be float32 on ", x.device(), ".");
    stats_in = stats->contiguous();
  } else {
    stats_in = statistics(given.x);
  }
  Tensor activated;
  if (!fused) {
    activated = at::empty({shape.batch * shape.rows, cuda::mlp_hidden_stride(shape.hidden)},
                          fc1_weight.options());
    a.activated = activated.mutable_data_ptr();
  }
  a.shape = shape, a.parameters = given.parameters();
  a.x = given.x.const_data_ptr(), a.z = z.mutable_data_ptr();
  a.stats = stats_in.const_data_ptr<float>(), a.partials = static_cast<int>(stats_in.size(2));
  a.eps = static_cast<float>(eps), a.saved = saved.mutable_data_ptr<float>();
  a.hidden = save_hidden ? hidden.mutable_data_ptr() : nullptr;
  C10_CUDA_CHECK(cuda::mlp_forward(a, stream));
  if (return_stats && num_groups > 1) {
    const Tensor parts = statistics(z);
    C10_CUDA_CHECK(cuda::mlp_merge_statistics(
        parts.const_data_ptr<float>(), static_cast<int>(parts.size(2)), shape.batch * num_groups,
        stats_out.mutable_data_ptr<float>(), stream));
  }
  return {z, saved, stats_out, hidden};
}

}  // namespace

void bind_cuda_mlp(pybind11::module_& m) {
  m.def("cuda_mlp_forward", &forward, "(z, saved, stats_out, hidden) of mlp_fwd.");
}

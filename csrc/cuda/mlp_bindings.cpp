// Connects the MLP's kernels with PyTorch: shapes, memory, launches.
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <tuple>

#include "mlp.h"
#include "tensors.h"

namespace poolformer {
namespace {

using cuda::Input;

constexpr const char* kOp = "mlp";

// A parameter, and the memory that holds it until the launch.
class Parameter {
 public:
  Parameter(const char* name, const OptionalTensor& t, int64_t size, const Tensor& x,
            const Tensor& weight) {
    if (!t) return;
    TORCH_CHECK_VALUE(t->numel() == size, kOp, ": ", name, " has shape ", t->sizes(),
                      "; it needs (", size, ").");
    check_device(kOp, name, *t, x);
    const auto type = t->scalar_type();
    TORCH_CHECK_TYPE(type == x.scalar_type() || type == weight.scalar_type() || type == at::kFloat,
                     kOp, ": ", name, " is ", type, "; it has to be ", x.scalar_type(),
                     " as x, or as fc1_weight. Convert it with .to(dtype).");
    dense_ = t->contiguous();
    vector_ = {dense_.const_data_ptr(), cuda::dtype_of(dense_)};
  }
  operator cuda::Vector() const { return vector_; }

 private:
  Tensor dense_;
  cuda::Vector vector_;
};

// x itself, if the kernels take it and weights of these shapes and dtypes.
const Tensor& checked(const Tensor& x, const Tensor& w1, const Tensor& w2, int64_t num_groups,
                      double eps) {
  cuda::check_input(kOp, x, num_groups, eps);
  const int64_t channels = x.size(1), hidden = w1.dim() >= 2 ? w1.size(0) : 0;
  TORCH_CHECK_VALUE(hidden > 0, kOp, ": fc1_weight has shape ", w1.sizes(),
                    "; it has to be (hidden, C) with hidden >= 1.");
  TORCH_CHECK_VALUE(hidden * channels < cuda::kIndexLimit, kOp, ": fc1_weight has ",
                    hidden * channels, " elements; the CUDA kernels index fewer than ",
                    cuda::kIndexLimit, ". Use backend='torch'.");
  TORCH_CHECK_VALUE(
      w1.numel() == hidden * channels && w2.numel() == hidden * channels && w2.size(0) == channels,
      kOp, ": fc1_weight has shape ", w1.sizes(), " and fc2_weight ", w2.sizes(), "; x of shape ",
      x.sizes(), " needs (hidden, ", channels, ") and (", channels, ", hidden).");
  check_device(kOp, "fc1_weight", w1, x);
  check_device(kOp, "fc2_weight", w2, x);
  const auto type = w1.scalar_type();
  const bool mixed = x.scalar_type() == at::kFloat && (type == at::kBFloat16 || type == at::kHalf);
  TORCH_CHECK_TYPE(w2.scalar_type() == type && (type == x.scalar_type() || mixed), kOp, ": x is ",
                   x.scalar_type(), ", fc1_weight ", type, ", fc2_weight ", w2.scalar_type(),
                   "; the weights have to be of x's dtype or, if that is float32, of bfloat16 or "
                   "float16. Convert them with .to(dtype).");
  return x;
}

cuda::MlpShape shape_of(const Input& in, const Tensor& w1, const std::string& act) {
  cuda::MlpShape shape{};
  shape.batch = in.image.batch, shape.rows = in.image.pixels();
  shape.channels = in.image.channels, shape.hidden = static_cast<int>(w1.size(0));
  shape.groups = in.image.groups, shape.channels_last = in.image.channels_last;
  shape.dtype = in.image.dtype, shape.product_dtype = cuda::dtype_of(w1);
  shape.act = activation_of(kOp, act), shape.tf32 = at::globalContext().allowTF32CuBLAS();
  return shape;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const OptionalTensor& stats, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, const Tensor& fc1_weight, const OptionalTensor& fc1_bias,
    const Tensor& fc2_weight, const OptionalTensor& fc2_bias, const OptionalTensor& layer_scale,
    const OptionalTensor& drop_path, const OptionalTensor& hidden_drop_path, const std::string& act,
    int64_t num_groups, double eps, bool return_stats, bool save_hidden) {
  const Input in(checked(x, fc1_weight, fc2_weight, num_groups, eps), num_groups);
  check_stats(kOp, stats, num_groups, x);
  const cuda::MlpShape shape = shape_of(in, fc1_weight, act);
  const int64_t channels = shape.channels, hidden_units = shape.hidden, batch = shape.batch;
  const Parameter gamma("norm_weight", norm_weight, channels, x, fc1_weight),
      beta("norm_bias", norm_bias, channels, x, fc1_weight),
      b1("fc1_bias", fc1_bias, hidden_units, x, fc1_weight),
      b2("fc2_bias", fc2_bias, channels, x, fc1_weight),
      scale("layer_scale", layer_scale, channels, x, fc1_weight),
      k("drop_path", drop_path, batch, x, fc1_weight),
      ka("hidden_drop_path", hidden_drop_path, batch, x, fc1_weight);
  const int64_t product_bytes = fc1_weight.element_size();
  const bool fused = cuda::mlp_is_fused(channels, num_groups, product_bytes);
  TORCH_CHECK_VALUE(fused || channels <= cuda::mlp_most_channels(), kOp, ": x has ", channels,
                    " channels; the CUDA kernels take at most ", cuda::mlp_most_channels(),
                    ". Use backend='triton' or 'torch'.");

  const Tensor z = in.like_x(), saved = in.floats({batch, num_groups, 2});
  const Tensor hidden =
      save_hidden ? at::empty({batch, x.size(2), x.size(3), hidden_units}, fc1_weight.options())
                  : at::empty({0}, fc1_weight.options());
  const int64_t parts = cuda::mlp_partials(shape.rows, channels, num_groups, product_bytes);
  const Tensor stats_out = return_stats ? in.floats({batch, num_groups, parts, 3}) : in.floats({0});
  if (batch == 0) return {z, saved, stats_out, hidden};
  const Tensor partials = cuda::statistics_of(kOp, in, stats);
  const Tensor w1 = cuda::dense(fc1_weight), w2 = cuda::dense(fc2_weight);
  Tensor activated;
  cuda::MlpForward args{};
  if (!fused) {
    activated = at::empty({batch * shape.rows, cuda::mlp_hidden_stride(hidden_units)},
                          fc1_weight.options());
    args.activated = activated.mutable_data_ptr();
  }
  args.shape = shape;
  args.parameters = {gamma, beta, b1, b2, scale, k, ka, w1.const_data_ptr(), w2.const_data_ptr()};
  args.x = in.x.const_data_ptr(), args.z = z.mutable_data_ptr();
  args.stats = partials.const_data_ptr<float>();
  args.partials = static_cast<int>(partials.size(2)), args.eps = static_cast<float>(eps);
  args.saved = saved.mutable_data_ptr<float>();
  args.hidden = save_hidden ? hidden.mutable_data_ptr() : nullptr;
  if (return_stats && num_groups == 1) args.stats_out = stats_out.mutable_data_ptr<float>();
  C10_CUDA_CHECK(cuda::mlp_forward(args, in.stream));
  if (return_stats && num_groups > 1) {
    const Tensor of_z = cuda::statistics_of(kOp, Input(z, num_groups), std::nullopt);
    C10_CUDA_CHECK(cuda::mlp_merge_statistics(of_z.const_data_ptr<float>(),
                                              static_cast<int>(of_z.size(2)), batch * num_groups,
                                              stats_out.mutable_data_ptr<float>(), in.stream));
  }
  return {z, saved, stats_out, hidden};
}

}  // namespace
}  // namespace poolformer

void bind_cuda_mlp(pybind11::module_& m) {
  m.def("cuda_mlp_forward", &poolformer::forward, "(z, saved, stats_out, hidden) of mlp_fwd.");
}

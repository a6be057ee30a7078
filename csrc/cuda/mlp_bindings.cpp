// Connects the MLP's kernels with PyTorch: shapes, memory, launches.
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <tuple>

#include "mlp_tensors.h"

namespace poolformer {
namespace {

using cuda::Input;
using cuda::kMlp;

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const OptionalTensor& stats, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, const Tensor& fc1_weight, const OptionalTensor& fc1_bias,
    const Tensor& fc2_weight, const OptionalTensor& fc2_bias, const OptionalTensor& layer_scale,
    const OptionalTensor& drop_path, const OptionalTensor& hidden_drop_path, const std::string& act,
    int64_t num_groups, double eps, bool return_stats, bool save_hidden) {
  const Input in(cuda::checked_mlp(x, fc1_weight, fc2_weight, num_groups, eps), num_groups);
  check_stats(kMlp, stats, num_groups, x);
  const cuda::MlpInputs inputs(in, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight,
                               fc2_bias, layer_scale, drop_path, hidden_drop_path, act);
  const cuda::MlpShape& shape = inputs.shape;
  const int64_t channels = shape.channels, hidden_units = shape.hidden, batch = shape.batch;
  const int64_t product_bytes = fc1_weight.element_size();
  const bool fused = cuda::mlp_is_fused(channels, num_groups, product_bytes);
  if (!fused) cuda::check_mlp_channels(channels);

  const Tensor z = in.like_x(), saved = in.floats({batch, num_groups, 2});
  const Tensor hidden =
      save_hidden ? at::empty({batch, x.size(2), x.size(3), hidden_units}, fc1_weight.options())
                  : at::empty({0}, fc1_weight.options());
  const int64_t parts = cuda::mlp_partials(shape.rows, channels, num_groups, product_bytes);
  const Tensor stats_out = return_stats ? in.floats({batch, num_groups, parts, 3}) : in.floats({0});
  if (batch == 0) return {z, saved, stats_out, hidden};
  const Tensor partials = cuda::statistics_of(kMlp, in, stats);
  Tensor activated;
  cuda::MlpForward args{};
  if (!fused) {
    activated = at::empty({batch * shape.rows, cuda::mlp_hidden_stride(hidden_units)},
                          fc1_weight.options());
    args.activated = activated.mutable_data_ptr();
  }
  args.shape = shape, args.parameters = inputs.parameters;
  args.x = in.x.const_data_ptr(), args.z = z.mutable_data_ptr();
  args.stats = partials.const_data_ptr<float>();
  args.partials = static_cast<int>(partials.size(2)), args.eps = static_cast<float>(eps);
  args.saved = saved.mutable_data_ptr<float>();
  args.hidden = save_hidden ? hidden.mutable_data_ptr() : nullptr;
  if (return_stats && num_groups == 1) args.stats_out = stats_out.mutable_data_ptr<float>();
  C10_CUDA_CHECK(cuda::mlp_forward(args, in.stream));
  if (return_stats && num_groups > 1) {
    const Tensor of_z = cuda::statistics_of(kMlp, Input(z, num_groups), std::nullopt);
    C10_CUDA_CHECK(cuda::mlp_merge_statistics(of_z.const_data_ptr<float>(),
                                              static_cast<int>(of_z.size(2)), batch * num_groups,
                                              stats_out.mutable_data_ptr<float>(), in.stream));
  }
  return {z, saved, stats_out, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dz, const Tensor& x, const Tensor& saved, const OptionalTensor& hidden,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& fc1_weight,
    const OptionalTensor& fc1_bias, const Tensor& fc2_weight, const OptionalTensor& fc2_bias,
    const OptionalTensor& layer_scale, const OptionalTensor& drop_path,
    const OptionalTensor& hidden_drop_path, const std::string& act) {
  const int64_t num_groups = saved.dim() == 3 ? saved.size(1) : 1;
  const Input in(cuda::checked_mlp(x, fc1_weight, fc2_weight, num_groups, 0), num_groups);
  const cuda::MlpInputs inputs(in, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight,
                               fc2_bias, layer_scale, drop_path, hidden_drop_path, act);
  const cuda::MlpShape& shape = inputs.shape;
  const int64_t channels = shape.channels, units = shape.hidden, rows = shape.rows;
  cuda::check_mlp_channels(channels);
  TORCH_CHECK_VALUE(shape.batch * rows < cuda::kIndexLimit, kMlp, ": x has ", shape.batch * rows,
                    " pixels; the CUDA kernels sum over fewer than ", cuda::kIndexLimit,
                    ". Split the batch, or use backend='triton' or 'torch'.");
  const Tensor mean_rstd = cuda::moments(kMlp, saved, x);
  const Tensor g = cuda::gradient(kMlp, "dz", dz, x, in.x);

  const auto like = [&](const OptionalTensor& parameter, int64_t size) {
    const auto options = parameter ? parameter->options() : x.options();
    return shape.batch == 0 ? at::zeros({size}, options) : at::empty({size}, options);
  };
  const Tensor dx = in.like_x(), dgamma = like(norm_weight, channels),
               dbeta = like(norm_bias, channels),
               dw1 = like(fc1_weight, units * channels).view(fc1_weight.sizes()),
               db1 = like(fc1_bias, units),
               dw2 = like(fc2_weight, units * channels).view(fc2_weight.sizes()),
               db2 = like(fc2_bias, channels), dscale = like(layer_scale, channels);
  if (shape.batch == 0) return {dx, dgamma, dbeta, dw1, db1, dw2, db2, dscale};

  cuda::MlpBackward args{};
  args.shape = shape, args.parameters = inputs.parameters;
  args.dz = g.const_data_ptr(), args.x = in.x.const_data_ptr(), args.dx = dx.mutable_data_ptr();
  args.saved = mean_rstd.const_data_ptr<float>();
  Tensor kept;
  if (hidden && hidden->numel() > 0) {
    kept = cuda::checked_hidden(*hidden, shape, fc1_weight);
    args.hidden = kept.const_data_ptr();
  }
  const int64_t stride = cuda::mlp_hidden_stride(units);
  const Tensor activated = at::empty({shape.batch * rows, stride}, fc1_weight.options()),
               dhidden = at::empty_like(activated);
  args.activated = activated.mutable_data_ptr(), args.dhidden = dhidden.mutable_data_ptr();
  Tensor folded, norm_sums;
  if (num_groups == 1) {
    args.norm_parts = cuda::mlp_norm_parts(shape);
    folded = in.floats({2, units}), norm_sums = in.floats({shape.batch, args.norm_parts, 2});
    args.folded = folded.mutable_data_ptr<float>();
    args.norm_sums = norm_sums.mutable_data_ptr<float>();
  }
  C10_CUDA_CHECK(cuda::mlp_input_gradient(args, in.stream));

  args.split = cuda::mlp_split(shape);
  const int64_t parts = args.split.parts;
  const Tensor products = in.floats({parts, 2, channels, units}),
               unit_sums = in.floats({parts, units}), channel_sums = in.floats({parts, channels}),
               vector_parts = in.floats({cuda::mlp_vector_parts(units), 3, channels});
  args.products = products.mutable_data_ptr<float>();
  args.unit_sums = unit_sums.mutable_data_ptr<float>();
  args.channel_sums = channel_sums.mutable_data_ptr<float>();
  args.vector_parts = vector_parts.mutable_data_ptr<float>();
  args.norm_weight = cuda::gradient_of(dgamma), args.norm_bias = cuda::gradient_of(dbeta);
  args.fc1_weight = cuda::gradient_of(dw1), args.fc1_bias = cuda::gradient_of(db1);
  args.fc2_weight = cuda::gradient_of(dw2), args.fc2_bias = cuda::gradient_of(db2);
  args.layer_scale = cuda::gradient_of(dscale);
  C10_CUDA_CHECK(cuda::mlp_weight_gradients(args, in.stream));
  return {dx, dgamma, dbeta, dw1, db1, dw2, db2, dscale};
}

}  // namespace
}  // namespace poolformer

void bind_cuda_mlp(pybind11::module_& m) {
  m.def("cuda_mlp_forward", &poolformer::forward, "(z, saved, stats_out, hidden) of mlp_fwd.");
  m.def("cuda_mlp_backward", &poolformer::backward, "The gradients that mlp_bwd returns.");
}

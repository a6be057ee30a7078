// Connects the torch-free kernels of this folder with PyTorch.
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "mlp.h"
#include "tensors.h"

namespace poolformer {
namespace {

using cuda::Dense;
using cuda::Input;

std::tuple<Tensor, Tensor, Tensor> pool_mixer_forward(const Tensor& x, const OptionalTensor& stats,
                                                      const OptionalTensor& norm_weight,
                                                      const OptionalTensor& layer_scale,
                                                      const OptionalTensor& drop_path,
                                                      int64_t pool_size, int64_t num_groups,
                                                      double eps, bool return_stats) {
  const char* op = "pool_mixer";
  cuda::check_input(op, x, num_groups, eps);
  check_pool_size(op, pool_size);
  check_parameter(op, "norm_weight", norm_weight, {x.size(1)}, x);
  check_parameter(op, "layer_scale", layer_scale, {x.size(1)}, x);
  check_factor(op, "drop_path", drop_path, x);
  check_stats(op, stats, num_groups, x);

  const Input in(x, num_groups);
  cuda::PoolMixerArgs args{in.image};
  args.tiling = cuda::choose_tiling(in.image);
  Tensor y = in.like_x(), saved = in.floats({in.image.batch, num_groups, 2});
  Tensor stats_out = in.floats({0});
  if (return_stats) {
    stats_out = in.floats({in.image.batch, num_groups, cuda::result_partials(in.image), 3});
  }
  if (in.image.batch == 0) return {y, saved, stats_out};
  const Tensor partials = cuda::statistics_of(op, in, stats);
  const Dense gamma(norm_weight), scale(layer_scale), k(drop_path);
  args.x = in.x.const_data_ptr(), args.y = y.mutable_data_ptr();
  args.stats = partials.const_data_ptr<float>();
  args.partials = static_cast<int>(partials.size(2));
  args.radius = cuda::window_radius(in.image, pool_size), args.eps = static_cast<float>(eps);
  args.parameters = {gamma.data(), scale.data(), k.data(),
                     drop_path && drop_path->scalar_type() == at::kFloat};
  args.saved = saved.mutable_data_ptr<float>();
  args.stats_out = return_stats ? stats_out.mutable_data_ptr<float>() : nullptr;
  C10_CUDA_CHECK(cuda::pool_mixer(args, in.stream));
  return {y, saved, stats_out};
}

std::tuple<Tensor, Tensor> group_norm_forward(const Tensor& x, const OptionalTensor& stats,
                                              const OptionalTensor& weight,
                                              const OptionalTensor& bias, int64_t num_groups,
                                              double eps) {
  const char* op = "group_norm";
  cuda::check_input(op, x, num_groups, eps);
  check_parameter(op, "weight", weight, {x.size(1)}, x);
  check_parameter(op, "bias", bias, {x.size(1)}, x);
  check_stats(op, stats, num_groups, x);

  const Input in(x, num_groups);
  Tensor y = in.like_x(), saved = in.floats({in.image.batch, num_groups, 2});
  if (in.image.batch == 0) return {y, saved};
  const Tensor partials = cuda::statistics_of(op, in, stats);
  const Dense gamma(weight), beta(bias);
  cuda::GroupNormArgs args{in.image};
  args.x = in.x.const_data_ptr(), args.y = y.mutable_data_ptr();
  args.stats = partials.const_data_ptr<float>();
  args.partials = static_cast<int>(partials.size(2)), args.eps = static_cast<float>(eps);
  args.weight = gamma.data(), args.bias = beta.data();
  args.saved = saved.mutable_data_ptr<float>();
  C10_CUDA_CHECK(cuda::group_norm(args, in.stream));
  return {y, saved};
}

std::tuple<Tensor, Tensor, Tensor> pool_mixer_backward(
    const Tensor& dy, const Tensor& x, const Tensor& saved, const OptionalTensor& norm_weight,
    const OptionalTensor& layer_scale, const OptionalTensor& drop_path, int64_t pool_size) {
  const char* op = "pool_mixer";
  const int64_t num_groups = saved.dim() == 3 ? saved.size(1) : 1;
  cuda::check_input(op, x, num_groups, 0);
  check_pool_size(op, pool_size);
  check_parameter(op, "norm_weight", norm_weight, {x.size(1)}, x);
  check_parameter(op, "layer_scale", layer_scale, {x.size(1)}, x);
  check_factor(op, "drop_path", drop_path, x);

  const Input in(x, num_groups);
  const Tensor mean_rstd = cuda::moments(op, saved, x);
  const Tensor g = cuda::gradient(op, "dy", dy, x, in.x);
  cuda::PoolMixerBackwardArgs args{in.image};
  args.tiling = cuda::choose_tiling(in.image);
  args.reduction = cuda::row_reduction(in.image);
  Tensor dx = in.like_x(), dgamma = at::empty({x.size(1)}, x.options()),
         dscale = at::empty({x.size(1)}, x.options());
  const int64_t rows = in.image.batch * args.reduction.parts;
  Tensor channel_sums = in.floats({rows == 1 ? 0 : std::max<int64_t>(rows, 1), in.image.channels});
  Tensor group_sums = in.floats({in.image.batch, num_groups, args.reduction.blocks()});
  const Dense gamma(norm_weight), scale(layer_scale), k(drop_path);
  args.dy = g.const_data_ptr(), args.x = in.x.const_data_ptr(), args.dx = dx.mutable_data_ptr();
  args.saved = mean_rstd.const_data_ptr<float>();
  args.radius = cuda::window_radius(in.image, pool_size);
  args.parameters = {gamma.data(), scale.data(), k.data(),
                     drop_path && drop_path->scalar_type() == at::kFloat};
  args.channel_sums = rows == 1 ? nullptr : channel_sums.mutable_data_ptr<float>();
  args.group_sums = group_sums.mutable_data_ptr<float>();
  args.dnorm_weight = dgamma.mutable_data_ptr(), args.dlayer_scale = dscale.mutable_data_ptr();
  C10_CUDA_CHECK(cuda::pool_mixer_backward(args, in.stream));
  return {dx, dgamma, dscale};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_backward(const Tensor& dy, const Tensor& x,
                                                       const Tensor& saved,
                                                       const OptionalTensor& weight) {
  const char* op = "group_norm";
  const int64_t num_groups = saved.dim() == 3 ? saved.size(1) : 1;
  cuda::check_input(op, x, num_groups, 0);
  check_parameter(op, "weight", weight, {x.size(1)}, x);

  const Input in(x, num_groups);
  const Tensor mean_rstd = cuda::moments(op, saved, x);
  const Tensor g = cuda::gradient(op, "dy", dy, x, in.x);
  cuda::GroupNormBackwardArgs args{in.image};
  args.reduction = cuda::pixel_reduction(in.image);
  Tensor dx = in.like_x(), dweight = at::empty({x.size(1)}, x.options()),
         dbias = at::empty({x.size(1)}, x.options());
  const int64_t rows = in.image.batch * args.reduction.parts;
  Tensor channel_sums =
      in.floats({2, rows == 1 ? 0 : std::max<int64_t>(rows, 1), in.image.channels});
  Tensor group_sums = in.floats({in.image.batch, num_groups, args.reduction.blocks(), 2});
  const Dense gamma(weight);
  args.dy = g.const_data_ptr(), args.x = in.x.const_data_ptr(), args.dx = dx.mutable_data_ptr();
  args.saved = mean_rstd.const_data_ptr<float>(), args.weight = gamma.data();
  args.channel_sums = rows == 1 ? nullptr : channel_sums.mutable_data_ptr<float>();
  args.group_sums = group_sums.mutable_data_ptr<float>();
  args.dweight = dweight.mutable_data_ptr(), args.dbias = dbias.mutable_data_ptr();
  C10_CUDA_CHECK(cuda::group_norm_backward(args, in.stream));
  return {dx, dweight, dbias};
}

int64_t stats_partials(const std::string& op, int64_t channels, int64_t height, int64_t width,
                       int64_t num_groups, bool channels_last, int64_t itemsize) {
  if (op == "mlp") return cuda::mlp_partials(height * width, channels, num_groups, itemsize);
  TORCH_CHECK_VALUE(op == "pool_mixer", "cuda_stats_partials: op is '", op,
                    "'; the CUDA kernels of 'pool_mixer' and 'mlp' return statistics.");
  const cuda::Image image(itemsize == 4 ? cuda::Dtype::kFloat32 : cuda::Dtype::kBFloat16,
                          channels_last, 1, static_cast<int>(channels), static_cast<int>(height),
                          static_cast<int>(width), static_cast<int>(num_groups));
  return cuda::result_partials(image);
}

int64_t architecture(int64_t device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  return cuda::architecture();
}

}  // namespace
}  // namespace poolformer

void bind_cuda_mlp(pybind11::module_& m);

void bind_cuda(pybind11::module_& m) {
  using pybind11::arg;
  m.def("cuda_architecture", &poolformer::architecture, arg("device"),
        "What the code that runs on a device was compiled for, such as 80; 0 where none does.");
  m.def("cuda_stats_partials", &poolformer::stats_partials, arg("op"), arg("channels"),
        arg("height"), arg("width"), arg("num_groups"), arg("channels_last"), arg("itemsize"),
        "P of the (B, G, P, 3) statistics that an op returns; the same for every batch.");
  m.def("cuda_pool_mixer_forward", &poolformer::pool_mixer_forward, arg("x"), arg("stats"),
        arg("norm_weight"), arg("layer_scale"), arg("drop_path"), arg("pool_size"),
        arg("num_groups"), arg("eps"), arg("return_stats"));
  m.def("cuda_pool_mixer_backward", &poolformer::pool_mixer_backward, arg("dy"), arg("x"),
        arg("saved"), arg("norm_weight"), arg("layer_scale"), arg("drop_path"), arg("pool_size"));
  m.def("cuda_group_norm_forward", &poolformer::group_norm_forward, arg("x"), arg("stats"),
        arg("weight"), arg("bias"), arg("num_groups"), arg("eps"));
  m.def("cuda_group_norm_backward", &poolformer::group_norm_backward, arg("dy"), arg("x"),
        arg("saved"), arg("weight"));
  bind_cuda_mlp(m);
}

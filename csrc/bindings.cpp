// The forwards of the CPU ops: checks, memory, threads. The kernels are in csrc/cpu.
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "cpu_forward.h"

#ifdef WITH_CUDA
void bind_cuda(pybind11::module_&);
#endif

namespace poolformer {
namespace {

template <class A>
Partials read_partials(const Tensor& stats) {
  Tensor dense = stats.contiguous();
  const A* p = dense.const_data_ptr<A>();
  Partials partials(stats.numel() / 3);
  for (auto& partial : partials) {
    partial = {static_cast<double>(p[0]), static_cast<double>(p[1]), static_cast<double>(p[2])};
    p += 3;
  }
  return partials;
}

// Of x, one for each image and group, from stats when there are any.
Partials known_or_taken(const cpu::Kernels& kernels, const Tensors& t,
                        const OptionalTensor& stats) {
  if (!stats) return statistics_of(kernels, t.image);
  return merge_rows(t.x.scalar_type() == at::kDouble ? read_partials<double>(*stats)
                                                     : read_partials<float>(*stats),
                    t.image.batch * t.image.groups);
}

// (B, G, 1, 3)
Tensor write_stats(const Partials& partials, const Tensors& t) {
  Tensor stats =
      at::empty({t.image.batch, t.image.groups, 1, 3}, t.x.options().dtype(accumulate_type(t.x)));
  AT_DISPATCH_FLOATING_TYPES(stats.scalar_type(), "write_stats", [&] {
    scalar_t* p = stats.mutable_data_ptr<scalar_t>();
    for (const auto& partial : partials) {
      *p++ = static_cast<scalar_t>(partial.count);
      *p++ = static_cast<scalar_t>(partial.mean);
      *p++ = static_cast<scalar_t>(partial.m2);
    }
  });
  return stats;
}

// (B, G, 2)
Tensor write_moments(const Moments& moments, const Tensors& t) {
  Tensor saved =
      at::empty({t.image.batch, t.image.groups, 2}, t.x.options().dtype(accumulate_type(t.x)));
  AT_DISPATCH_FLOATING_TYPES(saved.scalar_type(), "write_moments", [&] {
    scalar_t* p = saved.mutable_data_ptr<scalar_t>();
    for (size_t i = 0; i < moments.mean.size(); ++i) {
      *p++ = static_cast<scalar_t>(moments.mean[i]);
      *p++ = static_cast<scalar_t>(moments.rstd[i]);
    }
  });
  return saved;
}

Tensor no_stats(const Tensor& x) { return at::empty({0}, x.options().dtype(accumulate_type(x))); }

std::tuple<Tensor, Tensor> group_norm_fwd(const Tensor& x, const OptionalTensor& stats,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          int64_t num_groups, double eps, std::string backend) {
  const char* op = "group_norm";
  check_backend(op, backend);
  check_input(op, x, num_groups, eps);
  check_parameter(op, "weight", weight, {x.size(1)}, x);
  check_parameter(op, "bias", bias, {x.size(1)}, x);
  check_stats(op, stats, num_groups, x);

  const auto& kernels = cpu::kernels();
  Tensors t(x, num_groups);
  Moments moments(known_or_taken(kernels, t, stats), eps);
  Contiguous gamma(weight), beta(bias);
  cpu::GroupNormArgs args{};
  args.in = t.image, args.out = t.out.mutable_data_ptr();
  args.weight = gamma.data(), args.bias = beta.data();
  args.mean = moments.mean.data(), args.rstd = moments.rstd.data();
  kernels.group_norm_plan(args);
  run_kernel(kernels.group_norm, args, t.image.batch * args.tasks, 4);
  return {t.out, write_moments(moments, t)};
}

std::tuple<Tensor, Tensor, Tensor> pool_mixer_fwd(const Tensor& x, const OptionalTensor& stats,
                                                  const OptionalTensor& norm_weight,
                                                  const OptionalTensor& layer_scale,
                                                  const OptionalTensor& drop_path,
                                                  int64_t pool_size, int64_t num_groups, double eps,
                                                  bool return_stats, std::string backend) {
  const char* op = "pool_mixer";
  check_backend(op, backend);
  check_input(op, x, num_groups, eps);
  check_pool_size(op, pool_size);
  check_parameter(op, "norm_weight", norm_weight, {x.size(1)}, x);
  check_parameter(op, "layer_scale", layer_scale, {x.size(1)}, x);
  check_factor(op, "drop_path", drop_path, x);
  check_stats(op, stats, num_groups, x);

  const auto& kernels = cpu::kernels();
  Tensors t(x, num_groups);
  Moments moments(known_or_taken(kernels, t, stats), eps);
  Contiguous gamma(norm_weight), scale(layer_scale);
  Factors k(drop_path);
  cpu::PoolMixerArgs args{};
  args.in = t.image, args.out = t.out.mutable_data_ptr();
  args.norm_weight = gamma.data(), args.layer_scale = scale.data();
  args.drop_path = k.data();
  args.mean = moments.mean.data(), args.rstd = moments.rstd.data();
  args.pool_size = pool_size;
  Partials partials = run_pool_mixer(kernels, args, return_stats);
  return {t.out, write_moments(moments, t),
          return_stats ? write_stats(partials, t) : no_stats(t.x)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mlp_fwd(
    const Tensor& x, const OptionalTensor& stats, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, const Tensor& fc1_weight, const OptionalTensor& fc1_bias,
    const Tensor& fc2_weight, const OptionalTensor& fc2_bias, const OptionalTensor& layer_scale,
    const OptionalTensor& drop_path, const OptionalTensor& hidden_drop_path, std::string act,
    int64_t num_groups, double eps, bool return_stats, bool save_hidden, std::string backend,
    std::optional<at::ScalarType> product) {
  const char* op = "mlp";
  check_backend(op, backend);
  check_input(op, x, num_groups, eps);
  int64_t hidden = check_mlp(op, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight,
                             fc2_bias, layer_scale, drop_path, hidden_drop_path);
  check_stats(op, stats, num_groups, x);
  const Activation activation = cpu_activation_of(op, act);

  const auto& kernels = cpu::kernels();
  Tensors t(x, num_groups);
  Moments moments(known_or_taken(kernels, t, stats), eps);
  Contiguous gamma(norm_weight), beta(norm_bias), w1(fc1_weight), b1(fc1_bias), w2(fc2_weight),
      b2(fc2_bias), scale(layer_scale);
  Factors k(drop_path), ka(hidden_drop_path);
  cpu::MlpArgs args{};
  args.in = t.image, args.out = t.out.mutable_data_ptr(),
  args.rounded_weights = rounds_weights(op, product, x);
  args.norm_weight = gamma.data(), args.norm_bias = beta.data();
  args.mean = moments.mean.data(), args.rstd = moments.rstd.data();
  args.fc1_weight = w1.data(), args.fc1_bias = b1.data();
  args.fc2_weight = w2.data(), args.fc2_bias = b2.data();
  args.layer_scale = scale.data(), args.drop_path = k.data(), args.hidden_drop_path = ka.data();
  args.hidden = hidden;
  args.activation = activation;
  auto options = x.options().dtype(product.value_or(x.scalar_type()));
  Tensor kept = at::empty({0}, options);  // without it, the backward recomputes it
  if (save_hidden) {
    kept = at::empty({x.size(0), x.size(2), x.size(3), hidden}, options);
    args.kept = kept.mutable_data_ptr();
  }
  Partials partials = run_mlp(kernels, args, return_stats);
  return {t.out, write_moments(moments, t), return_stats ? write_stats(partials, t) : no_stats(t.x),
          kept};
}

TORCH_LIBRARY_IMPL(poolformer_kernels, CPU, m) {
  m.impl("group_norm_fwd", group_norm_fwd);
  m.impl("pool_mixer_fwd", pool_mixer_fwd);
  m.impl("mlp_fwd", mlp_fwd);
}

}  // namespace
}  // namespace poolformer

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace cpu = poolformer::cpu;
  m.def("cpu_capability", [] { return cpu::kernels().name; });
  m.def("cpu_capabilities", cpu::capabilities);
  m.def("set_cpu_capability", cpu::set_capability);
  m.def("cpu_multiplies_bf16", [] { return cpu::kernels().native_bf16; });
  m.def("set_cpu_backward_tasks", cpu::set_backward_tasks);
  m.def("amx_bf16", cpu::has_amx_bf16);
  m.def("native_fp16", cpu::has_native_fp16);
#ifdef WITH_CUDA
  bind_cuda(m);
#endif
}

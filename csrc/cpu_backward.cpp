// The backwards of the CPU ops: checks, memory, threads. The kernels are in csrc/cpu.
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "cpu_tensors.h"

namespace poolformer {
namespace {

// Checks of the gradient of an op's output and of what its forward saved; returns the groups.
int64_t check_backward(const char* op, const Tensor& gradient, const Tensor& x,
                       const Tensor& saved) {
  TORCH_CHECK_VALUE(saved.dim() == 3 && saved.size(0) == x.size(0) && saved.size(2) == 2, op,
                    ": saved has shape ", saved.sizes(), "; it has to be (", x.size(0), ", G, 2).");
  TORCH_CHECK_TYPE(saved.scalar_type() == accumulate_type(x), op, ": saved is ",
                   saved.scalar_type(), "; it has to be ", accumulate_type(x), ".");
  check_device(op, "saved", saved, x);
  check_parameter(op, "the output's gradient", gradient, x.sizes(), x);
  return saved.size(1);
}

// What the backwards share: x, dx, the output's gradient in x's memory format, the statistics.
struct Backward {
  Tensors t;
  Tensor gradient;
  std::vector<double> mean, rstd;  // (batch, groups)

  Backward(const Tensor& gradient, const Tensor& x, const Tensor& saved)
      : t(x, saved.size(1)), gradient(gradient.contiguous(t.format)) {
    std::vector<double> values = values_of(saved);
    for (size_t i = 0; i < values.size(); i += 2) {
      mean.push_back(values[i]);
      rstd.push_back(values[i + 1]);
    }
  }

  const cpu::Image& image() const { return t.image; }
  int64_t group(int64_t image, int64_t channel) const {
    return image * t.image.groups + channel / t.image.group_channels();
  }
  double group_count() const { return double(t.image.group_channels()) * t.image.pixels(); }
};

// Runs two passes of `tasks` tasks an image, the second after `between` of every image. Images are
// taken a few at a time, so that the second pass finds in the cache what the first has read.
template <class First, class Between, class Second>
void run_passes(const cpu::Image& in, int64_t tasks, First&& first, Between&& between,
                Second&& second) {
  constexpr int64_t kElements = 1 << 18;
  int64_t step = std::max<int64_t>(1, kElements / (in.channels * in.pixels()));
  for (int64_t begin = 0; begin < in.batch; begin += step) {
    int64_t end = std::min(begin + step, in.batch), start = begin * tasks;
    auto shifted = [&](auto& pass) {
      run((end - begin) * tasks, 4, [&](int64_t a, int64_t b) { pass(start + a, start + b); });
    };
    shifted(first);
    for (int64_t image = begin; image < end; ++image) between(image);
    shifted(second);
  }
}

// dx, and the gradients of weight and bias, of a norm whose output has the gradient `dy`, of x's
// type or (`accumulated`) the accumulation type. `residual`: what dx also gets, of x's type.
void norm_backward(const cpu::Kernels& kernels, Backward& b, const OptionalTensor& weight,
                   const void* dy, bool accumulated, const void* residual,
                   std::vector<double>& dweight, std::vector<double>& dbias) {
  const cpu::Image& in = b.image();
  int64_t channels = in.channels, groups = in.groups;
  Factors gamma(weight);
  std::vector<double> scale(in.batch * channels), slope(in.batch * groups), offset(slope);
  cpu::GroupNormBackwardArgs args{};
  args.in = in, args.dy = dy, args.accumulated = accumulated, args.residual = residual;
  args.out = b.t.out.mutable_data_ptr();
  args.mean = b.mean.data();
  args.scale = scale.data(), args.slope = slope.data(), args.offset = offset.data();
  kernels.group_norm_backward_plan(args);
  std::vector<double> parts(in.batch * args.parts * 2 * channels), sums(2 * channels);
  args.sums = parts.data();
  dweight.assign(channels, 0), dbias.assign(channels, 0);

  auto between = [&](int64_t image) {
    std::fill(sums.begin(), sums.end(), 0);
    add_rows(args.sums + image * args.parts * 2 * channels, args.parts, 2 * channels, sums.data());
    for (int64_t c = 0; c < channels; ++c) {
      int64_t g = b.group(image, c);
      double weight = gamma.data() ? gamma.data()[c] : 1, rstd = b.rstd[g], n = b.group_count();
      scale[image * channels + c] = rstd * weight;
      offset[g] -= rstd * weight * sums[c] / n;
      slope[g] -= rstd * rstd * rstd * weight * sums[channels + c] / n;
      dweight[c] += rstd * sums[channels + c];
      dbias[c] += sums[c];
    }
  };
  run_passes(
      in, args.tasks,
      [&](int64_t begin, int64_t end) { kernels.group_norm_backward_sums(args, begin, end); },
      between, [&](int64_t begin, int64_t end) { kernels.group_norm_backward(args, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> group_norm_bwd(const Tensor& dy, const Tensor& x,
                                                  const Tensor& saved, const OptionalTensor& weight,
                                                  std::string backend) {
  const char* op = "group_norm";
  check_backend(op, backend);
  check_input(op, x, check_backward(op, dy, x, saved), 0);
  check_parameter(op, "weight", weight, {x.size(1)}, x);

  Backward b(dy, x, saved);
  std::vector<double> dweight, dbias;
  norm_backward(cpu::kernels(), b, weight, b.gradient.const_data_ptr(), false, nullptr, dweight,
                dbias);
  return {b.t.out, as_parameter(dweight, x), as_parameter(dbias, x)};
}

std::tuple<Tensor, Tensor, Tensor> pool_mixer_bwd(const Tensor& dy, const Tensor& x,
                                                  const Tensor& saved,
                                                  const OptionalTensor& norm_weight,
                                                  const OptionalTensor& layer_scale,
                                                  const OptionalTensor& drop_path,
                                                  int64_t pool_size, std::string backend) {
  const char* op = "pool_mixer";
  check_backend(op, backend);
  check_input(op, x, check_backward(op, dy, x, saved), 0);
  check_pool_size(op, pool_size);
  check_parameter(op, "norm_weight", norm_weight, {x.size(1)}, x);
  check_parameter(op, "layer_scale", layer_scale, {x.size(1)}, x);
  check_factor(op, "drop_path", drop_path, x);

  const auto& kernels = cpu::kernels();
  Backward b(dy, x, saved);
  const cpu::Image& in = b.image();
  int64_t channels = in.channels;
  Factors gamma(norm_weight), scale(layer_scale), k(drop_path);
  std::vector<double> gain(in.batch * channels), slope(in.batch * in.groups);
  std::vector<double> q(channels), q_of_all(channels), dnorm_weight(channels), dscale(channels);
  cpu::PoolMixerBackwardArgs args{};
  args.in = in, args.dy = b.gradient.const_data_ptr(), args.out = b.t.out.mutable_data_ptr();
  args.mean = b.mean.data(), args.gain = gain.data(), args.slope = slope.data();
  args.pool_size = pool_size;
  kernels.pool_mixer_backward_plan(args);
  std::vector<double> strips(in.batch * args.strips * channels);
  args.sums = strips.data();

  auto between = [&](int64_t image) {
    std::fill(q.begin(), q.end(), 0);
    add_rows(args.sums + image * args.strips * channels, args.strips, channels, q.data());
    for (int64_t c = 0; c < channels; ++c) {
      int64_t g = b.group(image, c);
      double rstd = b.rstd[g], factor = k.data() ? k.data()[image] * rstd : rstd;
      double product = factor * (gamma.data() ? gamma.data()[c] : 1);
      gain[image * channels + c] = product * (scale.data() ? scale.data()[c] : 1);
      slope[g] += rstd * rstd * gain[image * channels + c] * q[c] / b.group_count();
      q_of_all[c] += factor * q[c];
    }
  };
  run_passes(
      in, args.tasks,
      [&](int64_t begin, int64_t end) { kernels.pool_mixer_backward_sums(args, begin, end); },
      between, [&](int64_t begin, int64_t end) { kernels.pool_mixer_backward(args, begin, end); });
  for (int64_t c = 0; c < channels; ++c) {
    dnorm_weight[c] = q_of_all[c] * (scale.data() ? scale.data()[c] : 1);
    dscale[c] = q_of_all[c] * (gamma.data() ? gamma.data()[c] : 1);
  }
  return {b.t.out, as_parameter(dnorm_weight, x), as_parameter(dscale, x)};
}

// What the forward kept for the backward: fc1's result, of the products' dtype.
void check_kept(const char* op, const Tensor& kept, const Tensor& x, const Tensor& fc1_weight,
                at::ScalarType product) {
  int64_t shape[] = {x.size(0), x.size(2), x.size(3), fc1_weight.size(0)};
  TORCH_CHECK_VALUE(kept.sizes() == at::IntArrayRef(shape), op, ": hidden has shape ", kept.sizes(),
                    "; it has to be ", at::IntArrayRef(shape), ".");
  TORCH_CHECK_TYPE(kept.scalar_type() == product, op, ": hidden is ", kept.scalar_type(),
                   " and products are of ", product, "; the backward needs what the forward kept.");
  check_device(op, "hidden", kept, x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlp_bwd(
    const Tensor& dz, const Tensor& x, const Tensor& saved, const OptionalTensor& kept,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& fc1_weight,
    const OptionalTensor& fc1_bias, const Tensor& fc2_weight, const OptionalTensor& fc2_bias,
    const OptionalTensor& layer_scale, const OptionalTensor& drop_path,
    const OptionalTensor& hidden_drop_path, std::string act, std::string backend,
    std::optional<at::ScalarType> product) {
  const char* op = "mlp";
  check_backend(op, backend);
  check_input(op, x, check_backward(op, dz, x, saved), 0);
  int64_t hidden = check_mlp(op, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight,
                             fc2_bias, layer_scale, drop_path, hidden_drop_path);
  bool keeps = kept && kept->numel() > 0;
  if (keeps) check_kept(op, *kept, x, fc1_weight, product.value_or(x.scalar_type()));

  const auto& kernels = cpu::kernels();
  Backward b(dz, x, saved);
  const cpu::Image& in = b.image();
  int64_t channels = in.channels;
  Contiguous gamma(norm_weight), beta(norm_bias), w1(fc1_weight), b1(fc1_bias), w2(fc2_weight),
      contiguous_scale(layer_scale), hidden_rows(keeps ? kept : OptionalTensor());
  Factors k(drop_path), ka(hidden_drop_path), b2(fc2_bias), scale(layer_scale);
  Tensor dfc1 = at::empty(fc1_weight.sizes(), fc1_weight.options());
  Tensor dfc1_bias = at::empty({hidden}, x.options());
  Tensor dfc2 = at::empty(fc2_weight.sizes(), fc2_weight.options());
  cpu::MlpBackwardArgs args{};
  args.in = in, args.dz = b.gradient.const_data_ptr(), args.kept = hidden_rows.data();
  args.rounded_weights = rounds_weights(op, product, x);
  args.norm_weight = gamma.data(), args.norm_bias = beta.data();
  args.mean = b.mean.data(), args.rstd = b.rstd.data();
  args.fc1_weight = w1.data(), args.fc1_bias = b1.data(), args.fc2_weight = w2.data();
  args.layer_scale = contiguous_scale.data();
  args.drop_path = k.data(), args.hidden_drop_path = ka.data();
  args.activation = cpu_activation_of(op, act), args.hidden = hidden;
  args.fc1_gradient = dfc1.mutable_data_ptr();
  args.fc1_bias_gradient = dfc1_bias.mutable_data_ptr();
  args.fc2_gradient = dfc2.mutable_data_ptr();
  kernels.mlp_backward_plan(args);
  auto aligned = [](size_t size) { return (size + 63) / 64 * 64; };
  size_t factors = aligned(args.factors_bytes), parts = aligned(args.parts_bytes);
  auto* memory =
      static_cast<char*>(cpu::scratch(factors + parts + args.gradient_bytes, cpu::Scratch::kSums));
  args.factors = memory, args.parts = memory + factors, args.gradient = memory + factors + parts;
  std::vector<double> column_sums(args.row_parts * channels), scale_sums(args.panels * channels);
  args.column_sums = column_sums.data(), args.scale_sums = scale_sums.data();
  run_kernel(kernels.mlp_backward_pack, args, args.panels, 4);
  run_kernel(kernels.mlp_backward, args, args.row_parts * args.hidden_parts, 1);
  run_kernel(kernels.mlp_backward_finish, args, args.panels, 4);
  if (args.hidden_parts > 1) run_kernel(kernels.mlp_backward_add, args, in.batch, 1);

  std::vector<double> dnorm_weight, dnorm_bias, dfc2_bias(channels), dscale(channels);
  norm_backward(kernels, b, norm_weight, args.gradient, true, args.dz, dnorm_weight, dnorm_bias);
  add_rows(column_sums.data(), args.row_parts, channels, dfc2_bias.data());
  add_rows(scale_sums.data(), args.panels, channels, dscale.data());
  for (int64_t c = 0; c < channels; ++c) {
    if (b2.data()) dscale[c] += b2.data()[c] * dfc2_bias[c];
    if (scale.data()) dfc2_bias[c] *= scale.data()[c];
  }
  return {b.t.out, as_parameter(dnorm_weight, x), as_parameter(dnorm_bias, x), dfc1, dfc1_bias,
          dfc2,    as_parameter(dfc2_bias, x),    as_parameter(dscale, x)};
}

TORCH_LIBRARY_IMPL(poolformer_kernels, CPU, m) {
  m.impl("group_norm_bwd", group_norm_bwd);
  m.impl("pool_mixer_bwd", pool_mixer_bwd);
  m.impl("mlp_bwd", mlp_bwd);
}

}  // namespace
}  // namespace poolformer

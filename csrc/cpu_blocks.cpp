// Several blocks in a row without gradients, as one call: what they hand to one another stays in
// memory that is kept from call to call.
#include <torch/library.h>

#include <string>

#include "cpu_forward.h"

namespace poolformer {
namespace {

// The parameters of a block, in the order of the op's list.
enum Parameter {
  kNorm1Weight,
  kNorm1Bias,
  kLayerScale1,
  kNorm2Weight,
  kNorm2Bias,
  kFc1Weight,
  kFc1Bias,
  kFc2Weight,
  kFc2Bias,
  kLayerScale2,
  kParameters
};

// Statistics as a tensor of x's accumulation type would hold them: the result has the bits of the
// ops called one by one.
Partials rounded(Partials statistics, const Tensor& x) {
  if (x.scalar_type() == at::kDouble) return statistics;
  for (auto& one : statistics) {
    one = {static_cast<float>(one.count), static_cast<float>(one.mean), static_cast<float>(one.m2)};
  }
  return statistics;
}

Tensor blocks_fwd(const Tensor& x, const c10::List<OptionalTensor>& parameters, int64_t pool_size,
                  int64_t num_groups, double eps, std::string act, std::string backend) {
  const char *mixer = "pool_mixer", *mlp = "mlp";
  check_backend("blocks", backend);
  TORCH_CHECK_VALUE(parameters.size() > 0 && parameters.size() % kParameters == 0,
                    "blocks: there are ", parameters.size(), " parameters; each block has ",
                    static_cast<int>(kParameters), ".");
  check_input(mixer, x, num_groups, eps);
  check_pool_size(mixer, pool_size);
  const Activation activation = cpu_activation_of(mlp, act);

  const auto& kernels = cpu::kernels();
  Tensors t(x, num_groups);
  void *z = t.out.mutable_data_ptr(), *y = cpu::scratch(t.out.nbytes(), cpu::Scratch::kActivation);
  cpu::Image image = t.image;
  Partials statistics = statistics_of(kernels, image);
  size_t blocks = parameters.size() / kParameters;
  for (size_t i = 0; i < blocks; ++i) {
    OptionalTensor p[kParameters];
    for (int j = 0; j < kParameters; ++j) p[j] = parameters.get(i * kParameters + j);
    check_parameter(mixer, "norm_weight", p[kNorm1Weight], {x.size(1)}, x);
    check_parameter(mixer, "norm_bias", p[kNorm1Bias], {x.size(1)}, x);
    check_parameter(mixer, "layer_scale", p[kLayerScale1], {x.size(1)}, x);
    TORCH_CHECK_TYPE(p[kFc1Weight] && p[kFc2Weight], mlp,
                     ": fc1_weight and fc2_weight are needed.");
    TORCH_CHECK_TYPE(p[kFc1Weight]->scalar_type() == x.scalar_type(), mlp, ": x is ",
                     x.scalar_type(), " and fc1_weight ", p[kFc1Weight]->scalar_type(),
                     "; convert one of them with .to(dtype).");
    int64_t hidden = check_mlp(mlp, x, p[kNorm2Weight], p[kNorm2Bias], *p[kFc1Weight], p[kFc1Bias],
                               *p[kFc2Weight], p[kFc2Bias], p[kLayerScale2], {}, {});

    Moments before(statistics, eps);
    Contiguous gamma1(p[kNorm1Weight]), scale1(p[kLayerScale1]);
    cpu::PoolMixerArgs first{};
    first.in = image, first.out = y;
    first.norm_weight = gamma1.data(), first.layer_scale = scale1.data();
    first.mean = before.mean.data(), first.rstd = before.rstd.data();
    first.pool_size = pool_size;
    statistics = rounded(run_pool_mixer(kernels, first, true), x);

    Moments after(statistics, eps);
    Contiguous gamma2(p[kNorm2Weight]), beta2(p[kNorm2Bias]), w1(p[kFc1Weight]), b1(p[kFc1Bias]),
        w2(p[kFc2Weight]), b2(p[kFc2Bias]), scale2(p[kLayerScale2]);
    cpu::MlpArgs second{};
    second.in = image, second.in.data = y, second.out = z;
    second.norm_weight = gamma2.data(), second.norm_bias = beta2.data();
    second.mean = after.mean.data(), second.rstd = after.rstd.data();
    second.fc1_weight = w1.data(), second.fc1_bias = b1.data();
    second.fc2_weight = w2.data(), second.fc2_bias = b2.data();
    second.layer_scale = scale2.data();
    second.hidden = hidden;
    second.activation = activation;
    statistics = rounded(run_mlp(kernels, second, i + 1 < blocks), x);
    image.data = z;
  }
  return t.out;
}

TORCH_LIBRARY_IMPL(poolformer_kernels, CPU, m) { m.impl("blocks_fwd", blocks_fwd); }

}  // namespace
}  // namespace poolformer

// The strided convolution that begins a stage: checks, memory, threads. The kernels are in
// csrc/cpu.
#include <torch/library.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "cpu_tensors.h"

namespace poolformer {
namespace {

// PyTorch's rule: a convolution's result is channels_last if its input or its weight is.
bool is_channels_last(const Tensor& t) {
  return t.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
}

at::MemoryFormat memory_format(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// Checks the arguments; returns what of the shape does not depend on memory, and the output's size.
cpu::PatchEmbedArgs shape_of(const char* op, const Tensor& x, const Tensor& weight,
                             at::IntArrayRef stride, at::IntArrayRef padding,
                             std::array<int64_t, 4>& size) {
  check_input(op, x, 1, 0);
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.numel() > 0 && weight.size(1) == x.size(1), op,
                    ": weight has shape ", weight.sizes(), "; x of shape ", x.sizes(),
                    " needs (C, ", x.size(1), ", kernel height, kernel width).");
  check_parameter(op, "weight", weight, weight.sizes(), x);
  TORCH_CHECK_VALUE(stride.size() == 2 && stride[0] > 0 && stride[1] > 0, op, ": stride is ",
                    stride, "; it has to be two positive numbers.");
  TORCH_CHECK_VALUE(padding.size() == 2 && padding[0] >= 0 && padding[1] >= 0, op, ": padding is ",
                    padding, "; it has to be two numbers that are not negative.");
  cpu::PatchEmbedArgs args{};
  size = {x.size(0), weight.size(0), 0, 0};
  for (int i = 0; i < 2; ++i) {
    int64_t left = x.size(2 + i) + 2 * padding[i] - weight.size(2 + i);
    TORCH_CHECK_VALUE(left >= 0, op, ": x has shape ", x.sizes(), "; with padding ", padding,
                      " it is smaller than the window ", weight.sizes().slice(2), ".");
    args.kernel[i] = weight.size(2 + i), args.stride[i] = stride[i], args.padding[i] = padding[i];
    size[2 + i] = left / stride[i] + 1;
  }
  args.weight_channels_last = is_channels_last(weight);
  return args;
}

Tensor patch_embed_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, std::string backend) {
  const char* op = "patch_embed";
  check_backend(op, backend);
  std::array<int64_t, 4> size;
  cpu::PatchEmbedArgs args = shape_of(op, x, weight, stride, padding, size);
  check_parameter(op, "bias", bias, {weight.size(0)}, x);
  bool channels_last = is_channels_last(x) || is_channels_last(weight);
  Tensor y = at::empty(size, x.options().memory_format(memory_format(channels_last)));
  if (y.numel() == 0) return y;

  Tensor in = x.contiguous(x.suggest_memory_format());
  Tensor dense = weight.contiguous(memory_format(args.weight_channels_last));
  Contiguous b(bias);
  args.in = image_of(in), args.out = image_of(y);
  args.y = y.mutable_data_ptr();
  args.weight = dense.const_data_ptr(), args.bias = b.data();
  args.threads = at::get_num_threads();
  const auto& kernels = cpu::kernels();
  kernels.patch_embed_plan(args);
  args.shared = cpu::scratch(args.shared_bytes, cpu::Scratch::kSums);
  if (args.tiles > 0) {
    run_kernel(kernels.patch_embed_tiles, args, args.tiles, 1);
  } else {
    run_kernel(kernels.patch_embed_pack, args, args.panels, 1);
    run_kernel(kernels.patch_embed_rows, args, args.blocks, 8);
  }
  return y;
}

// dx, dweight and dbias, empty where they are not wanted.
std::tuple<Tensor, Tensor, Tensor> patch_embed_bwd(const Tensor& dy, const Tensor& x,
                                                   const Tensor& weight, at::IntArrayRef stride,
                                                   at::IntArrayRef padding,
                                                   std::array<bool, 3> wanted,
                                                   std::string backend) {
  const char* op = "patch_embed";
  check_backend(op, backend);
  std::array<int64_t, 4> size;
  cpu::PatchEmbedBackwardArgs args{};
  args.shape = shape_of(op, x, weight, stride, padding, size);
  check_parameter(op, "the output's gradient", dy, size, x);

  auto format = memory_format(args.shape.weight_channels_last);
  auto like = [](const Tensor& t, at::MemoryFormat format, bool wanted) {
    return wanted ? at::empty(t.sizes(), t.options().memory_format(format))
                  : at::empty({0}, t.options());
  };
  Tensor dx = like(x, x.suggest_memory_format(), wanted[0]);
  Tensor dweight = like(weight, format, wanted[1]);
  Tensor dbias = at::empty({wanted[2] ? weight.size(0) : 0}, x.options());
  if (dy.numel() == 0) return {dx.zero_(), dweight.zero_(), dbias.zero_()};

  Tensor in = x.contiguous(x.suggest_memory_format()), dense = weight.contiguous(format);
  Tensor gradient = dy.contiguous(dy.suggest_memory_format());
  args.shape.in = image_of(in), args.shape.out = image_of(gradient);
  args.shape.weight = dense.const_data_ptr();
  args.input_gradient = dx.mutable_data_ptr();
  args.weight_gradient = dweight.mutable_data_ptr();
  const auto& kernels = cpu::kernels();
  kernels.patch_embed_backward_plan(args);
  if (wanted[0]) {
    args.factors = cpu::scratch(args.factors_bytes, cpu::Scratch::kSums);
    run_kernel(kernels.patch_embed_backward_pack, args, args.panels, 1);
    run_kernel(kernels.patch_embed_backward_input, args, x.size(0) * args.strips, 1);
  }
  if (wanted[2] && !wanted[1]) {  // in float64, where the order of sums does not show
    dbias = at::sum(gradient, {0, 2, 3}, false, at::kDouble).to(x.scalar_type());
  }
  if (wanted[1]) {
    int64_t channels = weight.size(0);
    std::vector<double> column_sums(args.pixel_parts * channels);
    args.column_sums = column_sums.data();
    args.sums = cpu::scratch(args.sums_bytes, cpu::Scratch::kSums);
    run_kernel(kernels.patch_embed_backward_weight, args,
               args.pixel_parts * args.groups * args.channel_parts, 1);
    if (!args.in_place) run_kernel(kernels.patch_embed_backward_finish, args, channels, 8);
    if (wanted[2]) {
      std::vector<double> sums(channels);
      add_rows(column_sums.data(), args.pixel_parts, channels, sums.data());
      dbias = as_parameter(sums, x);
    }
  }
  return {dx, dweight, dbias};
}

TORCH_LIBRARY_IMPL(poolformer_kernels, CPU, m) {
  m.impl("patch_embed_fwd", patch_embed_fwd);
  m.impl("patch_embed_bwd", patch_embed_bwd);
}

}  // namespace
}  // namespace poolformer

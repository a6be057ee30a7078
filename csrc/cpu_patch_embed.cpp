// The strided convolution that begins a stage: checks, memory, threads. The kernel is in csrc/cpu.
#include <torch/library.h>

#include <string>

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

Tensor patch_embed_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, std::string backend) {
  const char* op = "patch_embed";
  check_backend(op, backend);
  check_input(op, x, 1, 0);
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.numel() > 0 && weight.size(1) == x.size(1), op,
                    ": weight has shape ", weight.sizes(), "; x of shape ", x.sizes(),
                    " needs (C, ", x.size(1), ", kernel height, kernel width).");
  check_parameter(op, "weight", weight, weight.sizes(), x);
  check_parameter(op, "bias", bias, {weight.size(0)}, x);
  TORCH_CHECK_VALUE(stride.size() == 2 && stride[0] > 0 && stride[1] > 0, op, ": stride is ",
                    stride, "; it has to be two positive numbers.");
  TORCH_CHECK_VALUE(padding.size() == 2 && padding[0] >= 0 && padding[1] >= 0, op, ": padding is ",
                    padding, "; it has to be two numbers that are not negative.");
  cpu::PatchEmbedArgs args{};
  int64_t size[2];
  for (int i = 0; i < 2; ++i) {
    int64_t left = x.size(2 + i) + 2 * padding[i] - weight.size(2 + i);
    TORCH_CHECK_VALUE(left >= 0, op, ": x has shape ", x.sizes(), "; with padding ", padding,
                      " it is smaller than the window ", weight.sizes().slice(2), ".");
    args.kernel[i] = weight.size(2 + i), args.stride[i] = stride[i], args.padding[i] = padding[i];
    size[i] = left / stride[i] + 1;
  }
  bool channels_last = is_channels_last(x) || is_channels_last(weight);
  Tensor y = at::empty({x.size(0), weight.size(0), size[0], size[1]},
                       x.options().memory_format(memory_format(channels_last)));
  if (y.numel() == 0) return y;

  Tensor in = x.contiguous(x.suggest_memory_format());
  args.weight_channels_last = is_channels_last(weight);
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

TORCH_LIBRARY_IMPL(poolformer_kernels, CPU, m) { m.impl("patch_embed_fwd", patch_embed_fwd); }

}  // namespace
}  // namespace poolformer

// The one file that connects the torch-free kernels of this folder with PyTorch.
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/csrc/utils/pybind.h>

#include "probe.h"

namespace {

void cuda_probe(const at::Tensor& out) {
  TORCH_CHECK_VALUE(out.is_cuda(), "cuda_probe: out is on ", out.device(),
                    "; it has to be on a CUDA device. Move it with .cuda().");
  TORCH_CHECK_TYPE(out.scalar_type() == at::kInt, "cuda_probe: out is ", out.scalar_type(),
                   "; it has to be int32. Make it with dtype=torch.int32.");
  TORCH_CHECK_VALUE(out.is_contiguous(), "cuda_probe: out has strides ", out.strides(),
                    "; it has to be contiguous. Call .contiguous() on it.");
  const c10::cuda::CUDAGuard guard(out.device());
  C10_CUDA_CHECK(poolformer::cuda::probe(out.mutable_data_ptr<int32_t>(), out.numel(),
                                         at::cuda::getCurrentCUDAStream()));
}

}  // namespace

void bind_cuda(pybind11::module_& m) {
  m.def("cuda_probe", &cuda_probe, pybind11::arg("out"),
        "out[i] = i + the architecture of the code that ran. out: int32 on a CUDA device.");
}

// Activations and their derivatives in float32, branch-free, on the hardware's 2^x. See math.h.
#pragma once

#include "../math.h"

namespace poolformer::cuda::mlp {

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// exp(-x) with the error of x log2(e) compensated.
__device__ __forceinline__ float exp_of_minus(float x) {
  const float y = x * -1.44269504f;
  const float rest = fmaf(x, -1.44269504f, -y) + x * -1.92596303e-8f;
  const float e = exp2_approximate(y);
  return fmaf(e * rest, 0.693147181f, e);
}

// 1 / (1 + exp(-u)), but of |u| at most 87.
__device__ __forceinline__ float sigmoid(float u) {
  return __fdividef(1.f, 1.f + exp_of_minus(fminf(fmaxf(u, -87.f), 87.f)));
}

struct ValueAndSlope {
  float value, slope;
};

// x Phi(x) = max(x, 0) - |x| Q(|x|) with Q(a) = exp(-a^2 / 2) N(a) / D(a), as gelu of math.h.
__device__ __forceinline__ ValueAndSlope gelu_with_slope(float x) {
  const float magnitude = fabsf(x);
  const float a = magnitude > 15.f ? 15.f : magnitude;  // NaN stays
  const float gauss = exp2_approximate(a * a * -0.72134752f);
  float top = fmaf(a, 4.15322231e-3f, 4.08810973e-2f);
  float bottom = fmaf(a, 1.04104728e-2f, 0.10247983f);
  top = fmaf(top, a, 0.183969066f);
  bottom = fmaf(bottom, a, 0.471408516f);
  top = fmaf(top, a, 0.439283371f);
  bottom = fmaf(bottom, a, 1.20554805f);
  top = fmaf(top, a, 0.5f);
  bottom = fmaf(bottom, a, 1.6764518f);
  bottom = fmaf(bottom, a, 1.f);
  const float q = gauss * __fdividef(top, bottom);
  return {fmaf(-a, q, x < 0.f ? 0.f : x), (x < 0.f ? q : 1.f - q) + x * gauss * 0.39894228f};
}

// 0.5 x (1 + tanh(u / 2)) = x sigmoid(u), u = 2 sqrt(2 / pi) (x + 0.044715 x^3)
__device__ __forceinline__ ValueAndSlope gelu_tanh_with_slope(float x) {
  const float y = x < -20.f ? -20.f : x;  // so that the value is 0 and not inf times 0; NaN stays
  const float square = y * y;
  const float gate = sigmoid(y * fmaf(square, 7.1354816e-2f, 1.59576912f));
  const float slope = fmaf(square, 0.21406445f, 1.59576912f);
  const float value = y * gate;
  return {value, gate + value * (1.f - gate) * slope};
}

__device__ __forceinline__ ValueAndSlope silu_with_slope(float x) {
  const float y = x < -130.f ? -130.f : x;
  const float gate = sigmoid(y);
  return {y * gate, gate + y * gate * (1.f - gate)};
}

__device__ __forceinline__ ValueAndSlope relu_with_slope(float x) {
  return {x < 0.f ? 0.f : x, x > 0.f ? 1.f : 0.f};
}

// v[i] becomes its activation, and slope[i] the derivative there if kSlope.
template <int kCount, bool kSlope>
__device__ __forceinline__ void activate(Activation act, float (&v)[kCount], float* slope) {
  const auto apply = [&](auto function) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const ValueAndSlope result = function(v[i]);
      v[i] = result.value;
      if constexpr (kSlope) slope[i] = result.slope;
    }
  };
  switch (act) {  // once for all: the same for every thread of a launch
    case Activation::kGelu:
      return apply([](float x) { return gelu_with_slope(x); });
    case Activation::kGeluTanh:
      return apply([](float x) { return gelu_tanh_with_slope(x); });
    case Activation::kRelu:
      return apply([](float x) { return relu_with_slope(x); });
    case Activation::kSilu:
      return apply([](float x) { return silu_with_slope(x); });
  }
}

}  // namespace poolformer::cuda::mlp

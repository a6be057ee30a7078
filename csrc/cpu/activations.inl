// The activations of math.h, and those that only the CPU kernels have.
#pragma once

#include "gelu.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

// kActivation(x) and its derivative.
template <Activation kActivation, class V>
POOLFORMER_INLINE ValueAndSlope<V> value_and_slope(V x) {
  if constexpr (kActivation == kReluSquared) {
    V zero = {}, positive = x < zero ? zero : x;
    return {positive * positive, positive + positive};
#if POOLFORMER_VECTOR_BYTES == 64
  } else if constexpr (kActivation == Activation::kGelu && std::is_same_v<V, Vec<float>>) {
    return gelu_by_table(x);
#endif
  } else {
    return activate_with_slope<kActivation>(x);
  }
}

// The same for results that become F.
template <Activation kActivation, class F, class V>
PF_INLINE ValueAndSlope<V> value_and_slope_as(V x) {
#if defined(POOLFORMER_BF16)
  if constexpr (kActivation == Activation::kGelu && std::is_same_v<F, bf16>) return gelu_to_bf16(x);
#endif
  return value_and_slope<kActivation>(x);
}

// f(std::integral_constant of `activation`)
template <class F>
static void with_activation(Activation activation, F&& f) {
  if (activation == kReluSquared) return f(std::integral_constant<Activation, kReluSquared>{});
  switch (activation) {
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>{});
  }
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

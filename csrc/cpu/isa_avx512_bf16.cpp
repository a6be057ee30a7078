// The kernels for AVX-512 (F, BW, DQ and VL) with products of bfloat16.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"

#define POOLFORMER_ISA avx512_bf16
#define POOLFORMER_TABLE kernels_avx512_bf16
#define POOLFORMER_NAME "avx512_bf16"
#define POOLFORMER_VECTOR_BYTES 64
#define POOLFORMER_ROWS 8
#define POOLFORMER_GROUP 4
#define POOLFORMER_CHUNK 128
#define POOLFORMER_F16C
#define POOLFORMER_BF16

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif

#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

// The kernels for AVX2, FMA and F16C.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"

#define POOLFORMER_ISA avx2
#define POOLFORMER_TABLE kernels_avx2
#define POOLFORMER_NAME "avx2"
#define POOLFORMER_VECTOR_BYTES 32
#define POOLFORMER_ROWS 6
#define POOLFORMER_GROUP 1
#define POOLFORMER_CHUNK 96
#define POOLFORMER_F16C

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

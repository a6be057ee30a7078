// What the MLP's kernels share: elements of any dtype, tiles of 16 rows and 32 columns, statistics.
#pragma once

#include "mlp.h"
#include "mma.cuh"

namespace poolformer::cuda::mlp {

// Element `index` of v; `none` where there is no v.
__device__ __forceinline__ float load(const Vector& v, int64_t index, float none) {
  if (v.data == nullptr) return none;
  if (v.dtype == Dtype::kFloat32) return __ldg(static_cast<const float*>(v.data) + index);
  const uint32_t bits = __ldg(static_cast<const unsigned short*>(v.data) + index);
  return v.dtype == Dtype::kBFloat16 ? unpack<__nv_bfloat16>(bits).x : unpack<__half>(bits).x;
}

// As load, of what the same kernel writes; not for a missing one.
__device__ __forceinline__ float read(const Gradient& v, int64_t index) {
  if (v.dtype == Dtype::kFloat32) return static_cast<const float*>(v.data)[index];
  const uint32_t bits = static_cast<const unsigned short*>(v.data)[index];
  return v.dtype == Dtype::kBFloat16 ? unpack<__nv_bfloat16>(bits).x : unpack<__half>(bits).x;
}

__device__ __forceinline__ void store(const Gradient& v, int64_t index, float value) {
  if (v.dtype == Dtype::kFloat32) {
    static_cast<float*>(v.data)[index] = value;
    return;
  }
  const uint32_t bits =
      v.dtype == Dtype::kBFloat16 ? pack<__nv_bfloat16>(value, 0.f) : pack<__half>(value, 0.f);
  static_cast<unsigned short*>(v.data)[index] = static_cast<unsigned short>(bits);
}

// A run of eight elements that lie side by side, in float32; zeros where there are fewer.
struct Eight {
  float v[8];
};

// The bits of eight elements: of 16-bit ones in `low` alone.
struct Raw {
  uint4 low, high;
};

template <class T>
__device__ __forceinline__ Eight unpack_eight(const uint4& bits) {
  const float2 pairs[] = {unpack<T>(bits.x), unpack<T>(bits.y), unpack<T>(bits.z),
                          unpack<T>(bits.w)};
  Eight result;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    result.v[2 * i] = pairs[i].x;
    result.v[2 * i + 1] = pairs[i].y;
  }
  return result;
}

__device__ __forceinline__ Eight as_floats(const Raw& raw) {
  return {__uint_as_float(raw.low.x),  __uint_as_float(raw.low.y),  __uint_as_float(raw.low.z),
          __uint_as_float(raw.low.w),  __uint_as_float(raw.high.x), __uint_as_float(raw.high.y),
          __uint_as_float(raw.high.z), __uint_as_float(raw.high.w)};
}

template <class T>
__device__ __forceinline__ uint4 pack_eight(const Eight& e) {
  return make_uint4(pack<T>(e.v[0], e.v[1]), pack<T>(e.v[2], e.v[3]), pack<T>(e.v[4], e.v[5]),
                    pack<T>(e.v[6], e.v[7]));
}

// `whole`: all or none are there, and they lie on 16 bytes; the same for all threads. is_float: the
// elements are float32, else of 16 bits. Loads without branches, so that a warp never parts: `from`
// has to be an address of elements even where none are there.
__device__ __forceinline__ Raw load_raw(const void* from, int count, bool whole, bool is_float) {
  const uint4 none = make_uint4(0, 0, 0, 0);
  const uint4* vectors = static_cast<const uint4*>(from);
  if (whole) {
    const uint4 low = __ldg(vectors), high = is_float ? __ldg(vectors + 1) : none;
    return {count > 0 ? low : none, count > 0 ? high : none};
  }
  uint32_t bits[8];
  if (is_float) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t word = __ldg(static_cast<const uint32_t*>(from) + (i < count ? i : 0));
      bits[i] = i < count ? word : 0;
    }
    return {make_uint4(bits[0], bits[1], bits[2], bits[3]),
            make_uint4(bits[4], bits[5], bits[6], bits[7])};
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t half = __ldg(static_cast<const unsigned short*>(from) + (i < count ? i : 0));
    bits[i] = i < count ? half : 0;
  }
  return {make_uint4(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16,
                     bits[6] | bits[7] << 16),
          none};
}

__device__ __forceinline__ void store_raw(void* to, const Raw& raw, int count, bool whole,
                                          bool is_float) {
  if (whole) {
    if (count > 0) static_cast<uint4*>(to)[0] = raw.low;
    if (count > 0 && is_float) static_cast<uint4*>(to)[1] = raw.high;
    return;
  }
  const uint32_t words[] = {raw.low.x,  raw.low.y,  raw.low.z,  raw.low.w,
                            raw.high.x, raw.high.y, raw.high.z, raw.high.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count && is_float) static_cast<uint32_t*>(to)[i] = words[i];
    if (i < count && !is_float) {
      static_cast<unsigned short*>(to)[i] =
          static_cast<unsigned short>(words[i / 2] >> 16 * (i % 2));
    }
  }
}

// T: what elements are that are not float32.
template <class T>
__device__ __forceinline__ Eight expand(const Raw& raw, bool is_float) {
  if constexpr (sizeof(T) == 2) {
    if (!is_float) return unpack_eight<T>(raw.low);
  }
  return as_floats(raw);
}

template <class T>
__device__ __forceinline__ Raw round_to(const Eight& e, bool is_float) {
  if constexpr (sizeof(T) == 2) {
    if (!is_float) return {pack_eight<T>(e), make_uint4(0, 0, 0, 0)};
  }
  const float (&v)[8] = e.v;
  return {make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                     __float_as_uint(v[3])),
          make_uint4(__float_as_uint(v[4]), __float_as_uint(v[5]), __float_as_uint(v[6]),
                     __float_as_uint(v[7]))};
}

// Stores e in T.
template <class T>
__device__ __forceinline__ void store_eight(T* to, const Eight& e, int count, bool whole) {
  constexpr bool kFloat = sizeof(T) == 4;
  store_raw(to, round_to<T>(e, kFloat), count, whole, kFloat);
}

// One image as a matrix of pixels and channels, in float32 or T, one of them side by side.
template <class T>
struct Pixels {
  int rows, channels;
  bool channels_last, is_float, whole;  // whole: no run of eight has an end inside

  __device__ explicit Pixels(const MlpShape& s)
      : rows(s.rows),
        channels(s.channels),
        channels_last(s.channels_last),
        is_float(s.dtype == Dtype::kFloat32),
        whole((s.channels_last ? s.channels : s.rows) % 8 == 0) {}

  __device__ const void* at(const void* image, int row, int column) const {
    const int index = channels_last ? row * channels + column : column * rows + row;
    const int64_t bytes = is_float ? sizeof(float) : sizeof(T);
    return static_cast<const char*>(image) + index * bytes;
  }

  // Of the run from (row, column) on, how many elements are there.
  __device__ int count(int row, int column) const {
    if (row >= rows || column >= channels) return 0;
    return min(8, channels_last ? channels - column : rows - row);
  }

  __device__ Raw fetch(const void* image, int row, int column, int count) const {
    const bool there = count > 0;
    return load_raw(at(image, there ? row : 0, there ? column : 0), count, whole, is_float);
  }

  __device__ Eight load(const void* image, int row, int column, int count) const {
    return expand<T>(fetch(image, row, column, count), is_float);
  }

  // Stores e and returns it as stored.
  __device__ Eight store(void* image, int row, int column, const Eight& e, int count) const {
    const Raw raw = round_to<T>(e, is_float);
    store_raw(const_cast<void*>(at(image, row, column)), raw, count, whole, is_float);
    return expand<T>(raw, is_float);
  }

  __device__ const void* image(const void* first, int64_t index) const {
    const int64_t bytes = index * rows * channels * (is_float ? sizeof(float) : sizeof(T));
    return static_cast<const char*>(first) + bytes;
  }
};

// Rows of a matrix (rows, columns) in T with a `stride`, from (row, column) on: kRows of kUnits
// units of 16 bytes, swizzled. Zeros beyond the matrix.
template <class T, int kRows, int kUnits, int kSkew = 1>
__device__ __forceinline__ void load_tile(uint4* to, const T* matrix, int row, int column, int rows,
                                          int columns, int stride) {
  constexpr int kElements = kUnitBytes / static_cast<int>(sizeof(T));
#pragma unroll 4
  for (int i = threadIdx.x; i < kRows * kUnits; i += blockDim.x) {
    const int r = i / kUnits, u = i % kUnits, count = columns - column - u * kElements;
    const bool there = row + r < rows && count > 0;
    const T* from = matrix + static_cast<int64_t>(row + r) * stride + column + u * kElements;
    uint4* unit = to + swizzled<kUnits, kSkew>(r, u);
    if (stride % kElements == 0 && columns == stride) {
      copy_async(unit, there ? from : matrix, there);
    } else {
      const int some = there ? min(count, kElements) : 0;
      *unit = load_raw(there ? from : matrix, some, false, sizeof(T) == 4).low;
    }
  }
}

// A piece: 16 rows and 32 columns, which a warp turns from the matrix instruction's order into runs
// of eight along rows or columns. A lane has two runs.
constexpr int kPieceRows = 16;
constexpr int kPieceColumns = 32;
constexpr int kPieceBytes = 2560;

struct Run {
  int row, column;
};

__device__ __forceinline__ Run run_of_lane(int lane, int i, bool along_columns) {
  if (along_columns) return {lane / 4 + 8 * i, lane % 4 * 8};
  return {lane / 16 * 8, lane % 16 + 16 * i};
}

// Eight elements of 16 bits into a piece that load_operand reads.
__device__ __forceinline__ void store_operand_run(void* piece, Run run, const uint4& eight,
                                                  bool along_columns) {
  const int at =
      along_columns ? swizzled<4>(run.row, run.column / 8) : swizzled<2>(run.column, run.row / 8);
  static_cast<uint4*>(piece)[at] = eight;
}

// Operand a of `multiply`: 16 columns of a piece, the first if step is 0, the others if it is 1.
__device__ __forceinline__ void load_operand(uint32_t (&a)[4], const void* piece, int lane,
                                             int step, bool along_columns) {
  const uint4* units = static_cast<const uint4*>(piece);
  if (along_columns) {
    load_matrices(a, units + swizzled<4>(lane % 16, step * 2 + lane / 16));
  } else {
    load_transposed(a, units + swizzled<2>(step * 16 + lane % 8 + lane / 16 * 8, lane / 8 % 2));
  }
}

// Four results of multiply, side by side, to a piece in float32.
__device__ __forceinline__ void store_sums(float* piece, const float (*sums)[4], int lane,
                                           bool along_columns) {
  const int row = lane / 4, column = lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (along_columns) {  // rows of 40, units of four exchanged in every other one
      const int at = row * 40 + ((8 * j + column) ^ (row % 2 * 4));
      store_pair(piece + at, sums[j][0], sums[j][1]);
      store_pair(piece + at + 320, sums[j][2], sums[j][3]);
    } else {
      float* at = piece + (8 * j + column) * 20 + row;
      at[0] = sums[j][0];
      at[20] = sums[j][1];
      at[8] = sums[j][2];
      at[28] = sums[j][3];
    }
  }
}

__device__ __forceinline__ Eight load_sums(const float* piece, Run run, bool along_columns) {
  const int swap = along_columns ? run.row % 2 * 4 : 0;
  piece += along_columns ? run.row * 40 + run.column : run.column * 20 + run.row;
  const float4 low = *reinterpret_cast<const float4*>(piece + swap);
  const float4 high = *reinterpret_cast<const float4*>(piece + (swap ^ 4));
  return {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
}

}  // namespace poolformer::cuda::mlp

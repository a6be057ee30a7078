// Both products of 16 rows by a warp, which keeps all operands but the weights in registers.
#pragma once

#include "mlp_tile.cuh"

namespace poolformer::cuda::mlp {

// 16 rows of GN(x) and of the result, all channels, in the registers of a warp: kUnits hidden units
// at a time.
template <class T, int kWidth, int kUnits>
struct WarpProducts {
  static constexpr int kSteps = kWidth / 16;
  uint32_t normed[kSteps][4];  // 16 rows of GN(x), as operand a
  float sums[kWidth / 8][4];

  __device__ void load_normed(const Pixels<T>& pixels, const void* x, int row, float2 norm,
                              const float* table, uint4* piece, int lane) {
#pragma unroll
    for (int p = 0; p < kWidth / kPieceColumns; ++p) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Run run = run_of_lane(lane, i, pixels.channels_last);
        const int column = p * kPieceColumns + run.column;
        const int count = pixels.count(row + run.row, column);
        Eight e = pixels.load(x, row + run.row, column, count);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const int channel = pixels.channels_last ? column + k : column;
          const float scale = norm.y * table[channel];
          e.v[k] = k < count ? fmaf(e.v[k] - norm.x, scale, table[kWidth + channel]) : 0.f;
        }
        store_operand_run(piece, run, pack_eight<T>(e), pixels.channels_last);
      }
      __syncwarp();
      load_operand(normed[2 * p], piece, lane, 0, pixels.channels_last);
      load_operand(normed[2 * p + 1], piece, lane, 1, pixels.channels_last);
      __syncwarp();
    }
  }

  // h = b1 + W1 GN(x) of a chunk.
  __device__ void first_product(float (&h)[kUnits / 8][4], const uint4* weights, const float* bias,
                                int lane) const {
#pragma unroll
    for (int j = 0; j < kUnits / 8; ++j) {
      const float2 b = *reinterpret_cast<const float2*>(bias + 8 * j + lane % 4 * 2);
      h[j][0] = h[j][2] = b.x;
      h[j][1] = h[j][3] = b.y;
    }
    const int row = lane % 8 + lane / 16 * 8, unit = lane / 8 % 2;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int j = 0; j < kUnits / 16; ++j) {
        uint32_t b[4];
        load_matrices(b, weights + swizzled<kWidth / 8>(16 * j + row, 2 * step + unit));
        multiply<T>(h[2 * j], normed[step], b[0], b[1]);
        multiply<T>(h[2 * j + 1], normed[step], b[2], b[3]);
      }
    }
  }

  // Adds W2 a of a chunk, where a is h after the activation.
  __device__ void second_product(const float (&a)[kUnits / 8][4], const uint4* weights, int lane) {
    const int row = lane % 8 + lane / 16 * 8, unit = lane / 8 % 2;
#pragma unroll
    for (int step = 0; step < kUnits / 16; ++step) {
      const float (&low)[4] = a[2 * step], (&high)[4] = a[2 * step + 1];
      const uint32_t operand[4] = {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]),
                                   pack<T>(high[0], high[1]), pack<T>(high[2], high[3])};
#pragma unroll
      for (int j = 0; j < kWidth / 16; ++j) {
        uint32_t b[4];
        load_matrices(b, weights + swizzled<kUnits / 8>(16 * j + row, 2 * step + unit));
        multiply<T>(sums[2 * j], operand, b[0], b[1]);
        multiply<T>(sums[2 * j + 1], operand, b[2], b[3]);
      }
    }
  }
};

// h of a chunk: `rows` rows and `units` units are there.
template <class T, int kUnits>
__device__ __forceinline__ void store_hidden(T* to, const float (&h)[kUnits / 8][4], int rows,
                                             int units, int stride, uint4* piece, int lane) {
#pragma unroll
  for (int p = 0; p < kUnits / kPieceColumns; ++p) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float (&v)[4] = h[4 * p + j];
      uint32_t* at = reinterpret_cast<uint32_t*>(piece + swizzled<4>(lane / 4, j)) + lane % 4;
      at[0] = pack<T>(v[0], v[1]);
      at[128] = pack<T>(v[2], v[3]);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Run run = run_of_lane(lane, i, true);
      const int count = run.row < rows ? units - p * kPieceColumns - run.column : 0;
      const Raw raw = {piece[swizzled<4>(run.row, run.column / 8)], {}};
      T* at = to + static_cast<int64_t>(run.row) * stride + p * kPieceColumns + run.column;
      store_raw(at, raw, min(count, 8), stride % 8 == 0, false);
    }
    __syncwarp();
  }
}

}  // namespace poolformer::cuda::mlp

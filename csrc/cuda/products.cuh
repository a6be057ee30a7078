// A tile of a product whose operands both have the summed dimension side by side.
#pragma once

#include <type_traits>

#include "mlp_tile.cuh"

namespace poolformer::cuda::mlp {

// How products are taken: T and tensor cores for 16-bit T; float on FMA units; Tf32 on tensor
// cores.
struct Tf32 {};

template <class M>
using Element = std::conditional_t<std::is_same_v<M, Tf32>, float, M>;

template <class T>
constexpr int kUnitElements = kUnitBytes / static_cast<int>(sizeof(T));

template <class T>
constexpr int kDepth = 4 * kUnitElements<T>;  // of the summed dimension at a time

__host__ __device__ constexpr int threads_of(int size) { return size == 128 ? 256 : 128; }

__host__ __device__ constexpr int hidden_stride(int hidden) { return (hidden + 7) / 8 * 8; }

template <>
__device__ __forceinline__ void multiply<Tf32>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void round_to_tf32(uint32_t (&bits)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits[i]) : "f"(__uint_as_float(bits[i])));
  }
}

// kSize rows and columns, by warps of kSize / 2 rows and 32 columns.
template <class M, int kSize>
class TileProducts {
 public:
  using T = Element<M>;
  static constexpr int kStages = 4;
  static constexpr int kOperand = kSize * 4;  // units of one operand in one stage
  static constexpr int kBytes = kStages * 2 * kOperand * kUnitBytes;
  static constexpr int kPieces = kSize / 2 / kPieceRows;  // of a warp, one above the other
  static_assert(kBytes >= threads_of(kSize) / kWarp * kPieceBytes);

  float sums[kPieces][4][4];  // in the order of `multiply`

  // Where the pieces of a warp lie in the tile.
  __device__ static int column(int warp) { return warp / 2 * kPieceColumns; }
  __device__ static int row(int warp, int piece) {
    return warp % 2 * (kSize / 2) + piece * kPieceRows;
  }

  // Eight elements of operand a of a stage, which is behind operand b.
  __device__ static void store_run(uint4* stage, Run run, const Eight& e, bool along_columns) {
    uint4* a = stage + kOperand;
    if (!along_columns) {
      constexpr int kElements = kUnitElements<T>;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        T* unit = reinterpret_cast<T*>(a + swizzled<4>(run.row + i, run.column / kElements));
        store_one(unit + run.column % kElements, e.v[i]);
      }
    } else if constexpr (sizeof(T) == 2) {
      a[swizzled<4>(run.row, run.column / 8)] = pack_eight<T>(e);
    } else {
      const int unit = run.column / 4;
      *reinterpret_cast<float4*>(a + swizzled<4>(run.row, unit)) =
          make_float4(e.v[0], e.v[1], e.v[2], e.v[3]);
      *reinterpret_cast<float4*>(a + swizzled<4>(run.row, unit + 1)) =
          make_float4(e.v[4], e.v[5], e.v[6], e.v[7]);
    }
  }

  // The sums over `blocks` blocks of kDepth. copy(block, stage) starts asynchronous copies; what
  // goes through registers is loaded by fetch(block) before products and stored by
  // deposit(block, stage) after them. At the end `stages` may be used for something else.
  template <class Fetch, class Deposit, class Copy>
  __device__ void run(uint4* stages, int blocks, Fetch fetch, Deposit deposit, Copy copy) {
    const auto stage_of = [&](int block) { return stages + block % kStages * 2 * kOperand; };
#pragma unroll
    for (int m = 0; m < kPieces; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[m][j][k] = 0;
      }
    }
#pragma unroll 1
    for (int block = 0; block < kStages - 1; ++block) {
      if (block < blocks) {
        copy(block, stage_of(block));
        fetch(block);
        deposit(block, stage_of(block));
      }
      commit_copies();
    }
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      wait_for_copies<kStages - 2>();
      __syncthreads();  // the block is there for all, and all are done with the one before
      const int next = block + kStages - 1;
      if (next < blocks) {
        copy(next, stage_of(next));
        fetch(next);
      }
      commit_copies();
      add_block(stage_of(block));
      if (next < blocks) deposit(next, stage_of(next));
    }
    wait_for_copies<0>();
    __syncthreads();
  }

 private:
  __device__ static void store_one(T* to, float value) {
    if constexpr (sizeof(T) == 2) {
      *reinterpret_cast<unsigned short*>(to) = static_cast<unsigned short>(pack<T>(value, 0.f));
    } else {
      *to = value;
    }
  }

  __device__ void add_block(const uint4* stage) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const uint4* a = stage + kOperand;
    if constexpr (std::is_same_v<M, float>) {
      add_exactly(reinterpret_cast<const float4*>(a), reinterpret_cast<const float4*>(stage),
                  row(warp, 0) + lane / 4, column(warp) + lane % 4 * 2);
    } else {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        uint32_t b[2][4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int n = column(warp) + 16 * j + lane % 8 + lane / 16 * 8;
          load_matrices(b[j], stage + swizzled<4>(n, 2 * step + lane / 8 % 2));
          if constexpr (std::is_same_v<M, Tf32>) round_to_tf32(b[j]);
        }
#pragma unroll
        for (int m = 0; m < kPieces; ++m) {
          uint32_t operand[4];
          load_matrices(operand, a + swizzled<4>(row(warp, m) + lane % 16, 2 * step + lane / 16));
          if constexpr (std::is_same_v<M, Tf32>) round_to_tf32(operand);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            multiply<M>(sums[m][j], operand, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
          }
        }
      }
    }
  }

  // The block's sums are taken apart and then added: short sums, small errors.
  __device__ void add_exactly(const float4* a, const float4* b, int row, int column) {
    float part[kPieces][4][4] = {};
#pragma unroll 1
    for (int unit = 0; unit < 4; ++unit) {
      float4 rows[2 * kPieces];
#pragma unroll
      for (int i = 0; i < 2 * kPieces; ++i) rows[i] = a[swizzled<4>(row + 8 * i, unit)];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float4 c = b[swizzled<4>(column + j / 2 * 8 + j % 2, unit)];
#pragma unroll
        for (int i = 0; i < 2 * kPieces; ++i) {
          float& sum = part[i / 2][j / 2][i % 2 * 2 + j % 2];
          sum = fmaf(rows[i].x, c.x, sum);
          sum = fmaf(rows[i].y, c.y, sum);
          sum = fmaf(rows[i].z, c.z, sum);
          sum = fmaf(rows[i].w, c.w, sum);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 16 * kPieces; ++i)
      sums[i / 16][i / 4 % 4][i % 4] += part[i / 16][i / 4 % 4][i % 4];
  }
};

}  // namespace poolformer::cuda::mlp

// A tile of a product, whose operands have the summed dimension side by side or from row to row.
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

// How an operand lies in shared memory: kDeep: a row, or of b a column, has the summed dimension
// side by side; kWide: an element of the summed dimension has all of its rows, or columns of b.
enum class Order { kDeep, kWide };

// One operand of a stage: kSize rows of a, or columns of b, and kDepth of the summed dimension.
template <class M, int kSize, Order kOrder>
struct Operand {
  using T = Element<M>;
  static constexpr bool kWide = kOrder == Order::kWide;
  static constexpr int kElements = kUnitElements<T>;
  static constexpr int kUnits = kWide ? kSize / kElements : 4;  // from line to line
  static constexpr int kLines = kWide ? kDepth<T> : kSize;
  static constexpr int kSkew = kWide && sizeof(T) == 4 ? 2 : 1;
  static constexpr int kTotal = kUnits * kLines;

  __device__ static int unit(int line, int unit) { return swizzled<kUnits, kSkew>(line, unit); }

  template <class S>
  __device__ static S* element(S* operand, int line, int position) {
    static_assert(sizeof(S) == sizeof(T));
    return operand + unit(line, position / kElements) * kElements + position % kElements;
  }

  // Of a matrix (lines, positions) with a `stride`, from (line, position) on.
  __device__ static void copy(uint4* to, const T* matrix, int line, int position, int lines,
                              int positions, int stride) {
    load_tile<T, kLines, kUnits, kSkew>(to, matrix, line, position, lines, positions, stride);
  }

  // Eight elements, along a line or from line to line.
  __device__ static void store_run(uint4* to, Run run, const Eight& e, bool along_line) {
    if (!along_line) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        store_one(element(reinterpret_cast<T*>(to), run.row + i, run.column), e.v[i]);
      }
    } else if constexpr (sizeof(T) == 2) {
      to[unit(run.row, run.column / 8)] = pack_eight<T>(e);
    } else {
      const bool exchange = kWide && run.column / 32 % 2 != 0;  // for other banks
      const Raw raw = round_to<T>(e, true);
      to[unit(run.row, run.column / 4 + exchange)] = exchange ? raw.high : raw.low;
      to[unit(run.row, run.column / 4 + !exchange)] = exchange ? raw.low : raw.high;
    }
  }

  // Operand a of `multiply` from row `row` on; step: half of kDepth.
  __device__ static void load_a(uint32_t (&a)[4], const uint4* from, int row, int step, int lane) {
    if constexpr (!kWide) {
      load_matrices(a, from + unit(row + lane % 16, 2 * step + lane / 16));
    } else if constexpr (sizeof(T) == 2) {
      load_transposed(a, from + unit(16 * step + lane % 8 + lane / 16 * 8, row / 8 + lane / 8 % 2));
    } else {
      load_words(a, from, row + lane / 4, step, lane, {0, 8, 0, 8}, {0, 0, 4, 4});
    }
    if constexpr (std::is_same_v<M, Tf32>) round_to_tf32(a);
  }

  // Operand b of `multiply`, twice: of eight columns from `column` on, and of the next eight.
  __device__ static void load_b(uint32_t (&b)[4], const uint4* from, int column, int step,
                                int lane) {
    if constexpr (!kWide) {
      load_matrices(b, from + unit(column + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
    } else if constexpr (sizeof(T) == 2) {
      load_transposed(b, from + unit(16 * step + lane % 16, column / 8 + lane / 16));
    } else {
      load_words(b, from, column + lane / 4, step, lane, {0, 0, 8, 8}, {0, 4, 0, 4});
    }
    if constexpr (std::is_same_v<M, Tf32>) round_to_tf32(b);
  }

  // Four elements of the summed dimension from 4 `quarter` on, of one row or column.
  __device__ static float4 load_four(const float* from, int index, int quarter) {
    if constexpr (!kWide) {
      return reinterpret_cast<const float4*>(from)[unit(index, quarter)];
    } else {
      return make_float4(*element(from, 4 * quarter, index), *element(from, 4 * quarter + 1, index),
                         *element(from, 4 * quarter + 2, index),
                         *element(from, 4 * quarter + 3, index));
    }
  }

 private:
  __device__ static void load_words(uint32_t (&words)[4], const uint4* from, int position, int step,
                                    int lane, const int (&across)[4], const int (&down)[4]) {
    const uint32_t* elements = reinterpret_cast<const uint32_t*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = *element(elements, 8 * step + lane % 4 + down[i], position + across[i]);
    }
  }

  __device__ static void store_one(T* to, float value) {
    if constexpr (sizeof(T) == 2) {
      *reinterpret_cast<unsigned short*>(to) = static_cast<unsigned short>(pack<T>(value, 0.f));
    } else {
      *to = value;
    }
  }
};

// kSize rows and columns, by warps of kSize / 2 rows and 32 columns.
template <class M, int kSize, Order kOrderA = Order::kDeep, Order kOrderB = Order::kDeep>
class TileProducts {
 public:
  using T = Element<M>;
  using A = Operand<M, kSize, kOrderA>;
  using B = Operand<M, kSize, kOrderB>;
  static constexpr int kStages = 4;
  static constexpr int kOperand = kSize * 4;  // units of one operand in one stage
  static_assert(A::kTotal == kOperand && B::kTotal == kOperand);
  static constexpr int kBytes = kStages * 2 * kOperand * kUnitBytes;
  static constexpr int kPieces = kSize / 2 / kPieceRows;  // of a warp, one above the other
  static_assert(kBytes >= threads_of(kSize) / kWarp * kPieceBytes);

  float sums[kPieces][4][4];  // in the order of `multiply`

  // Where the pieces of a warp lie in the tile.
  __device__ static int column(int warp) { return warp / 2 * kPieceColumns; }
  __device__ static int row(int warp, int piece) {
    return warp % 2 * (kSize / 2) + piece * kPieceRows;
  }

  // The operands of a stage.
  template <class S>
  __device__ static S* a_of(S* stage) {
    return stage + kOperand;
  }
  template <class S>
  __device__ static S* b_of(S* stage) {
    return stage;
  }

  // The sums over `blocks` blocks of kDepth. copy(block, stage) starts asynchronous copies; what
  // goes through registers is loaded by fetch(block) before products and stored by
  // deposit(block, stage) after them; visit(stage) sees each. At the end `stages` may be used for
  // something else.
  template <class Fetch, class Deposit, class Copy, class Visit>
  __device__ void run(uint4* stages, int blocks, Fetch fetch, Deposit deposit, Copy copy,
                      Visit visit) {
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
      visit(stage_of(block));
      if (next < blocks) deposit(next, stage_of(next));
    }
    wait_for_copies<0>();
    __syncthreads();
  }

 private:
  __device__ void add_block(const uint4* stage) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    if constexpr (std::is_same_v<M, float>) {
      add_exactly(reinterpret_cast<const float*>(a_of(stage)),
                  reinterpret_cast<const float*>(b_of(stage)), row(warp, 0) + lane / 4,
                  column(warp) + lane % 4 * 2);
    } else {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        uint32_t b[2][4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          B::load_b(b[j], b_of(stage), column(warp) + 16 * j, step, lane);
        }
#pragma unroll
        for (int m = 0; m < kPieces; ++m) {
          uint32_t operand[4];
          A::load_a(operand, a_of(stage), row(warp, m), step, lane);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            multiply<M>(sums[m][j], operand, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
          }
        }
      }
    }
  }

  // The block's sums are taken apart and then added: short sums, small errors.
  __device__ void add_exactly(const float* a, const float* b, int row, int column) {
    float part[kPieces][4][4] = {};
#pragma unroll 1
    for (int quarter = 0; quarter < 4; ++quarter) {
      float4 rows[2 * kPieces];
#pragma unroll
      for (int i = 0; i < 2 * kPieces; ++i) rows[i] = A::load_four(a, row + 8 * i, quarter);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float4 c = B::load_four(b, column + j / 2 * 8 + j % 2, quarter);
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

// The forward in one kernel, for widths whose sums fit the registers: the hidden never leaves them.
//
// A block takes tiles of 16 rows a warp, one after another. Weights come in chunks of hidden units
// into a ring of slots in shared memory, two chunks ahead of their use; where all of them fit, each
// is loaded once for all tiles.
#include <algorithm>

#include "activations.cuh"
#include "mlp_warp.cuh"
#include "moments.cuh"

namespace poolformer::cuda {
namespace mlp {
namespace {

constexpr int kFusedChannels = 192;
constexpr int kMostWarps = 8;
constexpr int kAhead = 2;          // chunks on their way
constexpr int kRing = kAhead + 1;  // slots that streaming needs
constexpr int kReserved = 1024;    // bytes of shared memory that each block costs

__host__ __device__ constexpr int fused_rows(int64_t rows) { return rows > 64 ? 128 : 64; }

// As registers allow.
constexpr int blocks_a_processor(int width) { return width <= 64 ? 2 : 1; }

// Shared memory of a block: slots of weights, their biases, per-channel parameters, pieces.
template <int kWidth, int kUnits>
struct Layout {
  static constexpr int kSlot = 2 * kWidth * kUnits * 2;
  static constexpr int kBias = kUnits * static_cast<int>(sizeof(float));
  static constexpr int kTable = 4 * kWidth * static_cast<int>(sizeof(float));
  static constexpr int kMoments = 2 * kMostWarps * static_cast<int>(sizeof(Moments));

  static constexpr int bytes(int slots, int warps) {
    return slots * (kSlot + kBias) + kTable + kMoments + warps * kPieceBytes;
  }
};

// Grid: any number of blocks, which share `tiles` tiles. Slots: as many as chunks, or kRing.
template <class T, int kWidth, int kUnits>
__global__ void __launch_bounds__(kMostWarps* kWarp, blocks_a_processor(kWidth))
    fused_kernel(const __grid_constant__ MlpForward a, int64_t tiles, int slots) {
  using Memory = Layout<kWidth, kUnits>;
  extern __shared__ __align__(128) unsigned char shared[];
  unsigned char* const biases = shared + slots * Memory::kSlot;
  float* const table = reinterpret_cast<float*>(biases + slots * Memory::kBias);
  Moments* const moments = reinterpret_cast<Moments*>(table + 4 * kWidth);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  unsigned char* const piece =
      reinterpret_cast<unsigned char*>(moments) + Memory::kMoments + warp * kPieceBytes;

  const MlpShape& s = a.shape;
  const MlpParameters& p = a.parameters;
  const Pixels<T> pixels(s);
  const int chunks = (s.hidden + kUnits - 1) / kUnits, tile_rows = warps * kPieceRows;
  const int image_tiles = (s.rows + tile_rows - 1) / tile_rows;
  const bool resident = slots >= chunks;
  const int64_t block_tiles = (tiles - blockIdx.x + gridDim.x - 1) / gridDim.x;
  const int64_t loads = resident ? chunks : block_tiles * chunks;

  for (int i = threadIdx.x; i < kWidth; i += blockDim.x) {
    const bool there = i < s.channels;
    table[i] = there ? load(p.norm_weight, i, 1.f) : 0.f;
    table[kWidth + i] = there ? load(p.norm_bias, i, 0.f) : 0.f;
    table[2 * kWidth + i] = there ? load(p.layer_scale, i, 1.f) : 0.f;
    table[3 * kWidth + i] = there ? load(p.fc2_bias, i, 0.f) : 0.f;
  }
  const auto load_chunk = [&](int64_t index) {  // counted over all tiles of this block
    if (index < loads) {
      const int unit = static_cast<int>(index % chunks) * kUnits;
      const int slot = static_cast<int>(index % slots);
      uint4* to = reinterpret_cast<uint4*>(shared + slot * Memory::kSlot);
      load_tile<T, kUnits, kWidth / 8>(to, static_cast<const T*>(p.fc1_weight), unit, 0, s.hidden,
                                       s.channels, s.channels);
      load_tile<T, kWidth, kUnits / 8>(to + kUnits * kWidth / 8,
                                       static_cast<const T*>(p.fc2_weight), 0, unit, s.channels,
                                       s.hidden, s.hidden);
      float* bias = reinterpret_cast<float*>(biases + slot * Memory::kBias);
      for (int i = threadIdx.x; i < kUnits; i += blockDim.x) {
        bias[i] = unit + i < s.hidden ? load(p.fc1_bias, unit + i, 0.f) : 0.f;
      }
    }
    commit_copies();
  };
  for (int i = 0; i < kAhead; ++i) load_chunk(i);
  __syncthreads();

  int64_t index = 0;
  int parity = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t b = tile / image_tiles;
    const int row = static_cast<int>(tile % image_tiles) * tile_rows + warp * kPieceRows;
    const void* x = pixels.image(a.x, b);
    const float2 norm = merge_partials(a.stats + b * a.partials * 3, a.partials, a.eps, lane);
    if (tile % image_tiles == 0 && threadIdx.x == 0) {
      a.saved[2 * b] = norm.x;
      a.saved[2 * b + 1] = norm.y;
    }
    WarpProducts<T, kWidth, kUnits> state;
    state.load_normed(pixels, x, row, norm, table, reinterpret_cast<uint4*>(piece), lane);
#pragma unroll
    for (int j = 0; j < kWidth / 8; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) state.sums[j][k] = 0;
    }

    for (int chunk = 0; chunk < chunks; ++chunk, ++index) {
      if (index < loads) {
        wait_for_copies<kAhead - 1>();
        __syncthreads();  // the chunk is there for all, and all are done with the last one
        load_chunk(index + kAhead);
      }
      if (row >= s.rows) continue;
      const int slot = resident ? chunk : static_cast<int>(index % slots);
      const uint4* weights = reinterpret_cast<const uint4*>(shared + slot * Memory::kSlot);
      float h[kUnits / 8][4];
      state.first_product(h, weights, reinterpret_cast<float*>(biases + slot * Memory::kBias),
                          lane);
      if (a.hidden != nullptr) {
        T* to = static_cast<T*>(a.hidden) + (b * s.rows + row) * s.hidden + chunk * kUnits;
        store_hidden<T, kUnits>(to, h, s.rows - row, s.hidden - chunk * kUnits, s.hidden,
                                reinterpret_cast<uint4*>(piece), lane);
      }
      activate<kUnits / 2, false>(s.act, *reinterpret_cast<float (*)[kUnits / 2]>(&h), nullptr);
      state.second_product(h, weights + kUnits * kWidth / 8, lane);
    }

    const float drop = load(p.drop_path, b, 1.f), hidden_drop = load(p.hidden_drop_path, b, 1.f);
    void* z = const_cast<void*>(pixels.image(a.z, b));
    Collector collector;
#pragma unroll
    for (int q = 0; q < kWidth / kPieceColumns; ++q) {
      store_sums(reinterpret_cast<float*>(piece), state.sums + 4 * q, lane, s.channels_last);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Run run = run_of_lane(lane, i, s.channels_last);
        const int column = q * kPieceColumns + run.column;
        const int count = pixels.count(row + run.row, column);
        if (count > 0) {
          Eight e = load_sums(reinterpret_cast<float*>(piece), run, s.channels_last);
          const Eight residual = pixels.load(x, row + run.row, column, count);
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            const int channel = s.channels_last ? column + k : column;
            const float branch = fmaf(hidden_drop, e.v[k], table[3 * kWidth + channel]);
            e.v[k] = fmaf(drop * table[2 * kWidth + channel], branch, residual.v[k]);
          }
          e = pixels.store(z, row + run.row, column, e, count);
          if (a.stats_out != nullptr) collector.add(e.v, count);
        }
      }
      __syncwarp();
    }
    if (a.stats_out != nullptr) {
      const Moments m = merge_lanes(collector.moments());
      Moments* of_tile = moments + parity * kMostWarps;  // the other half may still be read
      if (lane == 0) of_tile[warp] = m;
      __syncthreads();
      if (threadIdx.x == 0) {
        store_merged(a.stats_out + 3 * tile, of_tile, warps);
      }
      parity ^= 1;
    }
  }
}

template <class T, int kWidth, int kUnits>
cudaError_t launch(const MlpForward& a, cudaStream_t stream) {
  using Memory = Layout<kWidth, kUnits>;
  const auto kernel = fused_kernel<T, kWidth, kUnits>;
  int device, processors, limit, processor_limit;
  if (cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&processor_limit, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);

  const int rows = fused_rows(a.shape.rows), warps = rows / kPieceRows;
  const int chunks = (a.shape.hidden + kUnits - 1) / kUnits;
  const int slots = Memory::bytes(chunks, warps) <= limit ? std::max(chunks, kAhead) : kRing;
  const int bytes = Memory::bytes(slots, warps);
  static_assert(Memory::bytes(kRing, kMostWarps) <= 99 * 1024);
  if (cudaError_t e =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      e != cudaSuccess) {
    return e;
  }
  const int64_t tiles = a.shape.batch * ((a.shape.rows + rows - 1) / rows);
  const int blocks = std::clamp(processor_limit / (bytes + kReserved), 1,
                                blocks_a_processor(kWidth) * kMostWarps / warps);
  const int64_t grid = std::min<int64_t>(tiles, static_cast<int64_t>(processors) * blocks);
  kernel<<<static_cast<unsigned>(grid), warps * kWarp, bytes, stream>>>(a, tiles, slots);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_width(const MlpForward& a, cudaStream_t stream) {
  if (a.shape.channels <= 64) return launch<T, 64, 32>(a, stream);
  if (a.shape.channels <= 96) return launch<T, 96, 32>(a, stream);
  if (a.shape.channels <= 128) return launch<T, 128, 32>(a, stream);
  return launch<T, 192, 32>(a, stream);
}

}  // namespace
}  // namespace mlp

bool mlp_is_fused(int64_t channels, int64_t groups, int64_t product_bytes) {
  return channels <= mlp::kFusedChannels && groups == 1 && product_bytes == 2;
}

int64_t mlp_fused_partials(int64_t rows) { return (rows - 1) / mlp::fused_rows(rows) + 1; }

cudaError_t mlp_fused_forward(const MlpForward& a, cudaStream_t stream) {
  return a.shape.product_dtype == Dtype::kBFloat16 ? mlp::launch_width<__nv_bfloat16>(a, stream)
                                                   : mlp::launch_width<__half>(a, stream);
}

}  // namespace poolformer::cuda

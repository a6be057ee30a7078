// The forward as two products, each with its half of the work around it: for widths whose sums do
// not fit the registers, several groups, and float32.
//
// A block makes a tile of the result. Operands lie in shared memory by blocks of 64 bytes of the
// summed dimension, in a ring of stages. Weights and the hidden are copied asynchronously; x goes
// through registers, where it is normed.
#include <algorithm>
#include <type_traits>

#include "activations.cuh"
#include "mlp_tile.cuh"
#include "moments.cuh"
#include "products.cuh"

namespace poolformer::cuda {
namespace mlp {
namespace {

constexpr int kMostChannels = 2048;  // whose norm fits in shared memory beside the stages

// Rows and columns of a tile, both.
int tile_size(int64_t rows, int64_t columns, int64_t product_bytes) {
  return product_bytes == 2 && rows > 64 && columns % 128 == 0 ? 128 : 64;
}

int64_t tiles_of(int64_t rows, int64_t columns, int tile) {
  return ((rows - 1) / tile + 1) * ((columns - 1) / tile + 1);
}

// What block `blockIdx.x` makes: tiles of columns first, so that blocks at a time share rows.
struct Place {
  int64_t image;
  int tile, row, column;  // tile: of the image

  __device__ Place(int rows, int columns, int size) {
    const int column_tiles = (columns - 1) / size + 1,
              tiles = ((rows - 1) / size + 1) * column_tiles;
    image = blockIdx.x / tiles;
    tile = blockIdx.x % tiles;
    row = tile / column_tiles * size;
    column = tile % column_tiles * size;
  }
};

// activated = act(h), h = GN(x) W1^T + b1. Grid: B times the tiles of an image.
template <class M, int kSize>
__global__ void __launch_bounds__(threads_of(kSize))
    hidden_kernel(const __grid_constant__ MlpForward a) {
  using T = Element<M>;
  using Products = TileProducts<M, kSize>;
  constexpr int kThreads = threads_of(kSize);
  extern __shared__ __align__(128) unsigned char shared[];
  uint4* const stages = reinterpret_cast<uint4*>(shared);
  float* const table = reinterpret_cast<float*>(shared + Products::kBytes);
  const MlpShape& s = a.shape;
  const MlpParameters& p = a.parameters;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Place place(s.rows, s.hidden, kSize);
  const Pixels<T> pixels(s);
  const void* x = pixels.image(a.x, place.image);

  float2 norm = {};
  if (s.groups == 1) {
    norm = merge_partials(a.stats + place.image * a.partials * 3, a.partials, a.eps, lane);
    if (place.tile == 0 && threadIdx.x == 0) {
      a.saved[2 * place.image] = norm.x;
      a.saved[2 * place.image + 1] = norm.y;
    }
  }
  float* const bias = table + 3 * s.channels;
  for (int i = threadIdx.x; i < s.channels; i += kThreads) {
    if (s.groups > 1) {
      const int64_t group = place.image * s.groups + i / (s.channels / s.groups);
      norm = make_float2(a.saved[2 * group], a.saved[2 * group + 1]);
    }
    table[i] = norm.x;
    table[s.channels + i] = norm.y * load(p.norm_weight, i, 1.f);
    table[2 * s.channels + i] = load(p.norm_bias, i, 0.f);
  }
  for (int i = threadIdx.x; i < kSize; i += kThreads) {
    bias[i] = place.column + i < s.hidden ? load(p.fc1_bias, place.column + i, 0.f) : 0.f;
  }
  __syncthreads();

  // Runs of x, along whichever of rows and channels lie side by side.
  constexpr int kRuns = kSize * kDepth<T> / 8 / kThreads;
  Raw raw[kRuns];
  const auto run_of = [&](int i) {
    const int index = threadIdx.x + i * kThreads;
    constexpr int kAcross = kDepth<T> / 8;
    return s.channels_last ? Run{index / kAcross, index % kAcross * 8}
                           : Run{index / kDepth<T> * 8, index % kDepth<T>};
  };
  const auto fetch = [&](int block) {
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const Run run = run_of(i);
      const int row = place.row + run.row, channel = block * kDepth<T> + run.column;
      raw[i] = pixels.fetch(x, row, channel, pixels.count(row, channel));
    }
  };
  const auto deposit = [&](int block, uint4* to) {
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const Run run = run_of(i);
      const int first = block * kDepth<T> + run.column;
      const int count = pixels.count(place.row + run.row, first);
      Eight e = expand<T>(raw[i], pixels.is_float);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (k < count) {
          const int channel = s.channels_last ? first + k : first;
          e.v[k] = fmaf(e.v[k] - table[channel], table[s.channels + channel],
                        table[2 * s.channels + channel]);
        }
      }
      Products::store_run(to, run, e, s.channels_last);
    }
  };
  const int blocks = (s.channels - 1) / kDepth<T> + 1;
  Products products;
  const auto copy = [&](int block, uint4* to) {
    load_tile<T, kSize, 4>(to, static_cast<const T*>(p.fc1_weight), place.column, block * kDepth<T>,
                           s.hidden, s.channels, s.channels);
  };
  products.run(stages, blocks, fetch, deposit, copy);

  const int stride = hidden_stride(s.hidden);
  const int64_t first_row = place.image * s.rows + place.row;
  float* const piece = reinterpret_cast<float*>(shared + warp * kPieceBytes);
  const int columns = products.column(warp);
#pragma unroll
  for (int m = 0; m < Products::kPieces; ++m) {
    store_sums(piece, products.sums[m], lane, true);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Run run = run_of_lane(lane, i, true);
      const int row = products.row(warp, m) + run.row, column = place.column + columns + run.column;
      const int count = place.row + row < s.rows ? min(8, stride - column) : 0;
      Eight e = load_sums(piece, run, true);
#pragma unroll
      for (int k = 0; k < 8; ++k) e.v[k] += bias[columns + run.column + k];
      if (count > 0) {
        const int64_t at = first_row + row;
        const int units = min(8, s.hidden - column);
        if (a.hidden != nullptr && units > 0) {
          store_eight(static_cast<T*>(a.hidden) + at * s.hidden + column, e, units,
                      stride == s.hidden);
        }
        activate<8, false>(s.act, e.v, nullptr);  // 0 of the units that pad a row, which are 0
        store_eight(static_cast<T*>(a.activated) + at * stride + column, e, count, true);
      }
    }
    __syncwarp();
  }
}

// z = x + k ls (ka activated W2^T + b2). Grid: B times the tiles of an image.
template <class M, int kSize>
__global__ void __launch_bounds__(threads_of(kSize))
    residual_kernel(const __grid_constant__ MlpForward a) {
  using T = Element<M>;
  using Products = TileProducts<M, kSize>;
  constexpr int kThreads = threads_of(kSize), kWarps = kThreads / kWarp;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float scale[kSize], bias[kSize];
  __shared__ Moments moments[kWarps];
  const MlpShape& s = a.shape;
  const MlpParameters& p = a.parameters;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Place place(s.rows, s.channels, kSize);
  for (int i = threadIdx.x; i < kSize; i += kThreads) {
    const bool there = place.column + i < s.channels;
    scale[i] = there ? load(p.layer_scale, place.column + i, 1.f) : 0.f;
    bias[i] = there ? load(p.fc2_bias, place.column + i, 0.f) : 0.f;
  }

  const int stride = hidden_stride(s.hidden);
  const T* activated = static_cast<const T*>(a.activated) + place.image * s.rows * stride;
  Products products;
  const auto nothing = [](auto...) {};
  const auto copy = [&](int block, uint4* to) {
    load_tile<T, kSize, 4>(to, static_cast<const T*>(p.fc2_weight), place.column, block * kDepth<T>,
                           s.channels, s.hidden, s.hidden);
    load_tile<T, kSize, 4>(to + Products::kOperand, activated, place.row, block * kDepth<T>, s.rows,
                           stride, stride);
  };
  products.run(reinterpret_cast<uint4*>(shared), (s.hidden - 1) / kDepth<T> + 1, nothing, nothing,
               copy);

  const Pixels<T> pixels(s);
  const void* x = pixels.image(a.x, place.image);
  void* z = const_cast<void*>(pixels.image(a.z, place.image));
  const float drop = load(p.drop_path, place.image, 1.f);
  const float hidden_drop = load(p.hidden_drop_path, place.image, 1.f);
  float* const piece = reinterpret_cast<float*>(shared + warp * kPieceBytes);
  const int columns = products.column(warp);
  Collector collector;
#pragma unroll
  for (int m = 0; m < Products::kPieces; ++m) {
    store_sums(piece, products.sums[m], lane, s.channels_last);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Run run = run_of_lane(lane, i, s.channels_last);
      const int row = place.row + products.row(warp, m) + run.row;
      const int local = columns + run.column, column = place.column + local;
      const int count = pixels.count(row, column);
      Eight e = load_sums(piece, run, s.channels_last);
      if (count > 0) {
        const Eight residual = pixels.load(x, row, column, count);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const int channel = s.channels_last ? local + k : local;
          const float branch = fmaf(hidden_drop, e.v[k], bias[channel]);
          e.v[k] = fmaf(drop * scale[channel], branch, residual.v[k]);
        }
        e = pixels.store(z, row, column, e, count);
        if (a.stats_out != nullptr) collector.add(e.v, count);
      }
    }
    __syncwarp();
  }
  if (a.stats_out != nullptr) {
    const Moments m = merge_lanes(collector.moments());
    if (lane == 0) moments[warp] = m;
    __syncthreads();
    if (threadIdx.x == 0) {
      store_merged(a.stats_out + 3 * static_cast<int64_t>(blockIdx.x), moments, kWarps);
    }
  }
}

// saved of each image and group. Grid: as many warps.
__global__ void merge_kernel(const __grid_constant__ MlpForward a) {
  const int64_t i = blockIdx.x;
  const float2 norm = merge_partials(a.stats + i * a.partials * 3, a.partials, a.eps, threadIdx.x);
  if (threadIdx.x == 0) {
    a.saved[2 * i] = norm.x;
    a.saved[2 * i + 1] = norm.y;
  }
}

// merged: (count, mean, M2) of each image and group. Grid: as many warps.
__global__ void merge_moments_kernel(const float* stats, int partials, float* merged) {
  const int64_t i = blockIdx.x;
  stats += i * partials * 3;
  Moments own;
  for (int part = threadIdx.x; part < partials; part += kWarp) {
    own.merge({stats[3 * part], stats[3 * part + 1], stats[3 * part + 2]});
  }
  own = merge_lanes(own);
  if (threadIdx.x == 0) store_merged(merged + 3 * i, &own, 1);
}

template <class Kernel>
cudaError_t launch(Kernel kernel, int64_t blocks, int threads, int bytes, const MlpForward& a,
                   cudaStream_t stream) {
  if (cudaError_t e =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      e != cudaSuccess) {
    return e;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(a);
  return cudaGetLastError();
}

template <class M, int kSize>
cudaError_t launch_hidden(const MlpForward& a, cudaStream_t stream) {
  const MlpShape& s = a.shape;
  const int table = (3 * s.channels + kSize) * static_cast<int>(sizeof(float));
  return launch(hidden_kernel<M, kSize>, s.batch * tiles_of(s.rows, s.hidden, kSize),
                threads_of(kSize), TileProducts<M, kSize>::kBytes + table, a, stream);
}

template <class M, int kSize>
cudaError_t launch_residual(const MlpForward& a, cudaStream_t stream) {
  const MlpShape& s = a.shape;
  return launch(residual_kernel<M, kSize>, s.batch * tiles_of(s.rows, s.channels, kSize),
                threads_of(kSize), TileProducts<M, kSize>::kBytes, a, stream);
}

template <class M>
cudaError_t launch_products(const MlpForward& a, cudaStream_t stream) {
  const MlpShape& s = a.shape;
  constexpr int kProductBytes = sizeof(Element<M>);
  const auto chosen = [&](int columns, auto large, auto small) {
    return tile_size(s.rows, columns, kProductBytes) == 128 ? large(a, stream) : small(a, stream);
  };
  if (s.groups > 1) {
    merge_kernel<<<static_cast<unsigned>(s.batch * s.groups), kWarp, 0, stream>>>(a);
    if (cudaError_t e = cudaGetLastError(); e != cudaSuccess) return e;
  }
  if constexpr (kProductBytes == 4) {
    if (cudaError_t e = launch_hidden<M, 64>(a, stream); e != cudaSuccess) return e;
    return launch_residual<M, 64>(a, stream);
  } else {
    cudaError_t e = chosen(s.hidden, launch_hidden<M, 128>, launch_hidden<M, 64>);
    if (e != cudaSuccess) return e;
    return chosen(s.channels, launch_residual<M, 128>, launch_residual<M, 64>);
  }
}

}  // namespace
}  // namespace mlp

int64_t mlp_hidden_stride(int64_t hidden) { return mlp::hidden_stride(hidden); }

int64_t mlp_most_channels() { return mlp::kMostChannels; }

int64_t mlp_partials(int64_t rows, int64_t channels, int64_t groups, int64_t product_bytes) {
  if (groups > 1) return 1;
  if (mlp_is_fused(channels, 1, product_bytes)) return mlp_fused_partials(rows);
  return mlp::tiles_of(rows, channels, mlp::tile_size(rows, channels, product_bytes));
}

cudaError_t mlp_merge_statistics(const float* stats, int partials, int64_t image_groups,
                                 float* merged, cudaStream_t stream) {
  mlp::merge_moments_kernel<<<static_cast<unsigned>(image_groups), kWarp, 0, stream>>>(
      stats, partials, merged);
  return cudaGetLastError();
}

cudaError_t mlp_forward(const MlpForward& a, cudaStream_t stream) {
  const MlpShape& s = a.shape;
  const bool is_float = s.product_dtype == Dtype::kFloat32;
  if (mlp_is_fused(s.channels, s.groups, is_float ? 4 : 2)) return mlp_fused_forward(a, stream);
  if (is_float && s.tf32) return mlp::launch_products<mlp::Tf32>(a, stream);
  if (is_float) return mlp::launch_products<float>(a, stream);
  return s.product_dtype == Dtype::kBFloat16 ? mlp::launch_products<__nv_bfloat16>(a, stream)
                                             : mlp::launch_products<__half>(a, stream);
}

}  // namespace poolformer::cuda

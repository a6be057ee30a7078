// The forward as two products, each with its half of the work around it: for widths whose sums do
// not fit the registers, several groups, and float32.
//
// A block makes a tile of the result. Operands lie in shared memory by blocks of 64 bytes of the
// summed dimension, in a ring of stages. Weights and the hidden are copied asynchronously; x goes
// through registers, where it is normed.
#include "activations.cuh"
#include "mlp_products.cuh"
#include "moments.cuh"

namespace poolformer::cuda {
namespace mlp {
namespace {

// Of a multiprocessor, `most` of small tiles: left to itself ptxas stops at 72 or 128 registers on
// sm_100 and spills.
template <class M>
constexpr int blocks_of(int size, int most) {
  return size == 128 ? 2 : std::is_same_v<M, float> ? 3 : most;
}

// activated = act(h), h = GN(x) W1^T + b1. Grid: B times the tiles of an image.
template <class M, int kSize>
__global__ void __launch_bounds__(threads_of(kSize), blocks_of<M>(kSize, 4))
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

  PixelRuns<T, kSize, kDepth<T>, kThreads> runs(pixels);
  const auto fetch = [&](int block) { runs.fetch(x, place.row, block * kDepth<T>); };
  const auto deposit = [&](int block, uint4* to) {
    runs.template deposit<typename Products::A>(
        Products::a_of(to), place.row, block * kDepth<T>, [&](float value, int channel, int) {
          return fmaf(value - table[channel], table[s.channels + channel],
                      table[2 * s.channels + channel]);
        });
  };
  const auto copy = [&](int block, uint4* to) {
    Products::B::copy(Products::b_of(to), static_cast<const T*>(p.fc1_weight), place.column,
                      block * kDepth<T>, s.hidden, s.channels, s.channels);
  };
  const auto nothing = [](auto...) {};
  Products products;
  products.run(stages, (s.channels - 1) / kDepth<T> + 1, fetch, deposit, copy, nothing);

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
__global__ void __launch_bounds__(threads_of(kSize), blocks_of<M>(kSize, 5))
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
    Products::B::copy(Products::b_of(to), static_cast<const T*>(p.fc2_weight), place.column,
                      block * kDepth<T>, s.channels, s.hidden, s.hidden);
    Products::A::copy(Products::a_of(to), activated, place.row, block * kDepth<T>, s.rows, stride,
                      stride);
  };
  products.run(reinterpret_cast<uint4*>(shared), (s.hidden - 1) / kDepth<T> + 1, nothing, nothing,
               copy, nothing);

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

}  // namespace
}  // namespace mlp

int64_t mlp_hidden_stride(int64_t hidden) { return mlp::hidden_stride(hidden); }

int64_t mlp_most_channels() { return mlp::kMostChannels; }

int64_t mlp_partials(int64_t rows, int64_t channels, int64_t groups, int64_t product_bytes) {
  if (groups > 1) return 1;
  if (mlp_is_fused(channels, 1, product_bytes)) return mlp_fused_partials(rows);
  return mlp::tiles_of(rows, channels, mlp::tile_size(rows, channels, product_bytes));
}

cudaError_t mlp_forward(const MlpForward& a, cudaStream_t stream) {
  const MlpShape& s = a.shape;
  if (mlp_is_fused(s.channels, s.groups, s.product_dtype == Dtype::kFloat32 ? 4 : 2)) {
    return mlp_fused_forward(a, stream);
  }
  if (s.groups > 1) {
    if (cudaError_t e = mlp_merge_saved(a, stream); e != cudaSuccess) return e;
  }
  return mlp::with_products(s, [&](auto kind) {
    using M = decltype(kind);
    cudaError_t e = mlp::with_tile_size<M>(mlp::tile_of(s, s.hidden), [&](auto size) {
      return mlp::launch_hidden<M, size()>(a, stream);
    });
    if (e != cudaSuccess) return e;
    return mlp::with_tile_size<M>(mlp::tile_of(s, s.channels), [&](auto size) {
      return mlp::launch_residual<M, size()>(a, stream);
    });
  });
}

}  // namespace poolformer::cuda

// The gradient of the MLP's input, and what those of its parameters are made of.
//
// Symbols: g = dz, k and ka the drop-path factors, h = fc1's result, a = ka act(h), dh = dL/dh,
// dn = dh W1 = dL/dGN(x), n the elements of an image and group, x^ = (x - mean) / std.
//   dx = g + (gamma dn - c2 - x^ c1) / std,  c2 = sum gamma dn / n,  c1 = sum gamma dn x^ / n
// With one group these sums are taken beside dh, over rows and hidden units:
//   c2 = sum dh w~ / n,  c1 = sum dh (h - b~) / n  for  w~ = W1 gamma,  b~ = W1 beta + b1.
#include "activations.cuh"
#include "mlp_products.cuh"
#include "moments.cuh"

namespace poolformer::cuda {
namespace mlp {
namespace {

// activated = a, dhidden = dh, and with one group the sums of c2 and c1 of a tile. Grid: B times
// the tiles of (rows, hidden).
template <class M, int kSize>
__global__ void __launch_bounds__(threads_of(kSize))
    hidden_gradient_kernel(const __grid_constant__ MlpBackward a) {
  using T = Element<M>;
  using First = TileProducts<M, kSize>;
  using Second = TileProducts<M, kSize, Order::kDeep, Order::kWide>;
  constexpr int kThreads = threads_of(kSize), kWarps = kThreads / kWarp;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float bias[kSize], weight_sum[kSize], folded_bias[kSize];
  __shared__ float2 warp_sums[kWarps];
  uint4* const stages = reinterpret_cast<uint4*>(shared);
  float* const table = reinterpret_cast<float*>(shared + First::kBytes);
  const MlpShape& s = a.shape;
  const MlpParameters& p = a.parameters;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Place place(s.rows, s.hidden, kSize);
  const Pixels<T> pixels(s);

  for (int i = threadIdx.x; i < s.channels; i += kThreads) {
    const float* saved = a.saved + 2 * (place.image * s.groups + i / (s.channels / s.groups));
    table[i] = saved[0];
    table[s.channels + i] = saved[1] * load(p.norm_weight, i, 1.f);
    table[2 * s.channels + i] = load(p.norm_bias, i, 0.f);
    table[3 * s.channels + i] = load(p.layer_scale, i, 1.f);
  }
  for (int i = threadIdx.x; i < kSize; i += kThreads) {
    const int unit = place.column + i;
    const bool there = unit < s.hidden;
    bias[i] = there ? load(p.fc1_bias, unit, 0.f) : 0.f;
    weight_sum[i] = there && a.folded != nullptr ? a.folded[unit] : 0.f;
    folded_bias[i] = there && a.folded != nullptr ? a.folded[s.hidden + unit] : 0.f;
  }
  __syncthreads();

  const int blocks = (s.channels - 1) / kDepth<T> + 1;
  PixelRuns<T, kSize, kDepth<T>, kThreads> runs(pixels);
  const auto nothing = [](auto...) {};
  First h;
  if (a.hidden == nullptr) {
    const void* x = pixels.image(a.x, place.image);
    const auto fetch = [&](int block) { runs.fetch(x, place.row, block * kDepth<T>); };
    const auto deposit = [&](int block, uint4* to) {
      runs.template deposit<typename First::A>(
          First::a_of(to), place.row, block * kDepth<T>, [&](float value, int channel, int) {
            return fmaf(value - table[channel], table[s.channels + channel],
                        table[2 * s.channels + channel]);
          });
    };
    const auto copy = [&](int block, uint4* to) {
      First::B::copy(First::b_of(to), static_cast<const T*>(p.fc1_weight), place.column,
                     block * kDepth<T>, s.hidden, s.channels, s.channels);
    };
    h.run(stages, blocks, fetch, deposit, copy, nothing);
  }

  const void* dz = pixels.image(a.dz, place.image);
  const auto fetch = [&](int block) { runs.fetch(dz, place.row, block * kDepth<T>); };
  const auto deposit = [&](int block, uint4* to) {
    runs.template deposit<typename Second::A>(
        Second::a_of(to), place.row, block * kDepth<T>,
        [&](float value, int channel, int) { return value * table[3 * s.channels + channel]; });
  };
  const auto copy = [&](int block, uint4* to) {
    Second::B::copy(Second::b_of(to), static_cast<const T*>(p.fc2_weight), block * kDepth<T>,
                    place.column, s.channels, s.hidden, s.hidden);
  };
  Second da;
  da.run(stages, blocks, fetch, deposit, copy, nothing);

  const int stride = hidden_stride(s.hidden);
  const int64_t first_row = place.image * s.rows + place.row;
  const float hidden_drop = load(p.hidden_drop_path, place.image, 1.f);
  const float drop = hidden_drop * load(p.drop_path, place.image, 1.f);
  float* const piece = reinterpret_cast<float*>(shared + warp * kPieceBytes);
  const int columns = First::column(warp);
  float2 sums = {};
#pragma unroll
  for (int m = 0; m < First::kPieces; ++m) {
    Eight value[2];
    if (a.hidden == nullptr) {
      store_sums(piece, h.sums[m], lane, true);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 2; ++i) value[i] = load_sums(piece, run_of_lane(lane, i, true), true);
      __syncwarp();
    }
    store_sums(piece, da.sums[m], lane, true);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Run run = run_of_lane(lane, i, true);
      const int row = First::row(warp, m) + run.row, local = columns + run.column;
      const int column = place.column + local;
      const int count = place.row + row < s.rows ? min(8, stride - column) : 0;
      const int64_t at = first_row + row;
      Eight gradient = load_sums(piece, run, true);
      if (count > 0) {
        Eight& v = value[i];
        if (a.hidden != nullptr) {
          const T* hidden = static_cast<const T*>(a.hidden) + at * s.hidden + column;
          v = expand<T>(
              load_raw(hidden, min(8, s.hidden - column), stride == s.hidden, sizeof(T) == 4),
              sizeof(T) == 4);
        } else {
#pragma unroll
          for (int k = 0; k < 8; ++k) v.v[k] += bias[local + k];
        }
        float before[8], slope[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) before[k] = v.v[k] - folded_bias[local + k];
        activate<8, true>(s.act, v.v, slope);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          v.v[k] *= hidden_drop;
          gradient.v[k] *= slope[k] * drop;
        }
        store_eight(static_cast<T*>(a.activated) + at * stride + column, v, count, true);
        const Raw raw = round_to<T>(gradient, sizeof(T) == 4);
        store_raw(static_cast<T*>(a.dhidden) + at * stride + column, raw, count, true,
                  sizeof(T) == 4);
        gradient = expand<T>(raw, sizeof(T) == 4);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          sums.x = fmaf(gradient.v[k], weight_sum[local + k], sums.x);
          sums.y = fmaf(gradient.v[k], before[k], sums.y);
        }
      }
    }
    __syncwarp();
  }
  if (a.norm_sums == nullptr) return;
  sums = make_float2(sum_of_lanes(sums.x), sum_of_lanes(sums.y));
  if (lane == 0) warp_sums[warp] = sums;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 1; i < kWarps; ++i) {
      sums.x += warp_sums[i].x;
      sums.y += warp_sums[i].y;
    }
    reinterpret_cast<float2*>(a.norm_sums)[blockIdx.x] = sums;
  }
}

// Of a multiprocessor: left to itself ptxas stops at 72 registers on sm_100 and spills.
template <class M>
constexpr int input_gradient_blocks(int size) {
  return size == 128 ? 2 : std::is_same_v<M, float> ? 3 : 5;
}

// dx; with several groups gamma dn, of which mlp_norm_gradient makes it. Grid: B times the tiles
// of (rows, C).
template <class M, int kSize>
__global__ void __launch_bounds__(threads_of(kSize), input_gradient_blocks<M>(kSize))
    input_gradient_kernel(const __grid_constant__ MlpBackward a) {
  using T = Element<M>;
  using Products = TileProducts<M, kSize, Order::kDeep, Order::kWide>;
  constexpr int kThreads = threads_of(kSize);
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float scale[kSize];
  const MlpShape& s = a.shape;
  const MlpParameters& p = a.parameters;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Place place(s.rows, s.channels, kSize);
  for (int i = threadIdx.x; i < kSize; i += kThreads) {
    scale[i] = place.column + i < s.channels ? load(p.norm_weight, place.column + i, 1.f) : 0.f;
  }
  float mean = 0, rstd = 1, along_one = 0, along_x = 0;
  if (a.norm_sums != nullptr) {
    const float2* sums = reinterpret_cast<const float2*>(a.norm_sums) + place.image * a.norm_parts;
    for (int i = lane; i < a.norm_parts; i += kWarp) {
      along_one += sums[i].x;
      along_x += sums[i].y;
    }
    mean = a.saved[2 * place.image];
    rstd = a.saved[2 * place.image + 1];
    const float count = static_cast<float>(s.rows) * static_cast<float>(s.channels);
    along_one = sum_of_lanes(along_one) / count;
    along_x = sum_of_lanes(along_x) / count * rstd;
  }

  const int stride = hidden_stride(s.hidden);
  const T* dhidden = static_cast<const T*>(a.dhidden) + place.image * s.rows * stride;
  const auto nothing = [](auto...) {};
  const auto copy = [&](int block, uint4* to) {
    Products::A::copy(Products::a_of(to), dhidden, place.row, block * kDepth<T>, s.rows, stride,
                      stride);
    Products::B::copy(Products::b_of(to), static_cast<const T*>(p.fc1_weight), block * kDepth<T>,
                      place.column, s.hidden, s.channels, s.channels);
  };
  Products products;
  products.run(reinterpret_cast<uint4*>(shared), (s.hidden - 1) / kDepth<T> + 1, nothing, nothing,
               copy, nothing);

  const Pixels<T> pixels(s);
  const void *x = pixels.image(a.x, place.image), *dz = pixels.image(a.dz, place.image);
  void* dx = const_cast<void*>(pixels.image(a.dx, place.image));
  float* const piece = reinterpret_cast<float*>(shared + warp * kPieceBytes);
  const int columns = Products::column(warp);
#pragma unroll
  for (int m = 0; m < Products::kPieces; ++m) {
    store_sums(piece, products.sums[m], lane, s.channels_last);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Run run = run_of_lane(lane, i, s.channels_last);
      const int row = place.row + Products::row(warp, m) + run.row;
      const int local = columns + run.column, column = place.column + local;
      const int count = pixels.count(row, column);
      Eight e = load_sums(piece, run, s.channels_last);
      if (count > 0) {
#pragma unroll
        for (int k = 0; k < 8; ++k) e.v[k] *= scale[s.channels_last ? local + k : local];
        if (a.norm_sums != nullptr) {
          const Eight input = pixels.load(x, row, column, count);
          const Eight residual = pixels.load(dz, row, column, count);
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            const float rest = e.v[k] - along_one - (input.v[k] - mean) * along_x;
            e.v[k] = fmaf(rest, rstd, residual.v[k]);
          }
        }
        pixels.store(dx, row, column, e, count);
      }
    }
    __syncwarp();
  }
}

// Large tiles leave room for one block of a multiprocessor, which hides no latency of its own: they
// pay where the summed dimension is long.
int hidden_gradient_tile(const MlpShape& s) {
  return s.channels <= 128 ? 64 : tile_of(s, s.hidden);
}

template <class M, int kSize>
cudaError_t launch_hidden_gradient(const MlpBackward& a, cudaStream_t stream) {
  const MlpShape& s = a.shape;
  const int table = 4 * s.channels * static_cast<int>(sizeof(float));
  return launch(hidden_gradient_kernel<M, kSize>, s.batch * tiles_of(s.rows, s.hidden, kSize),
                threads_of(kSize), TileProducts<M, kSize>::kBytes + table, a, stream);
}

template <class M, int kSize>
cudaError_t launch_input_gradient(const MlpBackward& a, cudaStream_t stream) {
  const MlpShape& s = a.shape;
  return launch(input_gradient_kernel<M, kSize>, s.batch * tiles_of(s.rows, s.channels, kSize),
                threads_of(kSize), TileProducts<M, kSize>::kBytes, a, stream);
}

}  // namespace
}  // namespace mlp

int mlp_norm_parts(const MlpShape& s) {
  return static_cast<int>(mlp::tiles_of(s.rows, s.hidden, mlp::hidden_gradient_tile(s)));
}

cudaError_t mlp_input_gradient(const MlpBackward& a, cudaStream_t stream) {
  const MlpShape& s = a.shape;
  if (s.groups == 1) {
    if (cudaError_t e = mlp_fold(a, stream); e != cudaSuccess) return e;
  }
  cudaError_t e = mlp::with_products(s, [&](auto kind) {
    using M = decltype(kind);
    cudaError_t e = mlp::with_tile_size<M>(mlp::hidden_gradient_tile(s), [&](auto size) {
      return mlp::launch_hidden_gradient<M, size()>(a, stream);
    });
    if (e != cudaSuccess) return e;
    return mlp::with_tile_size<M>(mlp::tile_of(s, s.channels), [&](auto size) {
      return mlp::launch_input_gradient<M, size()>(a, stream);
    });
  });
  return e != cudaSuccess || s.groups == 1 ? e : mlp_norm_gradient(a, stream);
}

}  // namespace poolformer::cuda

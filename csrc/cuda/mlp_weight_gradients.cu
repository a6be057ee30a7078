// Gradients of the MLP's parameters: split over rows into float32 parts, summed in a fixed order by
// mlp_sum_parts.
//
// With E = sum x^T dh and D = sum (k g)^T a, both (C, hidden), e = sum dh and d = sum k g over the
// rows of all images, where x^ = (x - mean) / std:
//   dW1 = (gamma E)^T + e beta^T    db1 = e         dgamma = sum_j W1 E    dbeta = e W1
//   dW2 = ls D                      db2 = ls d      dls = sum_j W2 D + b2 d
#include <algorithm>

#include "mlp_products.cuh"
#include "moments.cuh"

namespace poolformer::cuda {
namespace mlp {
namespace {

constexpr int kSums = 264 * 128 * 128;  // of all parts: twice as many tiles as an H100 has blocks
constexpr int kFewestBlocks = 4;        // of rows in a part

// Stores the sums of kSize positions, of which `count` are there, over `slots` rows of `shared`.
template <int kSize>
__device__ __forceinline__ void store_totals(float* to, int count, const float* shared, int slots) {
  __syncthreads();
  if (threadIdx.x >= min(kSize, count)) return;
  float total = 0;
#pragma unroll 1
  for (int i = 0; i < slots; ++i) total += shared[i * kSize + threadIdx.x];
  to[threadIdx.x] = total;
}

// Sums over the rows of operand b, of hidden units: as it lies in each stage.
template <class M, int kSize, class Operand>
class UnitSums {
 public:
  __device__ void add(const uint4* operand) {
    using T = Element<M>;
    constexpr int kLines = kDepth<T> / kSlots;
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      const T* at =
          Operand::element(reinterpret_cast<const T*>(operand), slot() * kLines + i, pair() * 2);
      float2 v;
      if constexpr (sizeof(T) == 2) {
        v = unpack<T>(*reinterpret_cast<const uint32_t*>(at));
      } else {
        v = *reinterpret_cast<const float2*>(at);
      }
      sum_.x += v.x;
      sum_.y += v.y;
    }
  }

  __device__ void store(float* to, int count, float* shared) const {
    reinterpret_cast<float2*>(shared + slot() * kSize)[pair()] = sum_;
    store_totals<kSize>(to, count, shared, kSlots);
  }

 private:
  static constexpr int kSlots = 4;
  static_assert(kSlots * kSize / 2 == threads_of(kSize));

  __device__ static int slot() { return threadIdx.x / (kSize / 2); }
  __device__ static int pair() { return threadIdx.x % (kSize / 2); }

  float2 sum_ = {};
};

// Sums over the rows of what is to be operand a, of channels: before it is rounded. A thread's runs
// are all of the same channels.
template <int kSize>
class ChannelSums {
 public:
  __device__ void add(int place, float value) { sums_.v[place] += value; }

  __device__ void store(float* to, int count, float* shared, bool channels_last) const {
    constexpr int kAcross = kSize / 8, kThreads = threads_of(kSize);
    const float (&v)[8] = sums_.v;
    if (channels_last) {
      float4* at = reinterpret_cast<float4*>(shared) + threadIdx.x * 2;
      at[0] = make_float4(v[0], v[1], v[2], v[3]);
      at[1] = make_float4(v[4], v[5], v[6], v[7]);
    } else {
      shared[threadIdx.x] = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    }
    store_totals<kSize>(to, count, shared, kThreads / (channels_last ? kAcross : kSize));
  }

 private:
  Eight sums_ = {};
};

// A part of E or D, and of e or d. Grid: parts, times 2, times the tiles of (C, hidden).
template <class M, int kSize>
__global__ void __launch_bounds__(threads_of(kSize))
    parts_kernel(const __grid_constant__ MlpBackward a) {
  using T = Element<M>;
  using Products = TileProducts<M, kSize, Order::kWide, Order::kWide>;
  constexpr int kThreads = threads_of(kSize);
  extern __shared__ __align__(128) unsigned char shared[];
  const MlpShape& s = a.shape;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Place place(s.channels, s.hidden, kSize);  // its "image": a part of E or D
  const bool of_x = place.image % 2 == 0;
  const int64_t part = place.image / 2;
  const int image_blocks = (s.rows - 1) / kDepth<T> + 1, stride = hidden_stride(s.hidden);
  const int first = static_cast<int>(part) * a.split.a_part;
  const int blocks = min(a.split.a_part, a.split.blocks - first);
  const Pixels<T> pixels(s);
  const void* const source = of_x ? a.x : a.dz;
  const T* const units = static_cast<const T*>(of_x ? a.dhidden : a.activated);

  PixelRuns<T, kDepth<T>, kSize, kThreads> runs(pixels);
  UnitSums<M, kSize, typename Products::B> unit_sums;
  ChannelSums<kSize> channel_sums;
  const auto row_of = [&](int block) { return (first + block) % image_blocks * kDepth<T>; };
  const auto fetch = [&](int block) {
    runs.fetch(pixels.image(source, (first + block) / image_blocks), row_of(block), place.row);
  };
  const auto deposit = [&](int block, uint4* to) {
    const int64_t image = (first + block) / image_blocks;
    uint4* const operand = Products::a_of(to);
    const auto store = [&](auto change) {
      runs.template deposit<typename Products::A>(operand, row_of(block), place.row, change);
    };
    const float* saved = a.saved + 2 * image * s.groups;
    if (!of_x) {
      const float drop = load(a.parameters.drop_path, image, 1.f);
      store([&](float value, int, int place) {
        value *= drop;
        channel_sums.add(place, value);
        return value;
      });
    } else if (s.groups == 1) {
      const float mean = __ldg(saved), rstd = __ldg(saved + 1);
      store([&](float value, int, int) { return (value - mean) * rstd; });
    } else {
      const int group_channels = s.channels / s.groups;
      store([&](float value, int channel, int) {
        const float* norm = saved + channel / group_channels * 2;
        return (value - __ldg(norm)) * __ldg(norm + 1);
      });
    }
  };
  const auto copy = [&](int block, uint4* to) {
    const int64_t image = (first + block) / image_blocks;
    Products::B::copy(Products::b_of(to), units + image * s.rows * stride, row_of(block),
                      place.column, s.rows, stride, stride);
  };
  const bool sums_units = of_x && place.row == 0, sums_channels = !of_x && place.column == 0;
  const auto visit = [&](const uint4* stage) {
    if (sums_units) unit_sums.add(Products::b_of(stage));
  };
  Products products;
  products.run(reinterpret_cast<uint4*>(shared), blocks, fetch, deposit, copy, visit);

  float* const to = a.products + place.image * s.channels * s.hidden;
  float* const piece = reinterpret_cast<float*>(shared + warp * kPieceBytes);
#pragma unroll
  for (int m = 0; m < Products::kPieces; ++m) {
    store_sums(piece, products.sums[m], lane, true);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Run run = run_of_lane(lane, i, true);
      const int channel = place.row + Products::row(warp, m) + run.row;
      const int unit = place.column + Products::column(warp) + run.column;
      const int count = channel < s.channels ? min(8, s.hidden - unit) : 0;
      store_eight(to + static_cast<int64_t>(channel) * s.hidden + unit, load_sums(piece, run, true),
                  count, s.hidden % 8 == 0);
    }
    __syncwarp();
  }
  __syncthreads();
  float* const totals = reinterpret_cast<float*>(shared);
  if (sums_units) {
    unit_sums.store(a.unit_sums + part * s.hidden + place.column, s.hidden - place.column, totals);
  }
  if (sums_channels) {
    channel_sums.store(a.channel_sums + part * s.channels + place.row, s.channels - place.row,
                       totals, s.channels_last);
  }
}

// Of (C, hidden).
int weights_tile(const MlpShape& s) {
  return s.channels % 128 == 0 && s.hidden % 128 == 0 && s.product_dtype != Dtype::kFloat32 ? 128
                                                                                            : 64;
}

template <class M, int kSize>
cudaError_t launch_parts(const MlpBackward& a, cudaStream_t stream) {
  const MlpShape& s = a.shape;
  return launch(parts_kernel<M, kSize>, a.split.parts * 2 * tiles_of(s.channels, s.hidden, kSize),
                threads_of(kSize), TileProducts<M, kSize>::kBytes, a, stream);
}

}  // namespace
}  // namespace mlp

MlpSplit mlp_split(const MlpShape& s) {
  const int depth = s.product_dtype == Dtype::kFloat32 ? mlp::kDepth<float> : mlp::kDepth<__half>;
  const int size = mlp::weights_tile(s);
  const int64_t sums = 2 * mlp::tiles_of(s.channels, s.hidden, size) * size * size;
  const int64_t blocks = s.batch * ((s.rows - 1) / depth + 1);
  const int64_t most = std::max<int64_t>(1, mlp::kSums / sums);
  const int64_t a_part =
      std::max<int64_t>((blocks - 1) / most + 1, std::min<int64_t>(blocks, mlp::kFewestBlocks));
  return {static_cast<int>(blocks), static_cast<int>(a_part),
          static_cast<int>((blocks - 1) / a_part + 1)};
}

cudaError_t mlp_weight_gradients(const MlpBackward& a, cudaStream_t stream) {
  const MlpShape& s = a.shape;
  cudaError_t e = mlp::with_products(s, [&](auto kind) {
    using M = decltype(kind);
    return mlp::with_tile_size<M>(
        mlp::weights_tile(s), [&](auto size) { return mlp::launch_parts<M, size()>(a, stream); });
  });
  return e != cudaSuccess ? e : mlp_sum_parts(a, stream);
}

}  // namespace poolformer::cuda

// What the kernels share that make tiles of products: their place, what they read, their launch.
#pragma once

#include "products.cuh"

namespace poolformer::cuda::mlp {

constexpr int kMostChannels = 2048;  // whose parameters fit in shared memory beside the stages

// Rows and columns of a tile, both.
inline int tile_size(int64_t rows, int64_t columns, int64_t product_bytes) {
  return product_bytes == 2 && rows > 64 && columns % 128 == 0 ? 128 : 64;
}

inline int64_t tiles_of(int64_t rows, int64_t columns, int tile) {
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

// kRows pixels and kColumns channels of an image on their way through kThreads threads' registers
// to an operand: runs along whichever of them lie side by side.
template <class T, int kRows, int kColumns, int kThreads>
class PixelRuns {
 public:
  __device__ explicit PixelRuns(const Pixels<T>& pixels) : pixels_(pixels) {}

  __device__ void fetch(const void* image, int row, int channel) {
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const Run run = run_of(i);
      const int count = pixels_.count(row + run.row, channel + run.column);
      raw_[i] = pixels_.fetch(image, row + run.row, channel + run.column, count);
    }
  }

  // Stores change(value, channel, place in the run) of what was fetched from the same place; zeros
  // beyond the image.
  template <class Operand, class Change>
  __device__ void deposit(uint4* operand, int row, int channel, Change change) const {
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const Run run = run_of(i);
      const int first = channel + run.column, count = pixels_.count(row + run.row, first);
      Eight e = expand<T>(raw_[i], pixels_.is_float);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (k < count) e.v[k] = change(e.v[k], pixels_.channels_last ? first + k : first, k);
      }
      Operand::store_run(operand, run, e, pixels_.channels_last);
    }
  }

 private:
  static constexpr int kRuns = kRows * kColumns / 8 / kThreads;

  __device__ Run run_of(int i) const {
    const int index = threadIdx.x + i * kThreads;
    constexpr int kAcross = kColumns / 8;
    return pixels_.channels_last ? Run{index / kAcross, index % kAcross * 8}
                                 : Run{index / kColumns * 8, index % kColumns};
  }

  const Pixels<T>& pixels_;
  Raw raw_[kRuns];
};

// Calls launch(M{}) with how products of `shape` are taken.
template <class Launch>
cudaError_t with_products(const MlpShape& s, Launch launch) {
  if (s.product_dtype == Dtype::kBFloat16) return launch(__nv_bfloat16{});
  if (s.product_dtype == Dtype::kFloat16) return launch(__half{});
  return s.tf32 ? launch(Tf32{}) : launch(float{});
}

// tile_size of a (rows of an image, columns) product.
inline int tile_of(const MlpShape& s, int64_t columns) {
  return tile_size(s.rows, columns, s.product_dtype == Dtype::kFloat32 ? 4 : 2);
}

// Calls launch with the size of a tile as a constant.
template <class M, class Launch>
cudaError_t with_tile_size(int size, Launch launch) {
  if constexpr (sizeof(Element<M>) == 2) {
    if (size == 128) return launch(std::integral_constant<int, 128>{});
  }
  return launch(std::integral_constant<int, 64>{});
}

template <class Kernel, class Arguments>
cudaError_t launch(Kernel kernel, int64_t blocks, int threads, int bytes, const Arguments& a,
                   cudaStream_t stream) {
  if (cudaError_t e =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      e != cudaSuccess) {
    return e;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace poolformer::cuda::mlp

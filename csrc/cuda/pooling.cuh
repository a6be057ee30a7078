// Average pooling down the rows of a lane: P(x − centre), or its transpose.
#pragma once

#include "common.cuh"

namespace poolformer::cuda {

// A lane of an image: one column, and V channels from `data` (row 0, column 0) on.
template <class T, int V>
struct Lane {
  const T* data;
  int row_stride, column_stride, height, width, column;

  __device__ __forceinline__ Lane(const Image& image, const void* x, int64_t offset, int column)
      : data(static_cast<const T*>(x) + offset),
        row_stride(image.row_stride()),
        column_stride(image.column_stride()),
        height(image.height),
        width(image.width),
        column(column) {}

  __device__ __forceinline__ Pack<T, V> at(int row, int column) const {
    return load<V>(data + (row * row_stride + column * column_stride));
  }
};

// 1 / (places of the window around `position` that are in 0 … size − 1); position is in it.
__device__ __forceinline__ float inverse_count(int position, int size, int radius) {
  const int low = max(position - radius, 0), high = min(position + radius, size - 1);
  return __fdividef(1.f, static_cast<float>(high - low + 1));
}

// Pool<T, V, kTransposed>: prefetch(row, end), begin(centre), then next(row, …) for each of the
// rows [row, end), which gives P(x − centre) and x. kTransposed: values are divided by the counts
// of their own windows before they are summed.

// 3×3: the sums along a row serve the three rows whose windows hold them. The loads of a row are
// under way while the one before is worked on.
template <class T, int V, bool kTransposed>
class RollingPool {
 public:
  using Type = T;
  static constexpr int kVector = V;

  __device__ __forceinline__ RollingPool(const Lane<T, V>& lane, int)
      : lane_(lane), left_(weight(lane.column - 1)), right_(weight(lane.column + 1)) {
    middle_ = inverse_count(lane.column, lane.width, 1);
  }

  __device__ __forceinline__ void prefetch(int row, int end) {
    last_ = min(end, lane_.height - 1);
    if (row > 0) raw_above_ = load_row(row - 1);
    raw_ = load_row(row);
  }

  __device__ __forceinline__ void begin(int row, float centre) {
    centre_ = centre;
    row_sums(raw_above_, row - 1, above_);
    row_sums(raw_, row, here_);
    own_ = raw_.middle;
    if (row < last_) raw_ = load_row(row + 1);
  }

  __device__ __forceinline__ void next(int row, float (&pooled)[V], float (&own)[V]) {
    float below[V];
    unpack(own_, own);
    row_sums(raw_, row + 1, below);
    own_ = raw_.middle;
    if (row + 1 < last_) raw_ = load_row(row + 2);
    const float scale = kTransposed ? 1.f : middle_ * inverse_count(row, lane_.height, 1);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      pooled[i] = (above_[i] + here_[i] + below[i]) * scale;
      above_[i] = here_[i];
      here_[i] = below[i];
    }
  }

 private:
  struct Row {
    Pack<T, V> left, middle, right;
  };

  __device__ __forceinline__ float weight(int column) const {
    if (column < 0 || column >= lane_.width) return 0.f;
    return kTransposed ? inverse_count(column, lane_.width, 1) : 1.f;
  }

  // Where a neighbour is outside its weight is 0, and the lane's own value stands for it.
  __device__ __forceinline__ Row load_row(int row) const {
    Row raw;
    raw.middle = lane_.at(row, lane_.column);
    raw.left = left_ != 0.f ? lane_.at(row, lane_.column - 1) : raw.middle;
    raw.right = right_ != 0.f ? lane_.at(row, lane_.column + 1) : raw.middle;
    return raw;
  }

  __device__ __forceinline__ void row_sums(const Row& raw, int row, float (&sums)[V]) const {
    if (row < 0 || row >= lane_.height) {
#pragma unroll
      for (int i = 0; i < V; ++i) sums[i] = 0.f;
      return;
    }
    float left[V], middle[V], right[V];
    unpack(raw.left, left);
    unpack(raw.middle, middle);
    unpack(raw.right, right);
    const float scale = kTransposed ? inverse_count(row, lane_.height, 1) : 1.f;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float sum = middle[i] - centre_;
      if (kTransposed) sum *= middle_;
      sum += left_ * (left[i] - centre_);
      sum += right_ * (right[i] - centre_);
      sums[i] = kTransposed ? scale * sum : sum;
    }
  }

  const Lane<T, V> lane_;
  const float left_, right_;
  float middle_, centre_;
  int last_;             // row that is read
  Row raw_above_, raw_;  // of rows row − 1 and row until begin(), then raw_ of row + 1
  Pack<T, V> own_;
  float above_[V], here_[V];
};

// Any odd window, summed whole for each result.
template <class T, int V, bool kTransposed>
class WholePool {
 public:
  using Type = T;
  static constexpr int kVector = V;

  __device__ __forceinline__ WholePool(const Lane<T, V>& lane, int radius)
      : lane_(lane), radius_(radius) {}

  __device__ __forceinline__ void prefetch(int, int) {}
  __device__ __forceinline__ void begin(int, float centre) { centre_ = centre; }

  __device__ __forceinline__ void next(int row, float (&pooled)[V], float (&own)[V]) {
    const int top = max(row - radius_, 0), bottom = min(row + radius_, lane_.height - 1);
    const int first = max(lane_.column - radius_, 0);
    const int last = min(lane_.column + radius_, lane_.width - 1);
#pragma unroll
    for (int i = 0; i < V; ++i) pooled[i] = 0.f;
    for (int y = top; y <= bottom; ++y) {
      for (int x = first; x <= last; ++x) {
        float values[V];
        unpack(lane_.at(y, x), values);
        const float scale = kTransposed ? inverse_count(y, lane_.height, radius_) *
                                              inverse_count(x, lane_.width, radius_)
                                        : 1.f;
#pragma unroll
        for (int i = 0; i < V; ++i) pooled[i] += scale * (values[i] - centre_);
      }
    }
    if (!kTransposed) {
      const float scale = inverse_count(row, lane_.height, radius_) *
                          inverse_count(lane_.column, lane_.width, radius_);
#pragma unroll
      for (int i = 0; i < V; ++i) pooled[i] *= scale;
    }
    unpack(lane_.at(row, lane_.column), own);
  }

 private:
  const Lane<T, V> lane_;
  const int radius_;
  float centre_;
};

// Calls launch with the pool of a dtype, a vector length and a window, as a Kind<Pool>.
template <class Pool>
struct Kind {
  using type = Pool;
};

template <bool kTransposed, class Launch>
cudaError_t with_pool(Dtype dtype, int vector, int radius, Launch&& launch) {
  return with_type(dtype, [&](auto value) {
    using T = decltype(value);
    constexpr int kV = kFullVector<T>;
    if (radius == 1) {
      if (vector > 1) return launch(Kind<RollingPool<T, kV, kTransposed>>{});
      return launch(Kind<RollingPool<T, 1, kTransposed>>{});
    }
    if (vector > 1) return launch(Kind<WholePool<T, kV, kTransposed>>{});
    return launch(Kind<WholePool<T, 1, kTransposed>>{});
  });
}

}  // namespace poolformer::cuda

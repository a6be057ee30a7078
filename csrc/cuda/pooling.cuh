// Average pooling down the rows of a lane: Px − x, or with P's transpose.
#pragma once

#include "common.cuh"

namespace poolformer::cuda {

// A column of an image, and V channels of it, from `data` (its row 0) on.
template <class T>
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
};

// Places of the window around `position` that are in 0 … size − 1; position is in it.
__device__ __forceinline__ float count(int position, int size, int radius) {
  return static_cast<float>(min(position + radius, size - 1) - max(position - radius, 0) + 1);
}

// The same of a window of three.
__device__ __forceinline__ float count_of_three(int position, int size) {
  return 1.f + (position > 0 ? 1.f : 0.f) + (position + 1 < size ? 1.f : 0.f);
}

// 3 / count of a window of three, without rounding.
__device__ __forceinline__ float weight_of_three(int position, int size) {
  const bool before = position > 0, after = position + 1 < size;
  return before && after ? 1.f : before || after ? 1.5f : 3.f;
}

// Pool<T, V, kTransposed>: prefetch(row, end), begin(row, centre), then next(row, …) for each of
// the rows [row, end), which gives Px − x and x. kTransposed: values are divided by the counts of
// their own windows before they are summed, which the largest count multiplies.
//
// P·1 = 1, so a constant cancels in Px − x, and for float32 `centre` is subtracted first to keep
// digits: a mean of 30 standard deviations costs five bits. 16-bit values were rounded at 2^-12 or
// coarser, beside which float32's roundings of their sums are nothing. Px − x is (n·Px − n·x) / n:
// a rounded 1/n times the sum would move every image to one side.
template <class T, bool kTransposed>
constexpr bool kCentred = sizeof(T) == 4 && !kTransposed;

// 3×3: the sums along a row serve the three rows whose windows hold them. The loads of a row are
// under way while the one before is worked on. kInShared: the lane lies in shared memory.
template <class T, int V, bool kTransposed, bool kInShared = false>
class RollingPool {
 public:
  using Type = T;
  static constexpr int kVector = V;
  static constexpr bool kStaged = kInShared;

  __device__ __forceinline__ RollingPool(const Lane<T>& lane, int)
      : next_(lane.data),
        row_stride_(lane.row_stride),
        height_(lane.height),
        // Outside the weight is 0, and the lane's own value stands for what is not there.
        to_left_(lane.column > 0 ? -lane.column_stride : 0),
        to_right_(lane.column + 1 < lane.width ? lane.column_stride : 0) {
    middle_ = left_ = right_ = 1.f;
    count_ = count_of_three(lane.column, lane.width);
    if (kTransposed) {
      middle_ = weight_of_three(lane.column, lane.width);
      left_ = weight_of_three(lane.column - 1, lane.width);
      right_ = weight_of_three(lane.column + 1, lane.width);
    }
    if (to_left_ == 0) left_ = 0.f;
    if (to_right_ == 0) right_ = 0.f;
  }

  // Starts the loads of the first two rows.
  __device__ __forceinline__ void prefetch(int row, int end) {
    last_ = min(end, height_ - 1);
    next_ += row * row_stride_;
    if (row > 0) {
      next_ -= row_stride_;
      raw_above_ = next_row();
    }
    raw_ = next_row();
  }

  __device__ __forceinline__ void begin(int row, float centre) {
    centre_ = centre;
    row_sums(raw_above_, row - 1, above_);
    row_sums(raw_, row, here_);
    own_ = raw_.middle;
    if (row < last_) raw_ = next_row();
  }

  __device__ __forceinline__ void next(int row, float (&difference)[V], float (&own)[V]) {
    float below[V];
    unpack(own_, own);
    row_sums(raw_, row + 1, below);
    own_ = raw_.middle;
    if (row + 1 < last_) raw_ = next_row();
    const float places = kTransposed ? 9.f : count_ * count_of_three(row, height_);
    const float inverse = kTransposed ? 1.f / 9.f : __fdividef(1.f, places);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float sum = above_[i] + here_[i] + below[i];
      const float from = kCentred<T, kTransposed> ? own[i] - centre_ : own[i];
      difference[i] = (sum - places * from) * inverse;
      above_[i] = here_[i];
      here_[i] = below[i];
    }
  }

 private:
  struct Row {
    Pack<T, V> left, middle, right;
  };

  __device__ __forceinline__ Row next_row() {
    const Row raw = {pack(next_ + to_left_), pack(next_), pack(next_ + to_right_)};
    next_ += row_stride_;
    return raw;
  }

  static __device__ __forceinline__ Pack<T, V> pack(const T* p) {
    if constexpr (kStaged) {
      static_assert(V == 1);
      return {*p};
    } else {
      return load<V>(p);
    }
  }

  __device__ __forceinline__ void row_sums(const Row& raw, int row, float (&sums)[V]) const {
    if (row < 0 || row >= height_) {
#pragma unroll
      for (int i = 0; i < V; ++i) sums[i] = 0.f;
      return;
    }
    float left[V], middle[V], right[V];
    unpack(raw.left, left);
    unpack(raw.middle, middle);
    unpack(raw.right, right);
    const float scale = kTransposed ? weight_of_three(row, height_) : 1.f;
    const float by_left = left_ * scale, by_middle = middle_ * scale, by_right = right_ * scale;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if constexpr (kTransposed) {
        sums[i] = by_middle * middle[i] + by_left * left[i] + by_right * right[i];
      } else if constexpr (kCentred<T, kTransposed>) {
        sums[i] = (middle[i] - centre_) + left_ * (left[i] - centre_);
        sums[i] += right_ * (right[i] - centre_);
      } else {
        sums[i] = middle[i] + left_ * left[i] + right_ * right[i];
      }
    }
  }

  const T* next_;  // the row that is read next
  const int row_stride_, height_, to_left_, to_right_;
  float left_, middle_, right_, count_, centre_;
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
  static constexpr bool kStaged = false;

  __device__ __forceinline__ WholePool(const Lane<T>& lane, int radius)
      : lane_(lane), radius_(radius) {}

  __device__ __forceinline__ void prefetch(int, int) {}
  __device__ __forceinline__ void begin(int, float centre) {
    centre_ = kCentred<T, kTransposed> ? centre : 0.f;
  }

  __device__ __forceinline__ void next(int row, float (&difference)[V], float (&own)[V]) {
    const int top = max(row - radius_, 0), bottom = min(row + radius_, lane_.height - 1);
    const int first = max(lane_.column - radius_, 0);
    const int last = min(lane_.column + radius_, lane_.width - 1);
    float sums[V] = {};
    for (int y = top; y <= bottom; ++y) {
      for (int x = first; x <= last; ++x) {
        const float scale = kTransposed ? weight(y, x) : 1.f;
        float values[V];
        unpack(at(y, x), values);
#pragma unroll
        for (int i = 0; i < V; ++i) sums[i] += scale * (values[i] - centre_);
      }
    }
    const float places =
        kTransposed ? most() : static_cast<float>((bottom - top + 1) * (last - first + 1));
    const float inverse = __fdividef(1.f, places);
    unpack(at(row, lane_.column), own);
#pragma unroll
    for (int i = 0; i < V; ++i) difference[i] = (sums[i] - places * (own[i] - centre_)) * inverse;
  }

 private:
  __device__ __forceinline__ Pack<T, V> at(int row, int column) const {
    return load<V>(lane_.data +
                   (row * lane_.row_stride + (column - lane_.column) * lane_.column_stride));
  }

  __device__ __forceinline__ float most() const {
    const int rows = min(2 * radius_ + 1, lane_.height),
              columns = min(2 * radius_ + 1, lane_.width);
    return static_cast<float>(rows * columns);
  }

  // The largest count over that of a place: exactly 1 inside.
  __device__ __forceinline__ float weight(int row, int column) const {
    const float places = count(row, lane_.height, radius_) * count(column, lane_.width, radius_);
    return places == most() ? 1.f : __fdividef(most(), places);
  }

  const Lane<T> lane_;
  const int radius_;
  float centre_;
};

// Calls launch with the pool of a dtype, a vector length and a window, as a Kind<Pool>.
template <class Pool>
struct Kind {
  using type = Pool;
};

template <bool kTransposed, class Launch>
cudaError_t with_pool(const Image& image, int radius, Launch&& launch) {
  return with_type(image.dtype, [&](auto value) {
    using T = decltype(value);
    constexpr int kV = kFullVector<T>;
    if (radius == 1) {
      if (image.vector > 1) return launch(Kind<RollingPool<T, kV, kTransposed>>{});
      return launch(Kind<RollingPool<T, 1, kTransposed>>{});
    }
    if (image.vector > 1) return launch(Kind<WholePool<T, kV, kTransposed>>{});
    return launch(Kind<WholePool<T, 1, kTransposed>>{});
  });
}

// The same for images in planes.
template <bool kTransposed, class Launch>
cudaError_t with_plane_pool(const Image& image, int radius, Launch&& launch) {
  return with_type(image.dtype, [&](auto value) {
    using T = decltype(value);
    if (radius == 1) return launch(Kind<RollingPool<T, 1, kTransposed, true>>{});
    return launch(Kind<WholePool<T, 1, kTransposed>>{});
  });
}

}  // namespace poolformer::cuda

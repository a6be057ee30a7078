// y = x + k·r·s·(Px − x), s = layer_scale·γ, r = 1/std: reads x and writes y once.
#include "planes.cuh"
#include "pooling.cuh"
#include "sums.cuh"

namespace poolformer::cuda {
namespace {

// From the last tile of the last image to the first: what wrote or summed x just before went from
// the first to the last, so that its last images, as many as fit, are still in L2. Two ops that go
// opposite ways hand one another what L2 holds, block after block.
template <class Pool>
__global__ void POOLFORMER_BOUNDS pool_mixer_kernel(PoolMixerArgs args, int64_t first_group) {
  using T = typename Pool::Type;
  constexpr int V = Pool::kVector;
  const Image& image = args.image;
  const dim3 block = reversed_block();
  const Group group(image, first_group + block.z);
  const Place place = place_of(image, args.tiling, block.x, block.y, threadIdx.x);
  Pool pool({image, args.x, group.offset + place.offset, place.column}, args.radius);
  pool.prefetch(place.row, place.end);
  const int tile = block.y * gridDim.x + block.x;
  const Moments moments =
      block_moments(args.stats, args.partials, args.eps, group.number, tile == 0, args.saved);
  float scale[V];
  branch_scale<T>(args.parameters, moments.rstd * image_factor<T>(args.parameters, group.image),
                  group.first_channel + place.channel, scale);

  const int row_stride = image.row_stride();
  T* y = static_cast<T*>(args.y) + group.offset + (place.offset + place.row * row_stride);
  Partial own{};
  pool.begin(place.row, moments.mean);
  for (int row = place.row; row < place.end; ++row) {
    float difference[V], values[V];
    pool.next(row, difference, values);
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] += scale[i] * difference[i];
    const Pack<T, V> result = rounded<T>(values);
    if (place.inside) store(y, result);
    y += row_stride;
    if (args.stats_out != nullptr) {
      unpack(result, values);  // as stored
      own.add(values);
    }
  }
  if (args.stats_out != nullptr) {
    if (!place.inside) own = {};
    const Partial all = block_merge(own);
    const int tiles = gridDim.x * gridDim.y;
    if (threadIdx.x == 0) all.store(args.stats_out, group.number * tiles + tile);
  }
}

// NCHW, tile by tile through shared memory; from the last to the first too.
template <class Pool>
__global__ void POOLFORMER_BOUNDS planes_kernel(PoolMixerArgs args, Planes p, int64_t first_group) {
  using T = typename Pool::Type;
  const Image& image = args.image;
  const dim3 block = reversed_block();
  const Group group(image, first_group + block.z);
  const int64_t size = image.batch * image.channels * image.pixels();
  const int elements = p.elements(image.width);
  unsigned char* results = block_memory();
  unsigned char* inputs = results + staged_bytes(elements, sizeof(T));
  const auto input_of = [&](const PlaneTile& tile) {
    return Staged<T>(inputs, group.offset, tile.halo_begin, tile.halo_end);
  };
  int turn = block.x * p.turns;
  const int last = min(turn + p.turns, p.tiles);
  PlaneTile tile = tile_of(image, p, turn);
  if constexpr (Pool::kStaged) input_of(tile).load(args.x, size);
  const Moments moments =
      block_moments(args.stats, args.partials, args.eps, group.number, block.x == 0, args.saved);
  const float factor = moments.rstd * image_factor<T>(args.parameters, group.image);
  Partial own{};
  for (;;) {
    const Staged<T> result(results, group.offset, tile.begin, tile.end);
    staged_wait();
    __syncthreads();
    for (int i = threadIdx.x; i < p.lanes; i += blockDim.x) {
      const PlaneLane lane = lane_of(image, p, tile, i);
      if (!lane.inside) break;
      const void* x = args.x;
      int64_t offset = group.offset + lane.offset;
      if constexpr (Pool::kStaged) x = input_of(tile).at(), offset = lane.offset;
      Pool pool({image, x, offset, lane.column}, args.radius);
      pool.prefetch(lane.row, lane.end);
      float scale[1];
      branch_scale<T>(args.parameters, factor, group.first_channel + tile.first_plane + lane.plane,
                      scale);
      pool.begin(lane.row, moments.mean);
      T* y = result.at() + (lane.offset + lane.row * image.width);
      for (int row = lane.row; row < lane.end; ++row) {
        float difference[1], values[1];
        pool.next(row, difference, values);
        from_float(values[0] + scale[0] * difference[0], *y);
        y += image.width;
      }
    }
    __syncthreads();
    const bool more = ++turn < last;
    if (more) {
      tile = tile_of(image, p, turn);
      if constexpr (Pool::kStaged) input_of(tile).load(args.x, size);
    }
    result.store(args.y, [&](const auto& values) {
      if (args.stats_out != nullptr) own.add(values);
    });
    if (!more) break;
  }
  if (args.stats_out != nullptr) {
    const Partial all = block_merge(own);
    if (threadIdx.x == 0) all.store(args.stats_out, group.number * gridDim.x + block.x);
  }
}

cudaError_t pool_mixer_planes(const PoolMixerArgs& args, cudaStream_t stream) {
  const Planes p = choose_planes(args.image);
  return with_plane_pool<false>(args.image, args.radius, [&](auto kind) {
    using Pool = typename decltype(kind)::type;
    const int bytes = plane_bytes<typename Pool::Type>(args.image, p, 1, Pool::kStaged);
    for_groups(args.image, [&](unsigned groups, int64_t first) {
      const dim3 grid(p.blocks(), 1, groups);
      planes_kernel<Pool><<<grid, p.threads, bytes, stream>>>(args, p, first);
    });
  });
}

}  // namespace

cudaError_t pool_mixer(const PoolMixerArgs& args, cudaStream_t stream) {
  if (args.image.in_planes()) return pool_mixer_planes(args, stream);
  const Tiling& t = args.tiling;
  return with_pool<false>(args.image, args.radius, [&](auto kind) {
    using Pool = typename decltype(kind)::type;
    for_groups(args.image, [&](unsigned groups, int64_t first) {
      const dim3 grid(t.lane_blocks, t.row_blocks, groups);
      pool_mixer_kernel<Pool><<<grid, t.threads, 0, stream>>>(args, first);
    });
  });
}

}  // namespace poolformer::cuda

// y = x + k·r·s·(Px − x), s = layer_scale·γ, r = 1/std: reads x and writes y once.
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

}  // namespace

cudaError_t pool_mixer(const PoolMixerArgs& args, cudaStream_t stream) {
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

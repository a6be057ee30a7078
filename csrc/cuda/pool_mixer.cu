// y = x + k·r·s·(Px − x), s = layer_scale·γ, r = 1/std: reads x and writes y once.
#include "pooling.cuh"
#include "sums.cuh"

namespace poolformer::cuda {
namespace {

// From the last tile of the last image to the first: what wrote or summed x just before went from
// the first to the last, so that its last images, as many as fit, are still in L2. Two ops that go
// opposite ways hand one another what L2 holds, block after block.
template <class Pool>
__global__ void __launch_bounds__(kThreads, kBlocks) pool_mixer_kernel(PoolMixerArgs args) {
  using T = typename Pool::Type;
  constexpr int V = Pool::kVector;
  const Place place = place_of(args.image, args.tiling, gridDim.x - 1 - blockIdx.x, threadIdx.x);
  const int64_t lane = place.offset - place.column * args.image.column_stride();
  Pool pool({args.image, args.x, lane, place.column}, args.radius);
  pool.prefetch(place.row, place.end);
  const Moments moments = block_moments(args.stats, args.partials, args.eps, place.image_group,
                                        place.tile == 0, args.saved);
  float scale[V];
  branch_scale<T>(args.parameters, moments.rstd * image_factor<T>(args.parameters, place.image),
                  place.channel, scale);

  T* y = static_cast<T*>(args.y) + place.offset;
  Partial own;
  pool.begin(place.row, moments.mean);
  for (int row = place.row; row < place.end; ++row) {
    float pooled[V], values[V];
    pool.next(row, pooled, values);
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] += scale[i] * (pooled[i] - (values[i] - moments.mean));
    const Pack<T, V> result = rounded<T>(values);
    if (place.inside) store(y + row * args.image.row_stride(), result);
    if (args.stats_out != nullptr) {
      unpack(result, values);  // as stored
      own.add(values);
    }
  }
  if (args.stats_out != nullptr) {
    if (!place.inside) own = {};
    const Partial all = block_merge(own);
    const int64_t index = place.image_group * args.tiling.blocks() + place.tile;
    if (threadIdx.x == 0) all.store(args.stats_out, index);
  }
}

}  // namespace

cudaError_t pool_mixer(const PoolMixerArgs& args, cudaStream_t stream) {
  const Image& image = args.image;
  const auto blocks = static_cast<unsigned>(image.batch * image.groups * args.tiling.blocks());
  return with_pool<false>(image.dtype, args.tiling.vector, args.radius, [&](auto kind) {
    using Pool = typename decltype(kind)::type;
    pool_mixer_kernel<Pool><<<blocks, args.tiling.threads, 0, stream>>>(args);
  });
}

}  // namespace poolformer::cuda

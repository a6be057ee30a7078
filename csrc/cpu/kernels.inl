// All kernels for one instruction set, as a table. isa_*.cpp include this after choosing the
// target, and after the standard headers, whose functions must not be compiled for it.
#include "group_norm.inl"
#include "group_norm_backward.inl"
#include "mlp.inl"
#include "mlp_backward.inl"
#include "patch_embed.inl"
#include "pool_mixer.inl"
#include "pool_mixer_backward.inl"
#include "statistics.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

static void mlp(const MlpArgs& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Acc<T>;
    int64_t most = (args.panels + args.tiles - 1) / args.tiles, channels = args.in.channels;
    int64_t size = most * (2 * channels + args.chunk) * kPanel<A> +
                   gemm_spare(larger(channels, args.chunk)) + args.chunk + 3 * channels;
    A* memory = static_cast<A*>(scratch(size * sizeof(A)));
    for (int64_t task = begin; task < end; ++task) {
      mlp_tile<T>(args, task / args.splits, task % args.splits, memory);
    }
  });
}

static void mlp_finish(const MlpArgs& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Acc<T>;
    int64_t channels = args.in.channels, size = channels * kPanel<A>, image = -1;
    A* gain = static_cast<A*>(scratch((size + 2 * channels) * sizeof(A)));
    A* sums = gain + 2 * channels;
    const A* parts = static_cast<const A*>(args.accumulators);
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t i = 0; i < size; i += kLanes<A>) {
        Vec<A> v = load(parts + panel * size + i);
        for (int64_t s = 1; s < args.splits; ++s) {
          v += load(parts + (s * args.panels + panel) * size + i);
        }
        store(sums + i, v);
      }
      write_panel<T>(args, panel, sums, gain, image);
    }
  });
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

namespace poolformer::cpu {

extern const Kernels POOLFORMER_TABLE = {POOLFORMER_NAME,
                                         POOLFORMER_ISA::statistics_chunks,
                                         POOLFORMER_ISA::statistics,
                                         POOLFORMER_ISA::group_norm_plan,
                                         POOLFORMER_ISA::group_norm,
                                         POOLFORMER_ISA::pool_mixer_plan,
                                         POOLFORMER_ISA::pool_mixer,
                                         POOLFORMER_ISA::group_norm_backward_plan,
                                         POOLFORMER_ISA::group_norm_backward_sums,
                                         POOLFORMER_ISA::group_norm_backward,
                                         POOLFORMER_ISA::pool_mixer_backward_plan,
                                         POOLFORMER_ISA::pool_mixer_backward_sums,
                                         POOLFORMER_ISA::pool_mixer_backward,
                                         POOLFORMER_ISA::mlp_plan,
                                         POOLFORMER_ISA::mlp,
                                         POOLFORMER_ISA::mlp_finish,
                                         POOLFORMER_ISA::mlp_backward_plan,
                                         POOLFORMER_ISA::mlp_backward_pack,
                                         POOLFORMER_ISA::mlp_backward,
                                         POOLFORMER_ISA::mlp_backward_add,
                                         POOLFORMER_ISA::mlp_backward_finish,
                                         POOLFORMER_ISA::patch_embed_plan,
                                         POOLFORMER_ISA::patch_embed};

}  // namespace poolformer::cpu

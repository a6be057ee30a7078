// All kernels for one instruction set, as a table. isa_*.cpp include this after choosing the
// target, and after the standard headers, whose functions must not be compiled for it.
#include "group_norm.inl"
#include "group_norm_backward.inl"
#include "mlp.inl"
#include "mlp_backward.inl"
#include "patch_embed.inl"
#include "patch_embed_backward.inl"
#include "pool_mixer.inl"
#include "pool_mixer_backward.inl"
#include "statistics.inl"

namespace poolformer::cpu {

#if defined(POOLFORMER_BF16)
static constexpr bool kNativeBf16 = true;
#else
static constexpr bool kNativeBf16 = false;
#endif

extern const Kernels POOLFORMER_TABLE = {POOLFORMER_NAME,
                                         kNativeBf16,
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
                                         POOLFORMER_ISA::mlp_tiles,
                                         POOLFORMER_ISA::mlp_pack,
                                         POOLFORMER_ISA::mlp_fc1,
                                         POOLFORMER_ISA::mlp_fc2,
                                         POOLFORMER_ISA::mlp_finish,
                                         POOLFORMER_ISA::mlp_backward_plan,
                                         POOLFORMER_ISA::mlp_backward_pack,
                                         POOLFORMER_ISA::mlp_backward,
                                         POOLFORMER_ISA::mlp_backward_add,
                                         POOLFORMER_ISA::mlp_backward_finish,
                                         POOLFORMER_ISA::patch_embed_plan,
                                         POOLFORMER_ISA::patch_embed_tiles,
                                         POOLFORMER_ISA::patch_embed_pack,
                                         POOLFORMER_ISA::patch_embed_rows,
                                         POOLFORMER_ISA::patch_embed_backward_plan,
                                         POOLFORMER_ISA::patch_embed_backward_pack,
                                         POOLFORMER_ISA::patch_embed_backward_input,
                                         POOLFORMER_ISA::patch_embed_backward_weight,
                                         POOLFORMER_ISA::patch_embed_backward_finish};

}  // namespace poolformer::cpu

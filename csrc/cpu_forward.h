// Forwards of the CPU kernels from filled-in arguments: plans, memory, threads, statistics.
#pragma once

#include <cmath>
#include <vector>

#include "cpu_tensors.h"

namespace poolformer {

using Partials = std::vector<cpu::Partial>;

// Merges partials to `rows`, each of as many in a row, in their order.
inline Partials merge_rows(const Partials& partials, int64_t rows) {
  Partials merged(rows);
  int64_t count = rows ? partials.size() / rows : 0;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < count; ++j) cpu::merge(merged[i], partials[i * count + j]);
  }
  return merged;
}

// One for each image and group.
inline Partials statistics_of(const cpu::Kernels& kernels, const cpu::Image& image) {
  int64_t rows = image.batch * image.groups, chunks = kernels.statistics_chunks(image);
  Partials partials(rows * chunks);
  cpu::StatisticsArgs args{image, chunks, partials.data()};
  run_kernel(kernels.statistics, args, rows * chunks, 8);
  return merge_rows(partials, rows);
}

// Mean and 1 / std of each image and group.
struct Moments {
  std::vector<double> mean, rstd;

  Moments(const Partials& statistics, double eps) {
    mean.reserve(statistics.size()), rstd.reserve(statistics.size());
    for (const auto& one : statistics) {
      mean.push_back(one.mean);
      rstd.push_back(1 / std::sqrt(one.m2 / one.count + eps));
    }
  }
};

// Both take arguments that lack the plan and what belongs to it, and return the statistics of the
// output, one for each image and group, if they are wanted.
inline Partials run_pool_mixer(const cpu::Kernels& kernels, cpu::PoolMixerArgs& args, bool wanted) {
  int64_t rows = args.in.batch * args.in.groups;
  kernels.pool_mixer_plan(args);
  Partials partials(wanted ? rows * args.slots : 0);
  args.partials = wanted ? partials.data() : nullptr;
  run_kernel(kernels.pool_mixer, args, args.in.batch * args.tasks, 4);
  return merge_rows(partials, wanted ? rows : 0);
}

inline Partials run_mlp(const cpu::Kernels& kernels, cpu::MlpArgs& args, bool wanted) {
  if (args.in.batch == 0) return {};
  int64_t rows = args.in.batch * args.in.groups;
  args.threads = at::get_num_threads();
  kernels.mlp_plan(args);
  Partials partials(wanted ? rows * args.slots : 0);
  args.partials = wanted ? partials.data() : nullptr;
  args.shared = cpu::scratch(args.shared_bytes, cpu::Scratch::kSums);
  if (args.tiles > 0) {
    run_kernel(kernels.mlp_tiles, args, args.tiles, 1);
  } else {
    run_kernel(kernels.mlp_pack, args, args.panels, 2);
    run_kernel(kernels.mlp_fc1, args, args.fc1_blocks, 8);
    run_kernel(kernels.mlp_fc2, args, args.fc2_blocks, 8);
    run_kernel(kernels.mlp_finish, args, args.panels, 2);
  }
  return merge_rows(partials, wanted ? rows : 0);
}

}  // namespace poolformer

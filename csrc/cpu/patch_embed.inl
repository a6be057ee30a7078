// A strided convolution as a product: rows of the weight, read where they are, times panels of
// output pixels, whose values are put in the order of the weight's memory.
#pragma once

#include "patch_embed_parts.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

// The longest sums, of windows of thousands of values, are added up from shorter parts. Products of
// bfloat16 have no use for it.
template <class F>
constexpr int64_t kWindowSum = kStep<F> == 1 ? kDepth / 4 : kDepth * kStep<F>;

// The depth of one product: a panel and a block of rows stay in the first-level cache. It ends
// where a part of the sums does.
template <class F>
PF_INLINE int64_t depth_step(int64_t depth) {
  int64_t most = kDepth * kStep<F>, steps = (depth + most - 1) / most;
  return round_up((depth + steps - 1) / steps, kWindowSum<F>);
}

template <class F>
static void patch_embed_plan_typed(PatchEmbedArgs& args) {
  using A = Acc<F>;
  constexpr int64_t n = kPanel<A>;
  int64_t channels = args.out.channels, depth = args.depth();
  args.panels = (args.out.batch * args.out.pixels() + n - 1) / n;
  int64_t most = l2_bytes() * 3 / 4 / ((channels + depth_step<F>(depth)) * n * sizeof(A));
  most = smaller(larger(most, 8), 64);
  int64_t tiles = (args.panels + most - 1) / most;
  if (tiles < 4 * args.threads) tiles = smaller(round_up(tiles, args.threads), args.panels);
  bool many = args.panels >= 12 || own_tiles(args.panels, args.threads);  // sums are the same
  args.tiles = many ? tiles : 0;
  args.blocks = (channels + kRows - 1) / kRows;
  args.shared_bytes = many ? 0 : args.panels * panel_values<F>(depth) * sizeof(F);
}

static void patch_embed_plan(PatchEmbedArgs& args) {
  with_type(args.in.dtype, [&](auto* type) {
    patch_embed_plan_typed<Factor<std::remove_pointer_t<decltype(type)>>>(args);
  });
}

// Writes the output channels [row, row + rows) of the panels [first, last) from their sums
// (panels, rows, lanes). bias: memory of as many values as there are output channels.
template <class T>
static void write_panels(const PatchEmbedArgs& args, int64_t first, int64_t last, int64_t row,
                         int64_t rows, const Acc<T>* sums, Acc<T>* bias) {
  constexpr int n = kPanel<Acc<T>>;
  load_all<T>(as<T>(args.bias), bias, args.out.channels, Acc<T>(0));
  for (int64_t p = first; p < last; ++p, sums += rows * n) {
    for_each_run(args.out, p * n, n, [&](const Run& run) {
      write_run<T>(args.out, row, rows, run, sums, static_cast<T*>(args.y),
                   [&](auto sum, int64_t, auto of) { return sum + of(bias); });
    });
  }
}

// Enough pixels for all threads: a task is a tile of panels.
static void patch_embed_tiles(const PatchEmbedArgs& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Acc<T>;
    using F = Factor<T>;
    constexpr int64_t n = kPanel<A>;
    int64_t channels = args.out.channels, depth = args.depth(), step = depth_step<F>(depth);
    int64_t panel_size = panel_values<F>(depth);
    for (int64_t tile = begin; tile < end; ++tile) {
      int64_t first = tile * args.panels / args.tiles;
      int64_t last = (tile + 1) * args.panels / args.tiles, count = last - first;
      int64_t size = count * channels * n + gemm_spare(step) + channels;
      int64_t bytes = round_up(count * panel_size * sizeof(F) + size * sizeof(A), sizeof(int64_t));
      char* memory = static_cast<char*>(scratch(bytes + packing_bytes<T>(args, first, last)));
      F* panels = reinterpret_cast<F*>(memory);
      A* sums = reinterpret_cast<A*>(panels + count * panel_size);
      A* spare = sums + count * channels * n;
      pack_pixels<T>(args, first, last, memory + bytes, panels);
      for (int64_t k = 0; k < depth; k += step) {
        gemm<T>(as<T>(args.weight) + k, depth, channels, smaller(step, depth - k),
                panels + place<F>(k, 0), panel_size, count,
                last < args.panels ? n : last_lanes_of<A>(args.out, args.panels), sums,
                channels * n, k > 0, spare, kWindowSum<F>);
      }
      write_panels<T>(args, first, last, 0, channels, sums, spare + gemm_spare(step));
    }
  });
}

// Fewer pixels than that: packing and the product are phases, as in the MLP, and a weight's row is
// read once.
static void patch_embed_pack(const PatchEmbedArgs& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using F = Factor<T>;
    F* out = static_cast<F*>(args.shared) + begin * panel_values<F>(args.depth());
    pack_pixels<T>(args, begin, end, scratch(packing_bytes<T>(args, begin, end)), out);
  });
}

static void patch_embed_rows(const PatchEmbedArgs& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Acc<T>;
    using F = Factor<T>;
    constexpr int64_t n = kPanel<A>;
    int64_t depth = args.depth(), channels = args.out.channels, row = begin * kRows;
    int64_t rows = smaller(end * kRows, channels) - row;
    int64_t size = args.panels * rows * n + gemm_spare(depth) + channels;
    A* sums = static_cast<A*>(scratch(size * sizeof(A)));
    A *spare = sums + args.panels * rows * n, *bias = spare + gemm_spare(depth);
    gemm<T>(as<T>(args.weight) + row * depth, depth, rows, depth,
            static_cast<const F*>(args.shared), panel_values<F>(depth), args.panels,
            last_lanes_of<A>(args.out, args.panels), sums, rows * n, false, spare, kWindowSum<F>);
    write_panels<T>(args, 0, args.panels, row, rows, sums, bias);
  });
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

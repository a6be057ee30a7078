// z = x + k layer_scale (ka fc2(act(fc1(GN x))) + fc2_bias).
#pragma once

#include "mlp_parts.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

template <class A>
static void mlp_plan_typed(MlpArgs& args) {
  constexpr int64_t n = kPanel<A>, unit = sizeof(A) * n;
  const Image& in = args.in;
  args.panels = (in.batch * in.pixels() + n - 1) / n;
  args.slots = (in.pixels() + n - 1) / n + 1;
  args.chunk = smaller(args.hidden, POOLFORMER_CHUNK);
  int64_t most = l2_bytes() * 3 / 4 / ((2 * in.channels + args.chunk) * unit);
  most = smaller(larger(most, 16), 64);  // fewer would read the weights too often
  int64_t tiles = (args.panels + most - 1) / most;
  bool many = args.panels >= 32 || tiles >= 8;  // by shape alone: it has a say in how sums are cut
  args.tiles = many ? smaller(round_up(tiles, 4 * args.threads), args.panels) : 0;
  args.fc1_blocks = (args.hidden + kRows - 1) / kRows;
  args.fc2_blocks = (in.channels + kRows - 1) / kRows;
  args.shared_bytes = many ? 0 : args.panels * (in.channels + args.hidden) * unit;
}

static void mlp_plan(MlpArgs& args) {
  if (args.in.dtype == Dtype::kFloat64) return mlp_plan_typed<double>(args);
  mlp_plan_typed<float>(args);
}

// Many pixels: tiles of them, whose hidden is made and used in chunks that stay in the cache.

template <class T>
static void mlp_tile(const MlpArgs& args, int64_t tile, Acc<T>* memory) {
  using A = Acc<T>;
  constexpr int n = kPanel<A>;
  int64_t channels = args.in.channels, panel_size = channels * n;
  int64_t first = tile * args.panels / args.tiles, last = (tile + 1) * args.panels / args.tiles;
  int64_t count = last - first;
  int64_t last_lanes = last < args.panels ? n : last_lanes_of<A>(args.in, args.panels);
  A* x = memory;
  A* sums = x + count * panel_size;
  A* hidden = sums + count * panel_size;
  A* spare = hidden + count * args.chunk * n;
  A* bias = spare + gemm_spare(larger(channels, args.chunk));
  A* coefficients = bias + args.chunk;
  pack_panels<T>(args, first, last, coefficients, x);
  for (int64_t start = 0; start < args.hidden; start += args.chunk) {
    int64_t size = smaller(args.chunk, args.hidden - start), distance = size * n;
    hidden_rows<T>(args, start, size, x, first * n, count, last_lanes, hidden, distance, bias,
                   spare);
    gemm<T>(as<T>(args.fc2_weight) + start, args.hidden, channels, size, hidden, distance, count,
            last_lanes, sums, panel_size, start > 0, spare);
  }
  int64_t image = -1;
  for (int64_t p = first; p < last; ++p) {
    write_panel<T>(args, p, sums + (p - first) * panel_size, coefficients, image);
  }
}

static void mlp_tiles(const MlpArgs& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Acc<T>;
    int64_t most = (args.panels + args.tiles - 1) / args.tiles, channels = args.in.channels;
    int64_t size = most * (2 * channels + args.chunk) * kPanel<A> +
                   gemm_spare(larger(channels, args.chunk)) + args.chunk + 3 * channels;
    A* memory = static_cast<A*>(scratch(size * sizeof(A)));
    for (int64_t tile = begin; tile < end; ++tile) mlp_tile<T>(args, tile, memory);
  });
}

// Few pixels: the time goes to reading the weights. Each product is a phase of its own, whose
// threads read different rows, each row once and as a whole.

// What the phases share: GN(x), later fc2's sums in its place, and the hidden.
template <class A>
struct MlpShared {
  static constexpr int n = kPanel<A>;
  int64_t panel_size, hidden_size;  // of a panel
  A *x, *hidden;

  explicit MlpShared(const MlpArgs& args)
      : panel_size(args.in.channels * n),
        hidden_size(args.hidden * n),
        x(static_cast<A*>(args.shared)),
        hidden(x + args.panels * panel_size) {}
};

static void mlp_pack(const MlpArgs& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Acc<T>;
    MlpShared<A> shared(args);
    A* memory = static_cast<A*>(scratch(3 * args.in.channels * sizeof(A)));
    pack_panels<T>(args, begin, end, memory, shared.x + begin * shared.panel_size);
  });
}

static void mlp_fc1(const MlpArgs& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Acc<T>;
    MlpShared<A> shared(args);
    int64_t first = begin * kRows, rows = smaller(end * kRows, args.hidden) - first;
    int64_t spare = gemm_spare(args.in.channels);
    A* memory = static_cast<A*>(scratch((spare + rows) * sizeof(A)));
    hidden_rows<T>(args, first, rows, shared.x, 0, args.panels,
                   last_lanes_of<A>(args.in, args.panels), shared.hidden + first * shared.n,
                   shared.hidden_size, memory + spare, memory);
  });
}

static void mlp_fc2(const MlpArgs& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Acc<T>;
    MlpShared<A> shared(args);
    int64_t first = begin * kRows, rows = smaller(end * kRows, args.in.channels) - first;
    A* memory = static_cast<A*>(scratch(gemm_spare(args.hidden) * sizeof(A)));
    gemm<T>(as<T>(args.fc2_weight) + first * args.hidden, args.hidden, rows, args.hidden,
            shared.hidden, shared.hidden_size, args.panels, last_lanes_of<A>(args.in, args.panels),
            shared.x + first * shared.n, shared.panel_size, false, memory);
  });
}

static void mlp_finish(const MlpArgs& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Acc<T>;
    MlpShared<A> shared(args);
    A* memory = static_cast<A*>(scratch(2 * args.in.channels * sizeof(A)));
    int64_t image = -1;
    for (int64_t panel = begin; panel < end; ++panel) {
      write_panel<T>(args, panel, shared.x + panel * shared.panel_size, memory, image);
    }
  });
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

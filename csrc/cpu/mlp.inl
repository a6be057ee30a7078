// z = x + k layer_scale (ka fc2(act(fc1(GN x))) + fc2_bias).
#pragma once

#include "mlp_parts.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

template <class F>
static void mlp_plan_typed(MlpArgs& args) {
  using A = Acc<F>;
  constexpr int64_t n = kPanel<A>, unit = sizeof(A) * n;
  const Image& in = args.in;
  int64_t x_bytes = panel_values<F>(in.channels) * sizeof(F);
  args.panels = (in.batch * in.pixels() + n - 1) / n;
  args.slots = (in.pixels() + n - 1) / n + 1;
  auto tiles_of = [&](int64_t chunk, int64_t least) {
    int64_t most = l2_bytes() * 3 / 4 / (x_bytes + (in.channels + chunk) * unit);
    most = smaller(larger(most, least), 64);  // fewer would read the weights too often
    return (args.panels + most - 1) / most;
  };
  args.chunk = smaller(args.hidden, POOLFORMER_CHUNK * kStep<F>);
  args.tiles = tiles_of(args.chunk, 16);
  // By shape alone: it has a say in how sums are cut.
  bool many = args.panels >= 32 || args.tiles >= 8;
  if (many) {
    args.tiles = smaller(round_up(args.tiles, 2 * args.threads), args.panels);
  } else {
    // Both plans for few pixels add up the same parts: chunks end where parts do.
    args.chunk = smaller(args.hidden, 2 * kDepth);
    args.tiles = own_tiles(args.panels, args.threads)
                     ? smaller(round_up(tiles_of(args.chunk, 7), args.threads), args.panels)
                     : 0;
  }
  args.fc1_blocks = (args.hidden + kRows - 1) / kRows;
  args.fc2_blocks = (in.channels + kRows - 1) / kRows;
  int64_t hidden_bytes = panel_values<F>(args.hidden) * sizeof(F);
  args.shared_bytes =
      args.tiles > 0 ? 0 : args.panels * (in.channels * unit + x_bytes + hidden_bytes);
}

static void mlp_plan(MlpArgs& args) {
  with_types(args, [&](auto*, auto* weight) {
    mlp_plan_typed<Factor<std::remove_pointer_t<decltype(weight)>>>(args);
  });
}

// Tiles of pixels, whose hidden is made and used in chunks that stay in the cache.

template <class T, class W>
struct MlpTile {
  using A = Acc<T>;
  using F = Factor<W>;
  int64_t x_size, sums_size, chunk_size;  // of a panel
  A *sums, *h, *spare, *bias, *coefficients;
  F *x, *hidden;  // hidden is in the memory of h

  // `most`: panels of a tile.
  static int64_t bytes(const MlpArgs& args, int64_t most) {
    int64_t channels = args.in.channels;
    int64_t values = most * (channels + args.chunk) * kPanel<A> +
                     gemm_spare(larger(channels, args.chunk)) + args.chunk + 3 * channels;
    return values * sizeof(A) + most * panel_values<F>(channels) * sizeof(F);
  }

  MlpTile(const MlpArgs& args, int64_t most, void* memory)
      : x_size(panel_values<F>(args.in.channels)),
        sums_size(args.in.channels * kPanel<A>),
        chunk_size(args.chunk * kPanel<A>),
        sums(reinterpret_cast<A*>(static_cast<F*>(memory) + most * x_size)),
        h(sums + most * sums_size),
        spare(h + most * chunk_size),
        bias(spare + gemm_spare(larger(args.in.channels, args.chunk))),
        coefficients(bias + args.chunk),
        x(static_cast<F*>(memory)),
        hidden(reinterpret_cast<F*>(h)) {}
};

template <class T, class W>
static void mlp_tile(const MlpArgs& args, int64_t index, const MlpTile<T, W>& tile) {
  using A = Acc<T>;
  using F = Factor<W>;
  constexpr int n = kPanel<A>;
  int64_t channels = args.in.channels;
  int64_t first = index * args.panels / args.tiles, last = (index + 1) * args.panels / args.tiles;
  int64_t count = last - first;
  int64_t last_lanes = last < args.panels ? n : last_lanes_of<A>(args.in, args.panels);
  Panels<A> h{tile.h, n, tile.chunk_size};
  Panels<F> hidden{tile.hidden, kPanelStep<F>, tile.chunk_size * kStep<F>};
  pack_panels<F, T>(args, first, last, tile.coefficients, tile.x);
  for (int64_t start = 0; start < args.hidden; start += args.chunk) {
    int64_t size = smaller(args.chunk, args.hidden - start);
    hidden_rows<T, W>(args, start, size, tile.x, first * n, count, last_lanes, h, hidden, tile.bias,
                      tile.spare);
    gemm<W>(as<W>(args.fc2_weight) + start, args.hidden, channels, size, hidden.data,
            hidden.distance, count, last_lanes, tile.sums, tile.sums_size, start > 0, tile.spare);
  }
  int64_t image = -1;
  for (int64_t p = first; p < last; ++p) {
    write_panel<T>(args, p, tile.sums + (p - first) * tile.sums_size, tile.coefficients, image);
  }
}

static void mlp_tiles(const MlpArgs& args, int64_t begin, int64_t end) {
  with_types(args, [&](auto* type, auto* weight) {
    using Tile =
        MlpTile<std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(weight)>>;
    int64_t most = (args.panels + args.tiles - 1) / args.tiles;
    Tile tile(args, most, scratch(Tile::bytes(args, most)));
    for (int64_t i = begin; i < end; ++i) mlp_tile(args, i, tile);
  });
}

// Fewer pixels than tiles for all threads take: the time goes to reading the weights. Each product
// is a phase of its own, whose threads read different rows, each row once and as a whole.

// What the phases share: GN(x), fc2's sums and the hidden.
template <class F>
struct MlpShared {
  using A = Acc<F>;
  int64_t x_size, sums_size, hidden_size;  // of a panel
  A* sums;
  F *x, *hidden;

  explicit MlpShared(const MlpArgs& args)
      : x_size(panel_values<F>(args.in.channels)),
        sums_size(args.in.channels * kPanel<A>),
        hidden_size(panel_values<F>(args.hidden)),
        sums(static_cast<A*>(args.shared)),
        x(reinterpret_cast<F*>(sums + args.panels * sums_size)),
        hidden(x + args.panels * x_size) {}
};

static void mlp_pack(const MlpArgs& args, int64_t begin, int64_t end) {
  with_types(args, [&](auto* type, auto* weight) {
    using T = std::remove_pointer_t<decltype(type)>;
    using F = Factor<std::remove_pointer_t<decltype(weight)>>;
    MlpShared<F> shared(args);
    auto* memory = static_cast<Acc<T>*>(scratch(3 * args.in.channels * sizeof(Acc<T>)));
    pack_panels<F, T>(args, begin, end, memory, shared.x + begin * shared.x_size);
  });
}

static void mlp_fc1(const MlpArgs& args, int64_t begin, int64_t end) {
  with_types(args, [&](auto* type, auto* weight) {
    using T = std::remove_pointer_t<decltype(type)>;
    using W = std::remove_pointer_t<decltype(weight)>;
    using A = Acc<T>;
    using F = Factor<W>;
    constexpr int n = kPanel<A>;
    MlpShared<F> shared(args);
    int64_t first = begin * kRows, rows = smaller(end * kRows, args.hidden) - first;
    int64_t spare = gemm_spare(args.in.channels);
    A* memory = static_cast<A*>(scratch((spare + rows * (1 + args.panels * n)) * sizeof(A)));
    Panels<F> hidden{shared.hidden + place<F>(first, 0), kPanelStep<F>, shared.hidden_size};
    Panels<A> h{memory + spare + rows, n, rows * n};
    if constexpr (std::is_same_v<F, A>) h = hidden;
    hidden_rows<T, W>(args, first, rows, shared.x, 0, args.panels,
                      last_lanes_of<A>(args.in, args.panels), h, hidden, memory + spare, memory);
  });
}

static void mlp_fc2(const MlpArgs& args, int64_t begin, int64_t end) {
  with_types(args, [&](auto*, auto* weight) {
    using W = std::remove_pointer_t<decltype(weight)>;
    using A = Acc<W>;
    MlpShared<Factor<W>> shared(args);
    int64_t first = begin * kRows, rows = smaller(end * kRows, args.in.channels) - first;
    A* memory = static_cast<A*>(scratch(gemm_spare(args.hidden) * sizeof(A)));
    gemm<W>(as<W>(args.fc2_weight) + first * args.hidden, args.hidden, rows, args.hidden,
            shared.hidden, shared.hidden_size, args.panels, last_lanes_of<A>(args.in, args.panels),
            shared.sums + first * kPanel<A>, shared.sums_size, false, memory);
  });
}

static void mlp_finish(const MlpArgs& args, int64_t begin, int64_t end) {
  with_types(args, [&](auto* type, auto* weight) {
    using T = std::remove_pointer_t<decltype(type)>;
    MlpShared<Factor<std::remove_pointer_t<decltype(weight)>>> shared(args);
    auto* memory = static_cast<Acc<T>*>(scratch(2 * args.in.channels * sizeof(Acc<T>)));
    int64_t image = -1;
    for (int64_t panel = begin; panel < end; ++panel) {
      write_panel<T>(args, panel, shared.sums + panel * shared.sums_size, memory, image);
    }
  });
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

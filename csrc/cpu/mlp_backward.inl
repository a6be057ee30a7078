// Gradients of z = x + k ls (ka W2 act(h) + b2), h = W1 n + b1, n = GN(x): for g = k dz,
//     da = ka (ls W2)' g     dh = da act'(h)     dn = W1' dh     dW1 = dh n'     D = g (ka act(h))'
// and dW2 = ls D. Pixels are rows here, and vectors run along (hidden) channels.
#pragma once

#include "mlp_backward_tile.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

// The products of a tile of `count` rows from `first` on with the panels [begin, end) of the
// hidden.
template <class T, class W>
static void mlp_backward_tile(const MlpBackwardArgs& args, int64_t first, int64_t count,
                              int64_t begin, int64_t end, Acc<T>* gradients, bool add,
                              const MlpBackwardTile<Factor<W>>& tile) {
  using A = Acc<T>;
  using F = Factor<W>;
  constexpr int n = kPanel<A>, v = kStep<F>;
  MlpBackwardSizes<F> sizes(args);
  int64_t channels = sizes.channels, stride = tile.stride, hidden_stride = tile.hidden_stride;
  A *fc1_gradient = gradients, *fc2_gradient = fc1_gradient + sizes.weight;
  A* bias_gradient = fc2_gradient + sizes.weight;
  int64_t most = tile.chunk / n;
  for (int64_t panel = begin; panel < end; panel += most) {
    int64_t panels = smaller(most, end - panel), at = panel * n, width = panels * n;
    auto multiply_rows_with = [&](const F* rows, const F* weights, A* to) {
      Panels<const F> right{weights + panel * sizes.panel, kPanelStep<F>, sizes.panel};
      multiply_panels<false>(count, steps_of<F>(channels), panels, rows, stride, right,
                             {to, hidden_stride, n}, false);
    };
    if (args.kept) {
      read_kept<W>(args, first, count, at, tile);
    } else {
      multiply_rows_with(tile.normed, sizes.fc1_panels(args), tile.hidden);
    }
    multiply_rows_with(tile.gradient, sizes.fc2_panels(args), tile.dh);
    const T* bias = args.kept ? nullptr : as<T>(args.fc1_bias);  // what is kept has it
    load_all<T>(bias ? bias + at : nullptr, tile.bias, smaller(width, args.hidden - at), A(0));
    for (int64_t j = args.hidden - at; j < width; ++j) tile.bias[j] = 0;
    for (int64_t j = 0; !add && j < width; ++j) bias_gradient[at + j] = 0;
    apply_slope(args.activation, tile, count, width, bias_gradient + at);

    Panels<const F> fc1_rows{sizes.fc1_rows(args) + at * n, kPanelStep<F>, sizes.panels * n * n};
    multiply_panels<false, F>(count, width / v, sizes.channel_panels, tile.dh_rows, hidden_stride,
                              fc1_rows, {tile.dn, stride, n}, panel > begin);
    auto accumulate = [&](const F* left, const A* right, A* to) {
      multiply_panels<true, F>(
          channels, steps_of<F>(count), panels, left, v * stride,
          {reinterpret_cast<const F*>(right), v * hidden_stride, kPanelStep<F>},
          {to + at * channels, n, n * channels}, add);
    };
    accumulate(tile.normed_columns, tile.dh, fc1_gradient);
    accumulate(tile.gradient_columns, tile.hidden, fc2_gradient);
  }
}

template <class T, class W>
static void mlp_backward_typed(const MlpBackwardArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using Tile = MlpBackwardTile<Factor<W>>;
  const Image& in = args.in;
  int64_t channels = in.channels, pixels = in.batch * in.pixels();
  Tile tile(args, scratch(Tile::bytes(args)));
  MlpBackwardSizes<Factor<W>> sizes(args);
  for (int64_t task = begin; task < end; ++task) {
    int64_t row_part = task / args.hidden_parts, hidden_part = task % args.hidden_parts;
    int64_t size = round_up((pixels + args.row_parts - 1) / args.row_parts, kRows);
    int64_t start = smaller(row_part * size, pixels), stop = smaller(start + size, pixels);
    int64_t first_panel = sizes.panels * hidden_part / args.hidden_parts;
    int64_t last_panel = sizes.panels * (hidden_part + 1) / args.hidden_parts;
    int64_t tiles = (stop - start + kTileRows - 1) / kTileRows;
    int64_t step = tiles ? round_up((stop - start + tiles - 1) / tiles, kRows) : 1;
    A* gradients = sizes.gradients(args, row_part);
    A* dn = static_cast<A*>(args.gradient) + hidden_part * pixels * channels;
    double* sums = hidden_part == 0 ? args.column_sums + row_part * channels : nullptr;
    if (start == stop) {
      for (int64_t i = 0; hidden_part == 0 && i < sizes.part; ++i) gradients[i] = 0;
    }
    for (int64_t at = start; at < stop; at += step) {
      int64_t count = smaller(step, stop - at);
      read_tile<T>(args, at, count, sums, tile);
      mlp_backward_tile<T, W>(args, at, count, first_panel, last_panel, gradients, at > start,
                              tile);
      for_each_run(in, at, count, [&](const Run& run) {
        write_rows_of_run(in, tile.dn + run.lane * tile.stride, tile.stride, run, dn);
      });
    }
  }
}

static void mlp_backward(const MlpBackwardArgs& args, int64_t begin, int64_t end) {
  with_types(args, [&](auto* type, auto* weight) {
    mlp_backward_typed<std::remove_pointer_t<decltype(type)>,
                       std::remove_pointer_t<decltype(weight)>>(args, begin, end);
  });
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

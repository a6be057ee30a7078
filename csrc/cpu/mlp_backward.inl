// Gradients of z = x + k ls (ka W2 act(h) + b2), h = W1 n + b1, n = GN(x): for g = k dz,
//     da = ka (ls W2)' g     dh = da act'(h)     dn = W1' dh     dW1 = dh n'     D = g (ka act(h))'
// and dW2 = ls D. Pixels are rows here, and vectors run along (hidden) channels.
#pragma once

#include "activations.inl"
#include "group_norm.inl"
#include "mlp_backward_parts.inl"
#include "rows.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

constexpr int64_t kTileRows = 96;

// Turns h and da (rows, width) into act(h) and dh, times ka of each row, and adds up dh's columns.
template <Activation kActivation, class A>
static void slope_rows(A* h, A* da, int64_t stride, int64_t rows, int64_t width, const A* bias,
                       const A* ka, A* column_sums) {
  constexpr int w = kLanes<A>;
  for (int64_t i = 0; i < rows; ++i, h += stride, da += stride) {
    for (int64_t j = 0; j < width; j += w) {
      Vec<A> v = load(h + j) + load(bias + j), value, slope;
      if constexpr (std::is_same_v<A, double>) {
        for (int lane = 0; lane < w; ++lane) {
          auto both = value_and_slope<kActivation>(v[lane]);
          value[lane] = both.value, slope[lane] = both.slope;
        }
      } else {
        auto both = value_and_slope<kActivation>(v);
        value = both.value, slope = both.slope;
      }
      Vec<A> dh = load(da + j) * ka[i] * slope;
      store(h + j, value * ka[i]);
      store(da + j, dh);
      store(column_sums + j, load(column_sums + j) + dh);
    }
  }
}

template <class A, class... Args>
static void apply_slope(Activation activation, Args... args) {
  with_activation(activation, [&](auto known) { slope_rows<known(), A>(args...); });
}

// The memory of a task, and where its tile is.
template <class A>
struct MlpBackwardTile {
  static constexpr int n = kPanel<A>;
  int64_t channels, wide, stride, chunk, hidden_stride;  // strides: no powers of two
  A *normed, *gradient, *dn, *hidden, *dh, *bias, *ka, *coefficients;

  static int64_t padded(int64_t size) { return round_up(size, n) + n; }

  static int64_t size(const MlpBackwardArgs& args) {
    return kTileRows * (3 * padded(args.in.channels) + 2 * padded(POOLFORMER_CHUNK) + 1) +
           POOLFORMER_CHUNK + 6 * args.in.channels;
  }

  MlpBackwardTile(const MlpBackwardArgs& args, A* memory)
      : channels(args.in.channels),
        stride(padded(channels)),
        chunk(POOLFORMER_CHUNK),
        hidden_stride(padded(chunk)),
        normed(memory),
        gradient(normed + kTileRows * stride),
        dn(gradient + kTileRows * stride),
        hidden(dn + kTileRows * stride),
        dh(hidden + kTileRows * hidden_stride),
        bias(dh + kTileRows * hidden_stride),
        ka(bias + chunk),
        coefficients(ka + kTileRows) {}
};

// Reads the rows [first, first + count): n, g = k dz and ka.
template <class T>
static void read_tile(const MlpBackwardArgs& args, int64_t first, int64_t count,
                      MlpBackwardTile<Acc<T>>& tile) {
  using A = Acc<T>;
  const Image& in = args.in;
  int64_t channels = in.channels;
  A *center = tile.coefficients, *scale = center + channels, *shift = scale + channels;
  A *zeros = shift + channels, *factors = zeros + channels;
  for_each_run(in, first, count, [&](const Run& run) {
    norm_coefficients<T>(in, run.image, args.mean, args.rstd, args.norm_weight, args.norm_bias,
                         center, scale, shift);
    int64_t at = run.lane * tile.stride;
    read_rows(in, as<T>(in.data), run, center, scale, shift, tile.normed + at, tile.stride);
    double k = args.drop_path ? args.drop_path[run.image] : 1;
    double ka = args.hidden_drop_path ? args.hidden_drop_path[run.image] : 1;
    for (int64_t c = 0; c < channels; ++c) {
      zeros[c] = 0;
      factors[c] = static_cast<A>(k);
    }
    read_rows(in, as<T>(args.dz), run, zeros, factors, zeros, tile.gradient + at, tile.stride);
    for (int i = 0; i < run.count; ++i) tile.ka[run.lane + i] = static_cast<A>(ka);
  });
}

// Reads the hidden channels of a chunk from `at` on of the rows [first, first + count).
template <class T>
static void read_kept(const MlpBackwardArgs& args, int64_t first, int64_t count, int64_t at,
                      MlpBackwardTile<Acc<T>>& tile) {
  int64_t size = smaller(tile.chunk, args.hidden - at);
  for (int64_t i = 0; i < count; ++i) {
    Acc<T>* row = tile.hidden + i * tile.hidden_stride;
    load_all<T>(as<T>(args.kept) + (first + i) * args.hidden + at, row, size, Acc<T>(0));
    for (int64_t j = size; j < round_up(size, kPanel<Acc<T>>); ++j) row[j] = 0;
  }
}

// The rows [first, first + count) and the panels [begin, end) of the hidden.
template <class T>
static void mlp_backward_tile(const MlpBackwardArgs& args, int64_t first, int64_t count,
                              int64_t begin, int64_t end, Acc<T>* gradients, bool add,
                              MlpBackwardTile<Acc<T>>& tile) {
  using A = Acc<T>;
  constexpr int n = kPanel<A>;
  MlpBackwardSizes<A> sizes(args);
  int64_t channels = sizes.channels, stride = tile.stride, hidden_stride = tile.hidden_stride;
  A *fc1_gradient = gradients, *fc2_gradient = fc1_gradient + sizes.weight;
  A* bias_gradient = fc2_gradient + sizes.weight;
  read_tile<T>(args, first, count, tile);
  int64_t most = tile.chunk / n;
  for (int64_t panel = begin; panel < end; panel += most) {
    int64_t panels = smaller(most, end - panel), at = panel * n, width = panels * n;
    auto weights = [&](const A* data) {
      return Panels<const A>{data + at * channels, n, n * channels};
    };
    Panels<A> hidden{tile.hidden, hidden_stride, n}, dh{tile.dh, hidden_stride, n};
    if (args.kept) {
      read_kept<T>(args, first, count, at, tile);
    } else {
      multiply_panels<false>(count, channels, panels, tile.normed, stride,
                             weights(sizes.fc1_panels(args)), hidden, false);
    }
    multiply_panels<false>(count, channels, panels, tile.gradient, stride,
                           weights(sizes.fc2_panels(args)), dh, false);
    const T* bias = args.kept ? nullptr : as<T>(args.fc1_bias);  // what is kept has it
    load_all<T>(bias ? bias + at : nullptr, tile.bias, smaller(width, args.hidden - at), A(0));
    for (int64_t j = args.hidden - at; j < width; ++j) tile.bias[j] = 0;
    for (int64_t j = 0; !add && j < width; ++j) bias_gradient[at + j] = 0;
    apply_slope<A>(args.activation, tile.hidden, tile.dh, hidden_stride, count, width,
                   static_cast<const A*>(tile.bias), static_cast<const A*>(tile.ka),
                   bias_gradient + at);

    Panels<const A> fc1_rows{sizes.fc1_rows(args) + at * n, n, sizes.panels * n * n};
    multiply_panels<false, A>(count, width, sizes.channel_panels, tile.dh, hidden_stride, fc1_rows,
                              {tile.dn, stride, n}, panel > begin);
    auto accumulate = [&](const A* left, const A* right, A* to) {
      multiply_panels<true, A>(channels, count, panels, left, stride, {right, hidden_stride, n},
                               {to + at * channels, n, n * channels}, add);
    };
    accumulate(tile.normed, tile.dh, fc1_gradient);
    accumulate(tile.gradient, tile.hidden, fc2_gradient);
  }
}

// sums[c] += the sum of the column c of the tile's gradient.
template <class A>
static void add_columns(const MlpBackwardTile<A>& tile, int64_t count, double* sums) {
  for_each_vector<A>(tile.channels, [&](int64_t c, auto lanes) {
    using V = decltype(lanes);
    V sum = lanes;
    for (int64_t i = 0; i < count; ++i) sum += load_as<V>(tile.gradient + i * tile.stride + c);
    if constexpr (std::is_same_v<V, A>) {
      sums[c] += sum;
    } else {
      for (int i = 0; i < kLanes<A>; ++i) sums[c + i] += sum[i];
    }
  });
}

template <class T>
static void mlp_backward_typed(const MlpBackwardArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Image& in = args.in;
  int64_t channels = in.channels, pixels = in.batch * in.pixels();
  A* memory = static_cast<A*>(scratch(MlpBackwardTile<A>::size(args) * sizeof(A)));
  MlpBackwardTile<A> tile(args, memory);
  MlpBackwardSizes<A> sizes(args);
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
    if (start == stop) {
      for (int64_t i = 0; hidden_part == 0 && i < sizes.part; ++i) gradients[i] = 0;
    }
    for (int64_t at = start; at < stop; at += step) {
      int64_t count = smaller(step, stop - at);
      mlp_backward_tile<T>(args, at, count, first_panel, last_panel, gradients, at > start, tile);
      for_each_run(in, at, count, [&](const Run& run) {
        write_rows_of_run(in, tile.dn + run.lane * tile.stride, tile.stride, run, dn);
      });
      if (hidden_part == 0) add_columns(tile, count, args.column_sums + row_part * channels);
    }
  }
}

static void mlp_backward(const MlpBackwardArgs& args, int64_t begin, int64_t end) {
  with_type(args.in.dtype, [&](auto* type) {
    mlp_backward_typed<std::remove_pointer_t<decltype(type)>>(args, begin, end);
  });
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

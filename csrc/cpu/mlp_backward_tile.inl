// A tile of the MLP's backward: its memory, what it reads, and the activation's part.
#pragma once

#include "activations.inl"
#include "group_norm.inl"
#include "mlp_backward_parts.inl"
#include "rows.inl"

namespace poolformer::cpu::POOLFORMER_ISA {

constexpr int64_t kTileRows = 96;

// The memory of a task, and where its tile is. Left operands are kept in rows, and in columns for
// the weights' gradients, which is the same where a step is one value. Where it is a pair, layer
// scale is a factor of g's rows instead of fc2: they are rounded anyway, each on its own.
template <class F>
struct MlpBackwardTile {
  using A = Acc<F>;
  static constexpr int n = kPanel<A>;
  static constexpr bool kPaired = kStep<F> == 2;
  int64_t channels, stride, chunk, hidden_stride;  // strides: no powers of two
  F *normed, *gradient, *normed_columns, *gradient_columns, *dh_rows;
  A *dn, *hidden, *dh, *bias, *ka, *coefficients;

  static int64_t padded(int64_t size) { return round_up(size, n) + n; }

  static int64_t bytes(const MlpBackwardArgs& args) {
    int64_t row = padded(args.in.channels), hidden_row = padded(POOLFORMER_CHUNK);
    int64_t factors = kTileRows * (2 * row + kPaired * (2 * row + hidden_row));
    int64_t sums = kTileRows * (row + 2 * hidden_row + 1) + POOLFORMER_CHUNK +
                   4 * args.in.channels + kLanes<A>;
    return factors * sizeof(F) + sums * sizeof(A);
  }

  MlpBackwardTile(const MlpBackwardArgs& args, void* memory)
      : channels(args.in.channels),
        stride(padded(channels)),
        chunk(POOLFORMER_CHUNK),
        hidden_stride(padded(chunk)),
        normed(static_cast<F*>(memory)),
        gradient(normed + kTileRows * stride),
        normed_columns(kPaired ? gradient + kTileRows * stride : normed),
        gradient_columns(kPaired ? normed_columns + kTileRows * stride : gradient),
        dh_rows(gradient_columns + kTileRows * stride),
        dn(reinterpret_cast<A*>(dh_rows + kPaired * kTileRows * hidden_stride)),
        hidden(dn + kTileRows * stride),
        dh(hidden + kTileRows * hidden_stride),
        bias(dh + kTileRows * hidden_stride),
        ka(bias + chunk),
        coefficients(ka + kTileRows) {
    if constexpr (!kPaired) dh_rows = dh;
  }

  // Where the sums are read that make_left turns into the left operand `rows`.
  A* sums_of(F* rows) const {
    if constexpr (kPaired) return dn;
    if constexpr (!kPaired) return rows;
  }

  // Turns the sums (count, channels) of sums_of(rows) into factors, in columns and, times `scale`
  // where that is given, in rows.
  void make_left(int64_t count, const A* scale, F* rows, F* columns) const {
#if defined(POOLFORMER_BF16)
    if constexpr (kPaired) {
      constexpr int w = kLanes<A>;
      for (int64_t i = 0; i < count; ++i) {
        std::fill(dn + i * stride + channels, dn + i * stride + round_up(channels, w), A(0));
      }
      for (int64_t i = 0; i < count; i += 2) {
        const A* from = dn + i * stride;
        for (int64_t c = 0; c < channels; c += w) {
          Vec<A> first = load(from + c), second = {};
          if (i + 1 < count) second = load(from + stride + c);
          store_raw<A, w>(columns + i * stride + 2 * c, in_turns(first, second));
          if (scale) first *= load(scale + c), second *= load(scale + c);
          store_rows(rows + i * stride + c, stride, first, second);
        }
      }
    }
#endif
  }
};

// Turns h and da (count, width) into act(h) and dh, times ka of each row, as factors in columns;
// dh also in rows; and adds up dh's columns.
template <Activation kActivation, class F>
static void slope_rows(const MlpBackwardTile<F>& tile, int64_t count, int64_t width,
                       Acc<F>* column_sums) {
  using A = Acc<F>;
  constexpr int w = kLanes<A>, v = kStep<F>;
  int64_t stride = tile.hidden_stride;
  for (int64_t i = 0; i < count; i += v) {
    A *h = tile.hidden + i * stride, *da = tile.dh + i * stride;
    A *h_step = tile.hidden + i / v * stride, *dh_step = tile.dh + i / v * stride;
    for (int64_t j = 0; j < width; j += w) {
      Vec<A> sums = load(column_sums + j), dh[v] = {};
      Vec<A> step = step_of<F>(i, count, [&](int64_t row) {
        Vec<A> x = load(h + (row - i) * stride + j) + load(tile.bias + j), value, slope;
        if constexpr (std::is_same_v<A, double>) {
          for (int lane = 0; lane < w; ++lane) {
            auto both = value_and_slope<kActivation>(x[lane]);
            value[lane] = both.value, slope[lane] = both.slope;
          }
        } else {
          auto both = value_and_slope_as<kActivation, F>(x);
          value = both.value, slope = both.slope;
        }
        dh[row - i] = load(da + (row - i) * stride + j) * tile.ka[row] * slope;
        sums += dh[row - i];
        return value * tile.ka[row];
      });
      store_raw<A, w>(h_step + j, step);
      store(column_sums + j, sums);
#if defined(POOLFORMER_BF16)
      if constexpr (v == 2) {
        store_rows(tile.dh_rows + i * stride + j, stride, dh[0], dh[1]);
        dh[0] = in_turns(dh[0], dh[1]);
      }
#endif
      store_raw<A, w>(dh_step + j, dh[0]);
    }
  }
}

template <class F>
static void apply_slope(Activation activation, const MlpBackwardTile<F>& tile, int64_t count,
                        int64_t width, Acc<F>* column_sums) {
  with_activation(activation,
                  [&](auto known) { slope_rows<known(), F>(tile, count, width, column_sums); });
}

// Reads the rows [first, first + count): n, g = k dz and ka. Adds g's columns to `sums`, if given.
template <class T, class F>
static void read_tile(const MlpBackwardArgs& args, int64_t first, int64_t count, double* sums,
                      const MlpBackwardTile<F>& tile) {
  using A = Acc<T>;
  const Image& in = args.in;
  int64_t channels = in.channels, stride = tile.stride;
  A *center = tile.coefficients, *scale = center + channels, *shift = scale + channels;
  A* gain = shift + channels;
  A *normed = tile.sums_of(tile.normed), *gradient = tile.sums_of(tile.gradient);
  for_each_run(in, first, count, [&](const Run& run) {
    norm_coefficients<T>(in, run.image, args.mean, args.rstd, args.norm_weight, args.norm_bias,
                         center, scale, shift);
    read_rows(in, as<T>(in.data), run, normed + run.lane * stride, stride, [&](auto v, int64_t c) {
      using V = decltype(v);
      return (v - load_as<V>(center + c)) * load_as<V>(scale + c) + load_as<V>(shift + c);
    });
    double ka = args.hidden_drop_path ? args.hidden_drop_path[run.image] : 1;
    for (int i = 0; i < run.count; ++i) tile.ka[run.lane + i] = static_cast<A>(ka);
  });
  tile.make_left(count, nullptr, tile.normed, tile.normed_columns);
  for_each_run(in, first, count, [&](const Run& run) {
    A k = args.drop_path ? static_cast<A>(args.drop_path[run.image]) : A(1);
    read_rows(in, as<T>(args.dz), run, gradient + run.lane * stride, stride,
              [&](auto v, int64_t) { return v * k; });
  });
  if (sums) add_columns(gradient, stride, count, channels, sums);
  load_all<T>(as<T>(args.layer_scale), gain, channels, A(1));
  std::fill(gain + channels, gain + round_up(channels, kLanes<A>), A(0));
  tile.make_left(count, args.layer_scale ? gain : nullptr, tile.gradient, tile.gradient_columns);
}

// Reads the hidden channels of a chunk from `at` on of the rows [first, first + count).
template <class W>
static void read_kept(const MlpBackwardArgs& args, int64_t first, int64_t count, int64_t at,
                      const MlpBackwardTile<Factor<W>>& tile) {
  using A = Acc<W>;
  using K = Kept<W>;
  int64_t size = smaller(tile.chunk, args.hidden - at);
  for (int64_t i = 0; i < count; ++i) {
    A* row = tile.hidden + i * tile.hidden_stride;
    load_all<K>(as<K>(args.kept) + (first + i) * args.hidden + at, row, size, A(0));
    for (int64_t j = size; j < round_up(size, kPanel<A>); ++j) row[j] = 0;
  }
}

}  // namespace poolformer::cpu::POOLFORMER_ISA

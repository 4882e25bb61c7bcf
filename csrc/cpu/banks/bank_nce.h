// Noise-contrastive estimation against the banks of the other networks, sample by sample.
//
// x[k] = z[k] - log_normalizer - log_noise is the log-odds of a key to be the positive; a row is
// softplus(-x[0]) + sum_k>=1 (softplus(x[k]) + log_noise_excess).
#pragma once

#include <cmath>
#include <cstdint>

#include "../dispatch/kernels.h"
#include "../simd/capability.h"
#include "../simd/logit_row.h"
#include "../simd/vec.h"
#include "../simd/workspace.h"
#include "bank_sweep.h"

namespace mclfast::cpu::MCLFAST_CAPABILITY {

// log(1 + x) for x in 0 .. 1, as 2 artanh(x / (2 + x)): exact to rounding for small x too, where
// the many negatives are.
template <class T> INLINE Vec<T> log1p_unit(Vec<T> x) {
  constexpr int kTerms = sizeof(T) == 4 ? 8 : 17; // the argument of artanh is at most 1/3
  const Vec<T> s = x / (x + T(2)), square = s * s;
  Vec<T> sum{};
  UNROLL for (int k = kTerms; k > 0; --k) sum = sum * square + T(2) / T(2 * k - 1);
  return s * sum;
}

template <class T> struct NceBand {
  const BankNce<T>& p;
  int64_t M, stride; // of a row of logits
  T inverse_temperature;
  bool second, keeps;
  BankSweep<T> sweep;
  Buffer<T> logits;   // [height, M, M, stride], bank by node
  Buffer<T> tangents; // [M, M, kKeyTile], double backward only
  Buffer<T> scratch;  // [M, kKeyTile]

  static int64_t row_stride(const BankKeys& keys, Mode mode) {
    return mode == Mode::kForward
               ? round_up(keys.positives_count + keys.negatives_count, kLanes<T>)
               : kKeyTile;
  }

  NceBand(const BankNce<T>& p, Mode mode, int64_t height)
      : p(p), M(p.keys.banks_count), stride(row_stride(p.keys, mode)),
        inverse_temperature(T(1 / p.temperature)), second(mode == Mode::kDoubleBackward),
        keeps(mode == Mode::kForward), sweep(p.keys, M, p.batch, height, p.nodes, p.tangents),
        logits((keeps ? height : 1) * M * M * stride),
        tangents(second ? M * M * kKeyTile : 0), scratch(keeps ? stride : M * kKeyTile) {
    fill(logits.get(), (keeps ? height : 1) * M * M * stride, kPadding<T>);
    if (second) fill(tangents.get(), M * M * kKeyTile, T(0));
  }

  T* z(int64_t i, int64_t m, int64_t e) const { return logits + ((i * M + m) * M + e) * stride; }

  template <class Body> void for_each_range(int64_t m, const Body& body) const {
    if (m > 0) body(NodeRange{0, m});
    if (m + 1 < M) body(NodeRange{m + 1, M});
  }

  void lse_rows(int64_t first, int64_t count) {
    sweep.start(first, count);
    sweep.for_each_tile(false, [&](const KeyTile& tile) {
      for (int64_t m = 0; m < M; ++m) {
        sweep.gather(tile, m, false);
        for (int64_t i = tile.first; i < tile.last; ++i)
          for_each_range(m, [&](NodeRange range) {
            sweep.products(tile, m, i, range, BankSweep<T>::kNodes, inverse_temperature,
                           z(i, m, range.begin) + tile.column, stride,
                           makes_prefetch(tile, i, m, range));
          });
      }
    });
    for (int64_t i = 0; i < count; ++i)
      for (int64_t m = 0; m < M; ++m)
        for (int64_t e = 0; e < M; ++e) {
          if (m == e) continue;
          const T top = row_max(z(i, m, e), stride);
          p.lse[(m * M + e) * p.batch + first + i] =
              top + std::log(exp_row(z(i, m, e), T(1), top, scratch.get(), stride));
        }
  }

  // Rows and gradient, or its derivative: one pass, because every term stands alone.
  void gradient_rows(int64_t first, int64_t count) {
    sweep.start(first, count);
    sweep.for_each_tile(false, [&](const KeyTile& tile) {
      for (int64_t m = 0; m < M; ++m) {
        sweep.gather(tile, m, false);
        for (int64_t i = tile.first; i < tile.last; ++i)
          for_each_range(m, [&](NodeRange range) {
            sweep.products(tile, m, i, range, BankSweep<T>::kNodes, inverse_temperature,
                           z(0, m, range.begin), stride, makes_prefetch(tile, i, m, range));
            if (second)
              sweep.products(tile, m, i, range, BankSweep<T>::kTangents, inverse_temperature,
                             tangents + (m * M + range.begin) * kKeyTile, kKeyTile, false);
            for (int64_t e = range.begin; e < range.end; ++e)
              take_tile(tile, m, e, first + i, scratch + (e - range.begin) * kKeyTile);
            sweep.accumulate(tile, m, i, range, inverse_temperature, scratch.get());
          });
      }
    });
    sweep.write_gradient(p.grad_nodes);
  }

private:
  // Once for every tile and bank.
  static bool makes_prefetch(const KeyTile& tile, int64_t i, int64_t m, NodeRange range) {
    return i == tile.first && (range.begin == 0 || m == 0);
  }

  // out = gradient of a tile of logits, whose terms are added to the row.
  void take_tile(const KeyTile& tile, int64_t m, int64_t e, int64_t r, T* out) {
    T* row = z(0, m, e);
    fill(row + tile.count, kKeyTile - tile.count, kPadding<T>);
    const T shift = p.log_normalizer[m * M + e] + T(p.log_noise), scale = T(1) / T(p.batch);
    const bool positive = tile.column == 0; // a tile of its own: there is one positive
    Vec<T> terms{};
    for (int64_t c = 0; c < tile.count; c += kLanes<T>) {
      const Vec<T> x = load(row + c) - shift, zero{}, one = broadcast(T(1));
      const Vec<T> small = exponential(x > zero ? -x : x); // exp(-|x|)
      const Vec<T> larger = one / (one + small), smaller = small * larger;
      if (second) {
        const T* tangent = tangents + (m * M + e) * kKeyTile;
        store(out + c, scale * larger * smaller * load(tangent + c));
        continue;
      }
      const Vec<T> sign = positive ? -x : x;
      terms += maximum<T>(sign, zero) + log1p_unit<T>(small);
      // Sigmoid of x, less 1 for the positive: minus the sigmoid of -x.
      store(out + c, positive ? -scale * (x > zero ? smaller : larger)
                              : scale * (x > zero ? larger : smaller));
    }
    if (second) return;
    T& sum = p.rows[(m * M + e) * p.batch + r];
    if (positive) {
      // The other lanes hold padding, far on the side of the negatives.
      const T x = row[0] - shift;
      sum += x > T(0) ? std::log1p(std::exp(-x)) : std::log1p(std::exp(x)) - x;
    } else {
      sum += sum_lanes<T>(terms) + T(p.log_noise_excess * double(tile.count));
    }
  }
};

template <class T> void bank_nce(const BankNce<T>& p, Mode mode) {
  const int64_t M = p.keys.banks_count;
  const int64_t row_bytes =
      M * M * NceBand<T>::row_stride(p.keys, mode) * int64_t(sizeof(T));
  const BankBlocks blocks(p.keys, p.batch, row_bytes);
  const EvenSplit split(blocks.count);
  run_parallel(split.workers, [&](int64_t worker) {
    NceBand<T> band(p, mode, blocks.height);
    for (int64_t block = split.begin(worker); block < split.begin(worker + 1); ++block) {
      const int64_t first = block * blocks.height;
      const int64_t count = min_of(p.batch - first, blocks.height);
      mode == Mode::kForward ? band.lse_rows(first, count) : band.gradient_rows(first, count);
    }
  });
}

} // namespace mclfast::cpu::MCLFAST_CAPABILITY

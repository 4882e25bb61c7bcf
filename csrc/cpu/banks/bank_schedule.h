// Losses against memory banks: rows, their gradient and its derivative, sample by sample.
//
// z[m, e] are the logits of one sample: node e against its keys in bank m. In the intra vectors
// (m is the network of e) the anchor's own entry, column 0, is hidden by kPadding; a softmax weight
// under it is below any that a sum can see.
//
// The forward keeps the logits of its block and takes the statistics from whole rows; the fused
// gradient goes over the keys once more with these logits. The backward, given the statistics, is
// one pass that computes the logits of each tile again; at a sharp temperature, where the rounding
// of the statistics is large beside 1, it keeps the logits to divide the weights by their sums. The
// double backward keeps logits and their tangents: the means of the tangents come before the first
// gradient.
#pragma once

#include <cmath>
#include <cstdint>

#include "../../families.h"
#include "../dispatch/kernels.h"
#include "../simd/capability.h"
#include "../simd/logit_row.h"
#include "../simd/vec.h"
#include "../simd/workspace.h"
#include "bank_sweep.h"

namespace mclfast::cpu::MCLFAST_CAPABILITY {

template <class T> struct BankProblem : BankRows<T> {
  static constexpr double kSharp = 0.02;
  Mode mode;
  int64_t M, N, B, columns, padded;
  int64_t own_stride; // of a row of logits
  T inverse_temperature, inverse_kl, kl;
  bool forward, gradient, second, keeps; // what the mode computes; logits of whole rows

  BankProblem(const BankRows<T>& arguments, Mode mode)
      : BankRows<T>(arguments), mode(mode), M(arguments.keys.banks_count),
        N(arguments.nodes_count), B(arguments.batch),
        columns(arguments.keys.positives_count + arguments.keys.negatives_count),
        padded(round_up(columns, kLanes<T>)), inverse_temperature(T(1 / arguments.temperature)),
        inverse_kl(T(1 / arguments.kl_temperature)), kl(T(arguments.kl_temperature)),
        forward(mode == Mode::kForward || mode == Mode::kFused),
        gradient(mode != Mode::kForward), second(mode == Mode::kDoubleBackward),
        keeps(mode != Mode::kBackward || arguments.temperature < kSharp) {
    // Tiles are read in whole vectors from any column on.
    own_stride = keeps ? padded + kLanes<T> : kKeyTile;
  }

  bool wants(unsigned family) const { return (this->families & family) != 0; }
  bool intra(int64_t m, int64_t e) const { return this->networks[e] == m; }
  bool hard(int64_t m, int64_t e) const { return wants(intra(m, e) ? kVcl : kIcl); }
  bool soft(int64_t m, int64_t e) const { return wants(intra(m, e) ? kSoftVcl : kSoftIcl); }
  NodeRange network(int64_t m) const { return {this->offsets[m], this->offsets[m + 1]}; }

  // The nodes whose logits against bank m are used: calls body(range) for up to two ranges.
  template <class Body> void for_each_range(int64_t m, const Body& body) const {
    const bool own = wants(kVcl | kSoftVcl), others = wants(kIcl | kSoftIcl);
    const auto call = [&](int64_t begin, int64_t end) {
      if (begin < end) body(NodeRange{begin, end});
    };
    const NodeRange range = network(m);
    if (own && others) return call(0, N);
    if (own) return call(range.begin, range.end);
    call(0, range.begin);
    call(range.end, N);
  }
  // The pairs of a network m's nodes a with the nodes e of others: calls body(m, a, e).
  template <class Body> void for_each_cross(const Body& body) const {
    for (int64_t m = 0; m < M; ++m)
      for (int64_t a = this->offsets[m]; a < this->offsets[m + 1]; ++a)
        for (int64_t e = 0; e < N; ++e)
          if (!intra(m, e)) body(m, a, e);
  }

  // Positives of a hard row: the anchor's own entry counts in the banks of other networks.
  int64_t positives(int64_t m, int64_t e) const {
    return this->keys.positives_count - (intra(m, e) ? 1 : 0);
  }
  int64_t pair(int64_t a, int64_t b, int64_t r) const { return (a * N + b) * B + r; }
  // The row or cotangent of (m, e) in the arrays of vcl and icl.
  T* hard_row(T* vcl, T* icl, int64_t m, int64_t e, int64_t r) const {
    return intra(m, e) ? vcl + e * B + r : icl + pair(m, e, r);
  }
  T hard_cotangent(int64_t m, int64_t e, int64_t r) const {
    if (!hard(m, e) || positives(m, e) == 0) return T(0);
    return intra(m, e) ? this->g_vcl[e * B + r] : this->g_icl[pair(m, e, r)];
  }
};

// Softmax weights of one vector: hard ones exp(z - hard_shift) * hard_scale, soft ones
// exp((z - soft_shift) / T) * soft_scale; and what the gradient multiplies them with.
template <class T> struct BankVector {
  T hard_shift, hard_scale, soft_shift, soft_scale;
  T g_hard;               // cotangent of the hard row
  T g_soft;               // sum of the cotangents of the soft rows whose student this is
  T hard_mean, soft_mean; // of the tangent, double backward only
};

// Workspace of one worker.
template <class T> struct BankBand {
  static constexpr int64_t kChunk = 256; // columns of a row that the statistics take at a time

  const BankProblem<T>& p;
  int64_t height;
  BankSweep<T> sweep;
  Buffer<T> logits, tangents;    // [height, M, N, own_stride]
  Buffer<BankVector<T>> vectors; // [height, M, N]
  Buffer<T> coefficients;        // [height, M, N, N], of the teachers of each student
  Buffer<T> weights;             // [M, N, kChunk] or [M, N, kKeyTile], soft
  Buffer<T> scratch;             // [kChunk] or [N, kKeyTile]
  Buffer<SoftRow<T>> soft_rows;  // [M, N]
  Buffer<T> cross;               // [2, N, N]

  BankBand(const BankProblem<T>& p, int64_t height)
      : p(p), height(height), sweep(p.keys, p.N, p.B, height, p.nodes, p.tangents),
        logits(height * p.M * p.N * p.own_stride),
        tangents(p.second ? height * p.M * p.N * p.own_stride : 0), vectors(height * p.M * p.N),
        coefficients(p.gradient && !p.second ? height * p.M * p.N * p.N : 0),
        weights(p.M * p.N * kChunk), scratch(max_of(kChunk, p.N * kKeyTile)),
        soft_rows(p.M * p.N), cross(2 * p.N * p.N) {
    fill(logits.get(), height * p.M * p.N * p.own_stride, kPadding<T>);
    if (p.second) fill(tangents.get(), height * p.M * p.N * p.own_stride, T(0));
  }

  int64_t at(int64_t i, int64_t m, int64_t e) const { return (i * p.M + m) * p.N + e; }
  T* z(int64_t i, int64_t m, int64_t e) const { return logits + at(i, m, e) * p.own_stride; }
  T* y(int64_t i, int64_t m, int64_t e) const { return tangents + at(i, m, e) * p.own_stride; }
  BankVector<T>& vector(int64_t i, int64_t m, int64_t e) const { return vectors[at(i, m, e)]; }
  T* coefficient(int64_t i, int64_t m, int64_t e) const {
    return coefficients + at(i, m, e) * p.N;
  }
  // Soft weights of the sample at hand, for a chunk or a tile of columns.
  T* chunk(int64_t m, int64_t e) const { return weights + (m * p.N + e) * kChunk; }
  SoftRow<T>& soft_row(int64_t m, int64_t e) const { return soft_rows[m * p.N + e]; }

  template <class Body> void for_each_vector(const Body& body) const {
    for (int64_t m = 0; m < p.M; ++m)
      p.for_each_range(m, [&](NodeRange range) {
        for (int64_t e = range.begin; e < range.end; ++e) body(m, e);
      });
  }

  void run(int64_t first, int64_t count);
  void take_products(const KeyTile& tile, int64_t m);
  void forward_row(int64_t i, int64_t r);
  void normalise_row(int64_t i);
  void second_row(int64_t i, int64_t r);
  void set_cotangents(int64_t i, int64_t r);
  void soft_weights(const KeyTile& tile, int64_t i);
  void add_gradient(const KeyTile& tile, int64_t i, int64_t m, NodeRange range);
  void gradient_logits(const KeyTile& tile, int64_t i, int64_t m, int64_t e, T* out) const;
};

// Logits of a gathered tile, and their tangents in the double backward.
template <class T> void BankBand<T>::take_products(const KeyTile& tile, int64_t m) {
  const int64_t column = p.keeps ? tile.column : 0;
  for (int64_t i = tile.first; i < tile.last; ++i) {
    bool first_range = true;
    p.for_each_range(m, [&](NodeRange range) {
      // The first range of the first sample makes the prefetches.
      sweep.products(tile, m, i, range, BankSweep<T>::kNodes, p.inverse_temperature,
                     z(i, m, range.begin) + column, p.own_stride,
                     first_range && i == tile.first);
      first_range = false;
      if (p.second)
        sweep.products(tile, m, i, range, BankSweep<T>::kTangents, p.inverse_temperature,
                       y(i, m, range.begin) + column, p.own_stride, false);
    });
    if (tile.column > 0) continue;
    for (int64_t e = p.offsets[m]; e < p.offsets[m + 1]; ++e) z(i, m, e)[0] = kPadding<T>;
  }
}

template <class T> T mean_of(const T* x, int64_t begin, int64_t end) {
  T sum = 0;
  for (int64_t k = begin; k < end; ++k) sum += x[k];
  return sum / T(end - begin);
}

// Rows and statistics of sample r from its logits.
template <class T> void BankBand<T>::forward_row(int64_t i, int64_t r) {
  const int64_t N = p.N;
  T *cross_intra = cross, *cross_inter = cross + N * N;
  fill(cross.get(), 2 * N * N, T(0));
  for_each_vector([&](int64_t m, int64_t e) {
    const T top = row_max(z(i, m, e), p.padded);
    vector(i, m, e) = {top, T(0), top, T(0), T(0), T(0), T(0), T(0)};
  });
  // The scales hold the sums until the last chunk.
  for (int64_t c = 0; c < p.padded; c += kChunk) {
    const int64_t count = min_of(p.padded - c, kChunk);
    for_each_vector([&](int64_t m, int64_t e) {
      BankVector<T>& v = vector(i, m, e);
      const T* row = z(i, m, e) + c;
      if (p.hard(m, e)) v.hard_scale += exp_row(row, T(1), v.hard_shift, scratch.get(), count);
      if (p.soft(m, e))
        v.soft_scale += exp_row(row, p.inverse_kl, v.soft_shift, chunk(m, e), count);
    });
    // Teacher b of student a in soft_vcl; teacher p[m, e] of student p[net e, a] in soft_icl.
    p.for_each_cross([&](int64_t m, int64_t a, int64_t e) {
      const int64_t n = p.networks[e];
      if (p.wants(kSoftVcl))
        cross_intra[a * N + e] +=
            mean_difference(chunk(n, e), z(i, n, e) + c, z(i, m, a) + c, count);
      if (p.wants(kSoftIcl))
        cross_inter[a * N + e] +=
            mean_difference(chunk(n, a), z(i, n, a) + c, z(i, m, e) + c, count);
    });
  }
  for_each_vector([&](int64_t m, int64_t e) {
    BankVector<T>& v = vector(i, m, e);
    if (p.hard(m, e)) {
      const T lse = v.hard_shift + std::log(v.hard_scale);
      p.lse[p.pair(m, e, r)] = lse;
      if (p.positives(m, e) > 0)
        *p.hard_row(p.vcl, p.icl, m, e, r) =
            lse - mean_of(z(i, m, e), p.intra(m, e) ? 1 : 0, p.keys.positives_count);
    }
    if (p.soft(m, e)) {
      soft_row(m, e).top = v.soft_shift, soft_row(m, e).sum = v.soft_scale;
      p.kl_lse[p.pair(m, e, r)] = soft_row(m, e).lse(p.inverse_kl);
    }
    v.hard_scale = T(1) / v.hard_scale, v.soft_scale = T(1) / v.soft_scale;
  });
  const auto divergence = [&](const SoftRow<T>& student, const SoftRow<T>& teacher, T difference) {
    const T lse = lse_difference(student, teacher, p.inverse_kl);
    return p.kl * (difference / teacher.sum + p.kl * lse);
  };
  p.for_each_cross([&](int64_t m, int64_t a, int64_t e) {
    const int64_t n = p.networks[e];
    if (p.wants(kSoftVcl))
      p.soft_vcl[p.pair(a, e, r)] =
          divergence(soft_row(m, a), soft_row(n, e), cross_intra[a * N + e]);
    if (p.wants(kSoftIcl))
      p.soft_icl[p.pair(a, e, r)] =
          divergence(soft_row(m, e), soft_row(n, a), cross_inter[a * N + e]);
  });
}

// Scales of the weights from the logits and the saved statistics.
template <class T> void BankBand<T>::normalise_row(int64_t i) {
  for_each_vector([&](int64_t m, int64_t e) {
    BankVector<T>& v = vector(i, m, e);
    T hard = 0, soft = 0;
    for (int64_t c = 0; c < p.padded; c += kChunk) {
      const T* row = z(i, m, e) + c;
      const int64_t count = min_of(p.padded - c, kChunk);
      if (p.hard(m, e)) hard += exp_row(row, T(1), v.hard_shift, scratch.get(), count);
      if (p.soft(m, e)) soft += exp_row(row, p.inverse_kl, v.soft_shift, scratch.get(), count);
    }
    v.hard_scale = T(1) / hard, v.soft_scale = T(1) / soft;
  });
}

// Means of the tangents and gradients of the cotangents.
template <class T> void BankBand<T>::second_row(int64_t i, int64_t r) {
  const int64_t N = p.N;
  T *cross_intra = cross, *cross_inter = cross + N * N;
  fill(cross.get(), 2 * N * N, T(0));
  normalise_row(i);
  for (int64_t c = 0; c < p.padded; c += kChunk) {
    const int64_t count = min_of(p.padded - c, kChunk);
    for_each_vector([&](int64_t m, int64_t e) {
      BankVector<T>& v = vector(i, m, e);
      const T *row = z(i, m, e) + c, *tangent = y(i, m, e) + c;
      if (p.hard(m, e)) {
        exp_row(row, T(1), v.hard_shift, scratch.get(), count);
        v.hard_mean += dot(scratch.get(), tangent, count) * v.hard_scale;
      }
      if (p.soft(m, e)) {
        exp_row(row, p.inverse_kl, v.soft_shift, chunk(m, e), count);
        scale_row(chunk(m, e), v.soft_scale, count);
        v.soft_mean += dot(chunk(m, e), tangent, count);
      }
    });
    // The difference of two means would lose what student and teacher have in common.
    p.for_each_cross([&](int64_t m, int64_t a, int64_t e) {
      const int64_t n = p.networks[e];
      if (p.wants(kSoftVcl))
        cross_intra[a * N + e] += mean_difference(y(i, m, a) + c, chunk(m, a), chunk(n, e), count);
      if (p.wants(kSoftIcl))
        cross_inter[a * N + e] += mean_difference(y(i, m, e) + c, chunk(m, e), chunk(n, a), count);
    });
  }
  for_each_vector([&](int64_t m, int64_t e) {
    if (p.hard(m, e) && p.positives(m, e) > 0)
      *p.hard_row(p.vcl, p.icl, m, e, r) =
          vector(i, m, e).hard_mean -
          mean_of(y(i, m, e), p.intra(m, e) ? 1 : 0, p.keys.positives_count);
  });
  p.for_each_cross([&](int64_t, int64_t a, int64_t e) {
    if (p.wants(kSoftVcl)) p.soft_vcl[p.pair(a, e, r)] = p.kl * cross_intra[a * N + e];
    if (p.wants(kSoftIcl)) p.soft_icl[p.pair(a, e, r)] = p.kl * cross_inter[a * N + e];
  });
}

// The factors of the weights in the gradient of sample r.
template <class T> void BankBand<T>::set_cotangents(int64_t i, int64_t r) {
  for_each_vector([&](int64_t m, int64_t e) {
    BankVector<T>& v = vector(i, m, e);
    v.g_hard = p.hard_cotangent(m, e, r);
    v.g_soft = T(0);
    if (!p.soft(m, e)) return;
    for (int64_t t = 0; t < p.N; ++t) {
      const bool teaches = p.intra(m, e) ? !p.intra(m, t) : p.intra(m, t);
      if (!teaches) continue;
      const T g = p.intra(m, e) ? p.g_soft_vcl[p.pair(e, t, r)] : p.g_soft_icl[p.pair(t, e, r)];
      v.g_soft += g;
      if (!p.second) coefficient(i, m, e)[t] = p.kl * g;
    }
  });
}

template <class T> void BankBand<T>::soft_weights(const KeyTile& tile, int64_t i) {
  const int64_t column = p.keeps ? tile.column : 0, count = round_up(tile.count, kLanes<T>);
  for_each_vector([&](int64_t m, int64_t e) {
    if (!p.soft(m, e)) return;
    const BankVector<T>& v = vector(i, m, e);
    exp_row(z(i, m, e) + column, p.inverse_kl, v.soft_shift, chunk(m, e), count);
    scale_row(chunk(m, e), v.soft_scale, count);
  });
}

// out = gradient of the logits of a tile without the part of the positives' mean.
template <class T>
void BankBand<T>::gradient_logits(const KeyTile& tile, int64_t i, int64_t m, int64_t e,
                                  T* out) const {
  const int64_t column = p.keeps ? tile.column : 0;
  const BankVector<T>& v = vector(i, m, e);
  const T* row = z(i, m, e) + column;
  const bool hard = v.g_hard != T(0), soft = p.soft(m, e);
  const T hard_scale = v.g_hard * v.hard_scale;
  if (p.second) {
    const T* tangent = y(i, m, e) + column;
    const T soft_scale = v.g_soft * v.soft_scale;
    for (int64_t c = 0; c < tile.count; c += kLanes<T>) {
      const Vec<T> x = load(row + c), dx = load(tangent + c);
      Vec<T> d{};
      if (hard) d += hard_scale * exponential(x - v.hard_shift) * (dx - v.hard_mean);
      if (soft)
        d += soft_scale * exponential((x - v.soft_shift) * p.inverse_kl) * (dx - v.soft_mean);
      store(out + c, d);
    }
    return;
  }
  // Teachers: the nodes outside the network for an intra vector, those of bank m for the others.
  const NodeRange own = p.network(m);
  const NodeRange outside[] = {{0, own.begin}, {own.end, p.N}}, inside[] = {own, {0, 0}};
  const NodeRange* teachers = p.intra(m, e) ? outside : inside;
  const T *coefficients = coefficient(i, m, e), *q = chunk(m, e);
  for (int64_t c = 0; c < tile.count; c += kLanes<T>) {
    Vec<T> d{};
    if (hard) d = hard_scale * exponential(load(row + c) - v.hard_shift);
    if (soft) {
      const Vec<T> student = load(q + c);
      for (int part = 0; part < 2; ++part)
        for (int64_t t = teachers[part].begin; t < teachers[part].end; ++t) {
          const T* teacher = p.intra(m, e) ? chunk(p.networks[t], t) : chunk(p.networks[e], t);
          d += coefficients[t] * (student - load(teacher + c));
        }
    }
    store(out + c, d);
  }
}

// Adds what the gathered tile of bank m contributes to the gradients of a range of nodes.
template <class T>
void BankBand<T>::add_gradient(const KeyTile& tile, int64_t i, int64_t m, NodeRange range) {
  for (int64_t e = range.begin; e < range.end; ++e) {
    T* out = scratch + (e - range.begin) * kKeyTile;
    gradient_logits(tile, i, m, e, out);
    const int64_t count = p.positives(m, e);
    if (p.second || count == 0) continue;
    const T share = vector(i, m, e).g_hard / T(count);
    const int64_t end = min_of(tile.count, p.keys.positives_count - tile.column);
    for (int64_t c = p.intra(m, e) && tile.column == 0 ? 1 : 0; c < end; ++c) out[c] -= share;
  }
  sweep.accumulate(tile, m, i, range, p.inverse_temperature, scratch.get());
}

// Samples first .. first + count - 1.
template <class T> void BankBand<T>::run(int64_t first, int64_t count) {
  sweep.start(first, count);
  if (!p.forward) {
    for (int64_t i = 0; i < count; ++i)
      for_each_vector([&](int64_t m, int64_t e) {
        const int64_t at = p.pair(m, e, first + i);
        vector(i, m, e) = {p.lse[at], T(1), p.kl_lse[at] * p.kl, T(1), T(0), T(0), T(0), T(0)};
      });
  }
  if (p.keeps) {
    sweep.for_each_tile(false, [&](const KeyTile& tile) {
      for (int64_t m = 0; m < p.M; ++m) {
        sweep.gather(tile, m, false);
        take_products(tile, m);
      }
    });
    for (int64_t i = 0; i < count; ++i) {
      if (p.forward) forward_row(i, first + i);
      else if (p.second) second_row(i, first + i);
      else normalise_row(i);
    }
  }
  if (!p.gradient) return;
  for (int64_t i = 0; i < count; ++i) set_cotangents(i, first + i);
  sweep.for_each_tile(p.keeps, [&](const KeyTile& tile) {
    for (int64_t m = 0; m < p.M; ++m) {
      sweep.gather(tile, m, p.keeps);
      if (!p.keeps) take_products(tile, m);
    }
    for (int64_t i = tile.first; i < tile.last; ++i) {
      if (!p.second) soft_weights(tile, i);
      for (int64_t m = 0; m < p.M; ++m)
        p.for_each_range(m, [&](NodeRange range) { add_gradient(tile, i, m, range); });
    }
  });
  sweep.write_gradient(p.grad_nodes);
}

template <class T> void bank_rows(const BankRows<T>& arguments, Mode mode) {
  const BankProblem<T> p(arguments, mode);
  const int64_t row_bytes = p.M * p.N * p.own_stride * int64_t(sizeof(T));
  const BankBlocks blocks(p.keys, p.B, row_bytes);
  const EvenSplit split(blocks.count);
  run_parallel(split.workers, [&](int64_t worker) {
    BankBand<T> band(p, blocks.height);
    for (int64_t block = split.begin(worker); block < split.begin(worker + 1); ++block) {
      const int64_t first = block * blocks.height;
      band.run(first, min_of(p.B - first, blocks.height));
    }
  });
}

} // namespace mclfast::cpu::MCLFAST_CAPABILITY

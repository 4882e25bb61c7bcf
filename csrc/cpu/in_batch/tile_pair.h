// All rows of an unordered pair of nodes from one [B, B] matrix of logits.
//
// S_ba is the transpose of S_ab, so tiles (I, J) and (J, I) are visited together: the second is
// transposed in registers, and one sweep gives the sums over rows (orientation ab) and over columns
// (orientation ba). A second sweep overwrites the tiles with H = D_ab + D_ba^T, and
// grad_a += H E_b, grad_b += H^T E_a.
//
// The exponentials are taken without a shift, which is safe while |S| <= kLargestLogit; then
// exp(S) is the kl_temperature-th power of exp(S / kl_temperature) when that is a small integer.
#pragma once

#include <cmath>
#include <cstdint>

#include "../../families.h"
#include "../simd/capability.h"
#include "../simd/gemm.h"
#include "../simd/logit_row.h"
#include "../simd/vec.h"
#include "../simd/workspace.h"
#include "mcl_problem.h"

namespace mclfast::cpu::MCLFAST_CAPABILITY {

template <class T> constexpr double kLargestLogit = sizeof(T) == 4 ? 52 : 300;

template <class T> struct PairWorkspace {
  // Orientation ab first, ba second; arrays are [padded].
  struct Side {
    T* sums[5];
    T *u, *v, *w; // coefficients of exp(S), exp(S / kl) and of the latter's transpose
    T *ud, *vd;   // u <p, Sd>, v <q, Sd> of the double backward
  };
  Buffer<T> logits, tangents; // [padded, stride]
  Buffer<T> arrays;
  Side ab, ba;

  explicit PairWorkspace(const MclProblem<T>& p)
      : logits(p.padded * p.stride), tangents(p.second ? p.padded * p.stride : 0),
        arrays(20 * p.padded) {
    T* next = arrays;
    Side* const sides[] = {&ab, &ba};
    for (Side* side : sides) {
      T** const arrays[] = {&side->sums[0], &side->sums[1], &side->sums[2], &side->sums[3],
                            &side->sums[4], &side->u,       &side->v,       &side->w,
                            &side->ud,      &side->vd};
      for (T** array : arrays) {
        *array = next;
        next += p.padded;
      }
    }
  }
};

// kHard: vcl and icl, kSoft: their soft twins. kPower: exp(S) = exp(S / kl_temperature)^kPower, 0
// when it takes its own exponential.
template <class T, bool kHard, bool kSoft, int kPower> struct TilePair {
  typedef Vec<T> V;
  typedef PairWorkspace<T> Workspace;
  static constexpr int W = kLanes<T>;
  template <bool kSecond> static constexpr int kSums = kSecond ? 5 : 3;

  struct Exponentials {
    V soft{}, hard{};
    INLINE Exponentials(V s, T inverse_kl) {
      if (kSoft) soft = exponential(s * inverse_kl);
      if (kHard) {
        if (kPower == 0) hard = exponential(s);
        if (kPower == 1) hard = soft;
        if (kPower == 2) hard = soft * soft;
        if (kPower == 3) hard = soft * soft * soft;
        if (kPower == 4) hard = (soft * soft) * (soft * soft);
      }
    }
  };

  // Orientation ab gets the rows of tile (I, J) and the columns of its transposed twin, ba the
  // rest, in the same order: where S is symmetric, as it is for two equal nodes, so are the sums,
  // to the last bit, and the soft loss is 0.
  //
  // First order: sums of exp(S / kl), exp(S), exp(S / kl) (S - S^T).
  // Second order: of exp(S / kl), exp(S), and of Sd times exp(S^T / kl), exp(S), exp(S / kl).
  template <bool kSecond, bool kDiagonal>
  static INLINE void sum_tile(const MclProblem<T>& p, Workspace& ws, int64_t I, int64_t J,
                              V* rows_ab, V* rows_ba) {
    T t_tile[W * W], td_tile[W * W];
    transpose_block<T>(ws.logits + J * p.stride + I, p.stride, t_tile, W);
    if (kSecond) transpose_block<T>(ws.tangents + J * p.stride + I, p.stride, td_tile, W);
    V columns_ab[kSums<kSecond>] = {}, columns_ba[kSums<kSecond>] = {};
    for (int i = 0; i < W; ++i) {
      const V s = load<T>(ws.logits + (I + i) * p.stride + J), t = load(t_tile + i * W);
      Exponentials x(s, p.inverse_kl), xt(t, p.inverse_kl);
      if (kDiagonal && kHard) {
        x.hard = without_lane<T>(x.hard, i);
        xt.hard = without_lane<T>(xt.hard, i);
      }
      V own[5] = {x.soft, x.hard}, other[5] = {xt.soft, xt.hard};
      if (kSecond) {
        const V sd = load<T>(ws.tangents + (I + i) * p.stride + J), td = load(td_tile + i * W);
        own[2] = xt.soft * sd, own[3] = x.hard * sd, own[4] = x.soft * sd;
        other[2] = x.soft * td, other[3] = xt.hard * td, other[4] = xt.soft * td;
      } else {
        own[2] = x.soft * (s - t);
        other[2] = xt.soft * (t - s);
      }
      UNROLL for (int k = 0; k < kSums<kSecond>; ++k) {
        if (k % 2 ? !kHard : !kSoft) continue;
        rows_ab[kSums<kSecond> * i + k] += own[k];
        rows_ba[kSums<kSecond> * i + k] += other[k];
        if (kDiagonal) continue;
        columns_ab[k] += other[k];
        columns_ba[k] += own[k];
      }
    }
    for (int k = 0; k < kSums<kSecond> && !kDiagonal; ++k) {
      store(ws.ab.sums[k] + J, load(ws.ab.sums[k] + J) + columns_ab[k]);
      store(ws.ba.sums[k] + J, load(ws.ba.sums[k] + J) + columns_ba[k]);
    }
  }

  template <bool kSecond> static void sum_sweep(const MclProblem<T>& p, Workspace& ws) {
    constexpr int kCount = kSums<kSecond>;
    for (int k = 0; k < kCount; ++k) {
      fill(ws.ab.sums[k], p.padded, T(0));
      fill(ws.ba.sums[k], p.padded, T(0));
    }
    for (int64_t I = 0; I < p.padded; I += W) {
      V rows_ab[kCount * W] = {}, rows_ba[kCount * W] = {};
      sum_tile<kSecond, true>(p, ws, I, I, rows_ab, rows_ba);
      for (int64_t J = I + W; J < p.padded; J += W)
        sum_tile<kSecond, false>(p, ws, I, J, rows_ab, rows_ba);
      for (int i = 0; i < W; ++i) {
        for (int k = 0; k < kCount; ++k) {
          ws.ab.sums[k][I + i] += sum_lanes<T>(rows_ab[kCount * i + k]);
          ws.ba.sums[k][I + i] += sum_lanes<T>(rows_ba[kCount * i + k]);
        }
      }
    }
  }

  // logits <- D_ab + D_ba^T; second order also tangents <- K_ab + K_ba^T.
  template <bool kSecond, bool kDiagonal>
  static INLINE void gradient_tile(const MclProblem<T>& p, Workspace& ws, int64_t I, int64_t J) {
    typedef typename Workspace::Side Side;
    T t_tile[W * W], td_tile[W * W];
    transpose_block<T>(ws.logits + J * p.stride + I, p.stride, t_tile, W);
    if (kSecond) transpose_block<T>(ws.tangents + J * p.stride + I, p.stride, td_tile, W);
    // Coefficient of an element of orientation `own`, anchor in row r: own[r] + other[column].
    struct Coefficients {
      V u, v, w, ud, vd;
      INLINE Coefficients(const Side& side, int64_t at) {
        if (kHard) u = load(side.u + at);
        if (kSoft) v = load(side.v + at), w = load(side.w + at);
        if (kSecond && kHard) ud = load(side.ud + at);
        if (kSecond && kSoft) vd = load(side.vd + at);
      }
    };
    const Coefficients at_ab(ws.ab, J), at_ba(ws.ba, J);
    const auto first_order = [&](const Exponentials& x, const Exponentials& xt, const Side& own,
                                 const Coefficients& other, int64_t r) INLINE_LAMBDA {
      V h{};
      if (kSoft) h = x.soft * (own.v[r] + other.v) - xt.soft * (own.w[r] + other.w);
      if (kHard) h += x.hard * (own.u[r] + other.u);
      return h;
    };
    const auto second_order = [&](const Exponentials& x, V sd, const Side& own,
                                  const Coefficients& other, int64_t r) INLINE_LAMBDA {
      V h{};
      if (kSoft)
        h = x.soft * ((own.v[r] + other.v) * p.inverse_kl * sd - (own.vd[r] + other.vd));
      if (kHard) h += x.hard * ((own.u[r] + other.u) * sd - (own.ud[r] + other.ud));
      return h;
    };
    for (int i = 0; i < W; ++i) {
      T* logits = ws.logits + (I + i) * p.stride + J;
      const V s = load(logits), t = load(t_tile + i * W);
      Exponentials x(s, p.inverse_kl);
      const Exponentials xt(t, p.inverse_kl);
      if (kDiagonal && kHard) x.hard = without_lane<T>(x.hard, i);
      store(logits, first_order(x, xt, ws.ab, at_ba, I + i));
      if (!kDiagonal) store(t_tile + i * W, first_order(xt, x, ws.ba, at_ab, I + i));
      if (kSecond) {
        T* tangents = ws.tangents + (I + i) * p.stride + J;
        const V sd = load(tangents), td = load(td_tile + i * W);
        store(tangents, second_order(x, sd, ws.ab, at_ba, I + i));
        if (!kDiagonal) store(td_tile + i * W, second_order(xt, td, ws.ba, at_ab, I + i));
      }
    }
    if (kDiagonal) return;
    transpose_block<T>(t_tile, W, ws.logits + J * p.stride + I, p.stride);
    if (kSecond) transpose_block<T>(td_tile, W, ws.tangents + J * p.stride + I, p.stride);
  }

  template <bool kSecond> static void gradient_sweep(const MclProblem<T>& p, Workspace& ws) {
    for (int64_t I = 0; I < p.padded; I += W) {
      gradient_tile<kSecond, true>(p, ws, I, I);
      for (int64_t J = I + W; J < p.padded; J += W) gradient_tile<kSecond, false>(p, ws, I, J);
    }
  }
};

// Columns and rows past the batch.
template <class T> void pad_square(const MclProblem<T>& p, T* matrix, T value) {
  for (int64_t r = 0; r < p.batch; ++r)
    fill(matrix + r * p.stride + p.batch, p.padded - p.batch, value);
  for (int64_t r = p.batch; r < p.padded; ++r) fill(matrix + r * p.stride, p.padded, value);
}

// Row values of orientation ab from the sums of both.
template <class T>
void write_pair_rows(const MclProblem<T>& p, int64_t a, int64_t b, T* const* own, T* const* other) {
  const int64_t at = p.at(a, b);
  if (p.wants(kIcl) && p.batch > 1)
    for (int64_t r = 0; r < p.batch; ++r) p.lse[at + r] = std::log(own[1][r]);
  if (!p.wants(kSoftIcl)) return;
  // The student is S_ab, the teacher S_ba: T <q_ba, S_ba - S_ab> + T^2 (lse_ab - lse_ba).
  // One logarithm, so that equal sums give 0; the quotient of two sums may be exp(2 kLargestLogit).
  for (int64_t r = 0; r < p.batch; ++r) {
    p.kl_lse[at + r] = std::log(own[0][r]);
    const T difference = T(std::log(double(own[0][r]) / double(other[0][r])));
    p.soft_icl[at + r] = p.kl * (other[2][r] / other[0][r] + p.kl * difference);
  }
}

// From the sums of this pass rather than from the stored lse, whose rounding would be an error of
// all the weights of a row.
template <class T>
void pair_coefficients(const MclProblem<T>& p, int64_t a, int64_t b,
                       const typename PairWorkspace<T>::Side& own,
                       const typename PairWorkspace<T>::Side& other) {
  const int64_t ab = p.at(a, b);
  T* const arrays[] = {own.u, own.v, own.w, own.ud, own.vd};
  for (T* array : arrays) fill(array + p.batch, p.padded - p.batch, T(0));
  if (p.wants(kIcl) && p.batch > 1)
    for (int64_t r = 0; r < p.batch; ++r)
      own.u[r] = p.hard_cotangent(p.g_icl + ab, r) / own.sums[1][r];
  else
    fill(own.u, p.batch, T(0));
  if (!p.wants(kSoftIcl)) return;
  for (int64_t r = 0; r < p.batch; ++r) {
    const T g = p.g_soft_icl[ab + r] * p.kl;
    own.v[r] = g / own.sums[0][r];
    own.w[r] = g / other.sums[0][r];
  }
}

// The gradients of the cotangents, less the part of the positives, and the coefficients of K.
template <class T>
void pair_second_order(const MclProblem<T>& p, int64_t a, int64_t b,
                       const typename PairWorkspace<T>::Side& own,
                       const typename PairWorkspace<T>::Side& other) {
  const int64_t ab = p.at(a, b);
  if (p.wants(kIcl)) {
    for (int64_t r = 0; r < p.batch; ++r) {
      const T mean = p.has_positive(r) ? own.sums[3][r] / own.sums[1][r] : T(0);
      p.icl[ab + r] = mean;
      own.ud[r] = own.u[r] * mean;
    }
  }
  if (!p.wants(kSoftIcl)) return;
  for (int64_t r = 0; r < p.batch; ++r) {
    const T mean = own.sums[4][r] / own.sums[0][r];
    p.soft_icl[ab + r] = p.kl * (mean - own.sums[2][r] / other.sums[0][r]);
    own.vd[r] = own.v[r] * p.inverse_kl * mean;
  }
}

template <class T, bool kHard, bool kSoft, int kPower>
void tile_pair(const MclProblem<T>& p, const Packed<T>& packed, const Packed<T>* packed_tangents,
               int64_t a, int64_t b, PairWorkspace<T>& ws, Gradients<T>* gradients,
               int64_t worker) {
  typedef TilePair<T, kHard, kSoft, kPower> Sweeps;
  const int64_t B = p.batch, D = p.width;
  gemm<false>(B, B, D, p.inverse_temperature, p.node(a), D, packed.contrast(b), ws.logits.get(),
              p.stride, false);
  pad_square(p, ws.logits.get(), kPadding<T>);
  if (p.second) {
    gemm<false>(B, B, D, p.inverse_temperature, p.tangent(a), D, packed.contrast(b),
                ws.tangents.get(), p.stride, false);
    gemm<false>(B, B, D, p.inverse_temperature, p.node(a), D, packed_tangents->contrast(b),
                ws.tangents.get(), p.stride, true);
    pad_square(p, ws.tangents.get(), T(0));
    Sweeps::template sum_sweep<true>(p, ws);
  } else {
    Sweeps::template sum_sweep<false>(p, ws);
  }
  if (p.forward) {
    write_pair_rows(p, a, b, ws.ab.sums, ws.ba.sums);
    write_pair_rows(p, b, a, ws.ba.sums, ws.ab.sums);
  }
  if (!p.backward && !p.second) return;

  pair_coefficients<T>(p, a, b, ws.ab, ws.ba);
  pair_coefficients<T>(p, b, a, ws.ba, ws.ab);
  if (p.second) {
    pair_second_order<T>(p, a, b, ws.ab, ws.ba);
    pair_second_order<T>(p, b, a, ws.ba, ws.ab);
    Sweeps::template gradient_sweep<true>(p, ws);
  } else {
    Sweeps::template gradient_sweep<false>(p, ws);
  }

  // H of the backward meets E; in the double backward K meets E and H meets V.
  const T* h = p.second ? ws.tangents.get() : ws.logits.get();
  T *grad_a = gradients->slot(worker, a), *grad_b = gradients->slot(worker, b);
  gemm<false>(B, D, B, p.inverse_temperature, h, p.stride, packed.values(b), grad_a, D, true);
  gemm<true>(B, D, B, p.inverse_temperature, h, p.stride, packed.values(a), grad_b, D, true);
  if (!p.second) return;
  gemm<false>(B, D, B, p.inverse_temperature, ws.logits.get(), p.stride,
              packed_tangents->values(b), grad_a, D, true);
  gemm<true>(B, D, B, p.inverse_temperature, ws.logits.get(), p.stride,
             packed_tangents->values(a), grad_b, D, true);
}

template <class T>
using TilePairFunction = void (*)(const MclProblem<T>&, const Packed<T>&, const Packed<T>*, int64_t,
                                  int64_t, PairWorkspace<T>&, Gradients<T>*, int64_t);

template <class T> TilePairFunction<T> choose_tile_pair(const MclProblem<T>& p) {
  if (!p.wants(kSoftIcl)) return tile_pair<T, true, false, 0>;
  if (!p.wants(kIcl)) return tile_pair<T, false, true, 0>;
  if (p.kl_temperature == 1) return tile_pair<T, true, true, 1>;
  if (p.kl_temperature == 2) return tile_pair<T, true, true, 2>;
  if (p.kl_temperature == 3) return tile_pair<T, true, true, 3>;
  if (p.kl_temperature == 4) return tile_pair<T, true, true, 4>;
  return tile_pair<T, true, true, 0>;
}

template <class T> bool tile_pair_applies(const MclProblem<T>& p) {
  if (p.row_count != p.batch) return false;
  constexpr int64_t kLargestWorkspace = int64_t(32) << 20; // bytes per worker
  const int64_t matrices = p.second ? 2 : 1;
  if (matrices * p.padded * p.stride * int64_t(sizeof(T)) > kLargestWorkspace) return false;
  double largest = 0; // squared norm of an embedding
  for (int64_t i = 0; i < p.nodes_count * p.batch; ++i) {
    const double norm = squared_norm(p.nodes + i * p.width, p.width);
    if (!(norm <= largest)) largest = norm;
  }
  const double hardest = p.kl_temperature < 1 && p.wants(kSoftIcl) ? p.kl_temperature : 1;
  return largest / p.temperature / hardest <= kLargestLogit<T>;
}

} // namespace mclfast::cpu::MCLFAST_CAPABILITY

// A band of anchors of one unordered pair of nodes: S_ab and S_ba of those rows, at any
// temperature, in memory that does not grow with the square of the batch.
#pragma once

#include <cstdint>

#include "../../families.h"
#include "../simd/capability.h"
#include "../simd/gemm.h"
#include "../simd/logit_row.h"
#include "../simd/vec.h"
#include "../simd/workspace.h"
#include "mcl_problem.h"

namespace mclfast::cpu::MCLFAST_CAPABILITY {

template <class T> struct CrossBand {
  int64_t height;
  Buffer<T> s, t;   // [height, stride], S_ab and S_ba
  Buffer<T> sd, td; // [height, stride], their tangents, double backward only
  Buffer<T> scratch; // [4, stride]

  CrossBand(const MclProblem<T>& p, int64_t height)
      : height(height), s(height * p.stride), t(height * p.stride),
        sd(p.second ? height * p.stride : 0), td(p.second ? height * p.stride : 0),
        scratch(4 * p.stride) {}
};

template <class T> void pad_columns(const MclProblem<T>& p, T* rows, int64_t count, T value) {
  for (int64_t r = 0; r < count; ++r)
    fill(rows + r * p.stride + p.batch, p.padded - p.batch, value);
}

// One orientation of one anchor; `s` its logits, `t` those of the other orientation.
template <class T> struct CrossRow {
  T *s, *sd;
  int64_t at; // in an [N, N, R] array
  T* q;       // [padded], softmax weights at kl_temperature
  T* p;       // [padded], softmax weights of icl
  SoftRow<T> soft{};
  T q_sum = 1, p_sum = 1; // of the weights, 1 but for rounding
};

template <class T>
void forward_cross_row(const MclProblem<T>& p, CrossRow<T>& own, CrossRow<T>& other, int64_t self) {
  CrossRow<T>* const orientations[] = {&own, &other};
  for (CrossRow<T>* row : orientations) {
    if (p.wants(kIcl))
      p.lse[row->at] = contrastive_lse(row->s, self, row->p, p.batch, p.padded);
    if (!p.wants(kSoftIcl)) continue;
    row->soft = soft_row(row->s, p.inverse_kl, row->q, p.padded);
    p.kl_lse[row->at] = row->soft.lse(p.inverse_kl);
  }
  if (!p.wants(kSoftIcl)) return;
  const auto soft_value = [&](const CrossRow<T>& student, const CrossRow<T>& teacher) {
    const T mean = mean_difference(teacher.q, teacher.s, student.s, p.padded) / teacher.soft.sum;
    const T lse = lse_difference(student.soft, teacher.soft, p.inverse_kl);
    p.soft_icl[student.at] = p.kl * (mean + p.kl * lse);
  };
  soft_value(own, other);
  soft_value(other, own);
}

// s <- D_ab, and sd <- K_ab in the double backward; the same for the other orientation.
template <class T>
void gradient_cross_row(const MclProblem<T>& p, CrossRow<T>& own, CrossRow<T>& other, int64_t row) {
  const int64_t self = p.row_start + row;
  CrossRow<T>* const orientations[] = {&own, &other};
  for (CrossRow<T>* o : orientations) {
    if (p.wants(kSoftIcl))
      o->q_sum = exp_row(o->s, p.inverse_kl, p.kl_lse[o->at] * p.kl, o->q, p.padded);
    if (p.wants(kIcl))
      o->p_sum = contrastive_weights(o->s, self, p.lse[o->at], o->p, p.padded);
  }
  const auto orientation = [&](CrossRow<T>& o, const CrossRow<T>& twin) {
    const T hard = p.wants(kIcl) && p.has_positive(self) ? p.g_icl[o.at] : T(0);
    const T soft = p.wants(kSoftIcl) ? p.g_soft_icl[o.at] : T(0);
    T hard_mean = 0, soft_mean = 0;
    if (p.second && p.wants(kIcl)) {
      hard_mean = dot(o.p, o.sd, p.padded) / o.p_sum;
      if (p.has_positive(self)) p.icl[o.at] = hard_mean;
    }
    if (p.second && p.wants(kSoftIcl)) {
      soft_mean = dot(o.q, o.sd, p.padded) / o.q_sum;
      p.soft_icl[o.at] = p.kl * (soft_mean - dot(twin.q, o.sd, p.padded) / twin.q_sum);
    }
    const T hard_scale = hard / o.p_sum, soft_scale = soft / o.q_sum;
    // q - q of the twin, written so that it is exactly 0 where the two agree.
    const T kl_scale = soft * p.kl / o.q_sum;
    const T left_over = kl_scale - soft * p.kl / twin.q_sum;
    for (int64_t c = 0; c < p.padded; c += kLanes<T>) {
      Vec<T> d{}, k{};
      if (p.wants(kIcl)) {
        d = hard_scale * load(o.p + c);
        if (p.second) k = d * (load(o.sd + c) - hard_mean);
      }
      if (p.wants(kSoftIcl)) {
        const Vec<T> q = load(o.q + c), twin_q = load(twin.q + c);
        d += kl_scale * (q - twin_q) + left_over * twin_q;
        if (p.second) k += soft_scale * q * (load(o.sd + c) - soft_mean);
      }
      store(o.s + c, d);
      if (p.second) store(o.sd + c, k);
    }
  };
  orientation(own, other);
  orientation(other, own);
}

// Adds H E_b to the band's rows of grad_a and H^T E_a[band] to grad_b.
template <class T>
void add_band_gradient(const MclProblem<T>& p, const T* h, int64_t stride, int64_t first,
                       int64_t count, const Packed<T>& packed, int64_t a, int64_t b,
                       Gradients<T>& gradients, int64_t worker) {
  const int64_t D = p.width, anchor = p.row_start + first;
  gemm<false>(count, D, p.batch, p.inverse_temperature, h, stride, packed.values(b),
              gradients.slot(worker, a) + anchor * D, D, true);
  gemm<true>(p.batch, D, count, p.inverse_temperature, h, stride, packed.values(a, anchor),
             gradients.slot(worker, b), D, true);
}

// Anchors first .. first + count of the slice.
template <class T>
void cross_band(const MclProblem<T>& p, const Packed<T>& packed, const Packed<T>* packed_tangents,
                int64_t a, int64_t b, int64_t first, int64_t count, CrossBand<T>& ws,
                Gradients<T>* gradients, int64_t worker) {
  const int64_t D = p.width, anchor = (p.row_start + first) * D;
  const auto logits = [&](const T* anchors, Panels<T> contrast, T* out, bool accumulate) {
    gemm<false>(count, p.batch, D, p.inverse_temperature, anchors + anchor, D, contrast, out,
                p.stride, accumulate);
  };
  logits(p.node(a), packed.contrast(b), ws.s, false);
  logits(p.node(b), packed.contrast(a), ws.t, false);
  pad_columns<T>(p, ws.s, count, kPadding<T>);
  pad_columns<T>(p, ws.t, count, kPadding<T>);
  if (p.second) {
    logits(p.tangent(a), packed.contrast(b), ws.sd, false);
    logits(p.node(a), packed_tangents->contrast(b), ws.sd, true);
    logits(p.tangent(b), packed.contrast(a), ws.td, false);
    logits(p.node(b), packed_tangents->contrast(a), ws.td, true);
    pad_columns<T>(p, ws.sd, count, T(0));
    pad_columns<T>(p, ws.td, count, T(0));
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t r = first + i;
    T* scratch = ws.scratch;
    CrossRow<T> ab{ws.s + i * p.stride, ws.sd + i * p.stride, p.at(a, b) + r, scratch,
                   scratch + p.stride};
    CrossRow<T> ba{ws.t + i * p.stride, ws.td + i * p.stride, p.at(b, a) + r,
                   scratch + 2 * p.stride, scratch + 3 * p.stride};
    if (p.forward) forward_cross_row(p, ab, ba, p.row_start + r);
    if (p.backward || p.second) gradient_cross_row(p, ab, ba, r);
  }
  if (!p.backward && !p.second) return;
  const T *h_ab = p.second ? ws.sd : ws.s, *h_ba = p.second ? ws.td : ws.t;
  add_band_gradient(p, h_ab, p.stride, first, count, packed, a, b, *gradients, worker);
  add_band_gradient(p, h_ba, p.stride, first, count, packed, b, a, *gradients, worker);
  if (!p.second) return;
  add_band_gradient<T>(p, ws.s, p.stride, first, count, *packed_tangents, a, b, *gradients, worker);
  add_band_gradient<T>(p, ws.t, p.stride, first, count, *packed_tangents, b, a, *gradients, worker);
}

} // namespace mclfast::cpu::MCLFAST_CAPABILITY

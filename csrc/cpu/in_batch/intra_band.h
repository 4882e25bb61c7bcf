// A band of anchors inside every node: vcl of each node, and soft_vcl between the nodes, whose
// rows need the similarities A_a[r, :] of all nodes at once.
#pragma once

#include <cstdint>

#include "../../families.h"
#include "../simd/capability.h"
#include "../simd/gemm.h"
#include "../simd/logit_row.h"
#include "../simd/vec.h"
#include "../simd/workspace.h"
#include "mcl_problem.h"
#include "pair_band.h"

namespace mclfast::cpu::MCLFAST_CAPABILITY {

template <class T> struct IntraBand {
  int64_t height;
  Buffer<T> logits;   // [height, N, stride], A_a[r, :], overwritten by D_a[r, :]
  Buffer<T> tangents; // [height, N, stride], Ad_a[r, :] and then K_a[r, :], double backward only
  Buffer<T> weights;  // [N, stride], softmax weights of one anchor at kl_temperature
  Buffer<T> centred;  // [N, stride], logits or softmax weights less their mean over the nodes
  Buffer<T> mixed;    // [N, stride], soft part of D
  Buffer<T> scratch;  // [stride]
  Buffer<T> products; // [N, N]
  Buffer<T> mixture;  // [N, N]
  Buffer<SoftRow<T>> soft; // [N]

  IntraBand(const MclProblem<T>& p, int64_t height)
      : height(height), logits(height * p.nodes_count * p.stride),
        tangents(p.second ? height * p.nodes_count * p.stride : 0),
        weights(p.nodes_count * p.stride), centred(p.nodes_count * p.stride),
        mixed(p.nodes_count * p.stride), scratch(p.stride),
        products(p.nodes_count * p.nodes_count), mixture(p.nodes_count * p.nodes_count),
        soft(p.nodes_count) {}
};

// to = rows - mean of the rows. Soft losses depend on differences between nodes only; without what
// the nodes agree on, less of them is lost to rounding.
template <class T>
void centre_rows(const T* rows, int64_t count, int64_t stride, int64_t padded, T* to) {
  for (int64_t c = 0; c < padded; c += kLanes<T>) {
    Vec<T> mean{};
    for (int64_t a = 0; a < count; ++a) mean += load(rows + a * stride + c);
    mean *= T(1) / T(count);
    for (int64_t a = 0; a < count; ++a)
      store(to + a * stride + c, load(rows + a * stride + c) - mean);
  }
}

// `logits` [N, stride] of the anchor at `row` of the slice; leaves `weights` and `soft`.
template <class T>
void forward_intra_row(const MclProblem<T>& p, T* logits, int64_t row, IntraBand<T>& ws) {
  const int64_t N = p.nodes_count, R = p.row_count;
  for (int64_t a = 0; a < N; ++a) {
    T* s = logits + a * p.stride;
    if (p.wants(kVcl))
      p.lse[p.at(a, a) + row] =
          contrastive_lse<T>(s, p.row_start + row, ws.scratch, p.batch, p.padded);
    if (!p.wants(kSoftVcl)) continue;
    ws.soft[a] = soft_row(s, p.inverse_kl, ws.weights + a * p.stride, p.padded);
    p.kl_lse[p.at(a, a) + row] = ws.soft[a].lse(p.inverse_kl);
  }
  if (!p.wants(kSoftVcl)) return;
  centre_rows<T>(logits, N, p.stride, p.padded, ws.centred);
  gram<T>(N, N, p.padded, ws.weights, p.stride, ws.centred, p.stride, ws.products, N);
  for (int64_t a = 0; a < N; ++a) {
    for (int64_t b = 0; b < N; ++b) {
      if (!p.between(a, b)) continue;
      const SoftRow<T>&student = ws.soft[a], &teacher = ws.soft[b];
      const T mean = (ws.products[b * N + b] - ws.products[b * N + a]) / teacher.sum;
      const T lse = lse_difference(student, teacher, p.inverse_kl);
      p.soft_vcl[(a * N + b) * R + row] = p.kl * (mean + p.kl * lse);
    }
  }
}

// logits <- D; in the double backward tangents <- K.
template <class T>
void gradient_intra_row(const MclProblem<T>& p, T* logits, T* tangents, int64_t row,
                        IntraBand<T>& ws) {
  const int64_t N = p.nodes_count, R = p.row_count, self = p.row_start + row;
  if (p.wants(kSoftVcl)) {
    for (int64_t a = 0; a < N; ++a) {
      T* weights = ws.weights + a * p.stride;
      if (!p.forward)
        ws.soft[a].sum = exp_row<T>(logits + a * p.stride, p.inverse_kl,
                                    p.kl_lse[p.at(a, a) + row] * p.kl, weights, p.padded);
      scale_row(weights, 1 / ws.soft[a].sum, p.padded);
    }
    centre_rows<T>(ws.weights, N, p.stride, p.padded, ws.centred);
    // D_a = T ((sum_b g_ab) q_a - sum_b g_ab q_b), one [N, N] by [N, B] product.
    for (int64_t a = 0; a < N; ++a) {
      T total = 0;
      for (int64_t b = 0; b < N; ++b) {
        const T g = p.between(a, b) ? p.g_soft_vcl[(a * N + b) * R + row] : T(0);
        total += g;
        ws.mixture[a * N + b] = -p.kl * g;
      }
      ws.mixture[a * N + a] = p.kl * total;
    }
    gemm<false>(N, p.batch, N, T(1), ws.mixture.get(), N, unpacked<T>(ws.centred, p.stride),
                ws.mixed.get(), p.stride, false);
    if (p.second) {
      gram<T>(N, N, p.padded, ws.centred, p.stride, tangents, p.stride, ws.products, N);
      for (int64_t a = 0; a < N; ++a)
        for (int64_t b = 0; b < N; ++b)
          if (p.between(a, b))
            p.soft_vcl[(a * N + b) * R + row] =
                p.kl * (ws.products[a * N + a] - ws.products[b * N + a]);
    }
  }
  for (int64_t a = 0; a < N; ++a) {
    T* s = logits + a * p.stride;
    T hard = 0, hard_mean = 0, soft_mean = 0, soft = 0;
    if (p.wants(kVcl)) {
      hard = p.hard_cotangent(p.g_vcl + a * R, row);
      const T sum = contrastive_weights<T>(s, self, p.lse[p.at(a, a) + row], ws.scratch,
                                           p.padded);
      hard /= sum;
      if (p.second) {
        hard_mean = dot<T>(ws.scratch, tangents + a * p.stride, p.padded) / sum;
        if (p.has_positive(self)) p.vcl[a * R + row] = hard_mean;
      }
    }
    if (p.second && p.wants(kSoftVcl)) {
      soft = ws.mixture[a * N + a] * p.inverse_kl;
      soft_mean = dot<T>(ws.weights + a * p.stride, tangents + a * p.stride, p.padded);
    }
    for (int64_t c = 0; c < p.padded; c += kLanes<T>) {
      Vec<T> d{}, k{};
      T* td = p.second ? tangents + a * p.stride + c : nullptr;
      if (p.wants(kVcl)) {
        d = hard * load(ws.scratch + c);
        if (p.second) k = d * (load(td) - hard_mean);
      }
      if (p.wants(kSoftVcl)) {
        d += load(ws.mixed + a * p.stride + c);
        if (p.second) k += soft * load(ws.weights + a * p.stride + c) * (load(td) - soft_mean);
      }
      store(s + c, d);
      if (p.second) store(td, k);
    }
  }
}

// Anchors first .. first + count of the slice.
template <class T>
void intra_band(const MclProblem<T>& p, const Packed<T>& packed, const Packed<T>* packed_tangents,
                int64_t first, int64_t count, IntraBand<T>& ws, Gradients<T>* gradients,
                int64_t worker) {
  const int64_t N = p.nodes_count, D = p.width, anchor = (p.row_start + first) * D;
  const int64_t stride = N * p.stride; // between the anchors of one node
  const auto logits = [&](const T* anchors, Panels<T> contrast, T* out, bool accumulate) {
    gemm<false>(count, p.batch, D, p.inverse_temperature, anchors + anchor, D, contrast, out,
                stride, accumulate);
  };
  for (int64_t a = 0; a < N; ++a) {
    logits(p.node(a), packed.contrast(a), ws.logits + a * p.stride, false);
    if (!p.second) continue;
    logits(p.tangent(a), packed.contrast(a), ws.tangents + a * p.stride, false);
    logits(p.node(a), packed_tangents->contrast(a), ws.tangents + a * p.stride, true);
  }
  pad_columns<T>(p, ws.logits, count * N, kPadding<T>);
  if (p.second) pad_columns<T>(p, ws.tangents, count * N, T(0));
  for (int64_t i = 0; i < count; ++i) {
    T* row = ws.logits + i * stride;
    if (p.forward) forward_intra_row(p, row, first + i, ws);
    if (p.backward || p.second)
      gradient_intra_row<T>(p, row, ws.tangents + i * stride, first + i, ws);
  }
  if (!p.backward && !p.second) return;
  for (int64_t a = 0; a < N; ++a) {
    const T* h = (p.second ? ws.tangents : ws.logits) + a * p.stride;
    add_band_gradient(p, h, stride, first, count, packed, a, a, *gradients, worker);
    if (p.second)
      add_band_gradient<T>(p, ws.logits + a * p.stride, stride, first, count, *packed_tangents, a,
                           a, *gradients, worker);
  }
}

} // namespace mclfast::cpu::MCLFAST_CAPABILITY

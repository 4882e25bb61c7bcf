// The positives' share of vcl and icl, from sums over classes instead of a [B, B] mask:
//
//   sum over positives c of r of S_ab[r, c] = <E_a[r], sum of E_b over the class - E_b[r]> / tau
//
// so the sweeps over logits see labels nowhere, and this costs O(N^2 B D) instead of O(N^2 B^2).
// Classes are independent of each other, so workers write to disjoint rows of the gradient.
#pragma once

#include <cstdint>

#include "../../families.h"
#include "../dispatch/kernels.h"
#include "../simd/capability.h"
#include "../simd/gemm.h"
#include "../simd/workspace.h"
#include "mcl_problem.h"

namespace mclfast::cpu::MCLFAST_CAPABILITY {

template <class T> class Positives {
public:
  Positives(const MclProblem<T>& p, int64_t largest_class)
      : p_(p), N_(p.nodes_count), D_(p.width), width_(round_up(p.width, kPanel<T>)),
        embeddings_(p, p.nodes, width_), tangents_(p, p.second ? p.tangents : nullptr, width_),
        products_(2 * N_ * N_), coefficients_(N_ * N_),
        returned_(p.grad_nodes ? (largest_class + 1) * N_ * width_ : 0) {}

  void class_terms(const int64_t* members, int64_t count) {
    embeddings_.sum(members, count);
    if (p_.second) tangents_.sum(members, count);
    const T scale = p_.inverse_temperature / T(count - 1);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = members[i] - p_.row_start;
      if (row < 0 || row >= p_.row_count) continue;
      embeddings_.select(members[i]);
      if (p_.second) tangents_.select(members[i]);
      if (p_.forward) subtract_means(row, scale);
      if (p_.second) subtract_tangent_means(row, scale);
      if (p_.grad_nodes) add_gradient(members[i], row, scale, returned_ + (i + 1) * N_ * width_);
    }
    if (p_.grad_nodes) return_gradient(members, count);
  }

private:
  // One [N, B, D] tensor seen from a class and one of its members.
  struct View {
    const MclProblem<T>& p;
    const T* data;
    int64_t width;
    Buffer<T> sums;   // [N, width], over the class
    Buffer<T> own;    // [N, width], of the member
    Buffer<T> others; // [N, width], sums - own

    View(const MclProblem<T>& p, const T* data, int64_t width)
        : p(p), data(data), width(width), sums(size()), own(size()), others(size()) {
      fill<T>(own, size(), T(0));
      fill<T>(others, size(), T(0));
    }
    int64_t size() const { return data ? p.nodes_count * width : 0; }
    const T* embedding(int64_t node, int64_t sample) const {
      return data + (node * p.batch + sample) * p.width;
    }
    void sum(const int64_t* members, int64_t count) {
      fill<T>(sums, size(), T(0));
      for (int64_t n = 0; n < p.nodes_count; ++n)
        for (int64_t i = 0; i < count; ++i) {
          const T* from = embedding(n, members[i]);
          for (int64_t d = 0; d < p.width; ++d) sums[n * width + d] += from[d];
        }
    }
    void select(int64_t sample) {
      for (int64_t n = 0; n < p.nodes_count; ++n) {
        const T* from = embedding(n, sample);
        for (int64_t d = 0; d < p.width; ++d) {
          own[n * width + d] = from[d];
          others[n * width + d] = sums[n * width + d] - from[d];
        }
      }
    }
  };

  // f(a, b, index of the value in an [N, N, R] array) for each pair of nodes with a hard row;
  // a == b stands for vcl, whose rows are [N, R].
  template <class Function> void each_pair(int64_t row, const Function& function) {
    for (int64_t a = 0; a < N_; ++a)
      for (int64_t b = 0; b < N_; ++b)
        if (a == b ? p_.wants(kVcl) : p_.wants(kIcl) && p_.between(a, b))
          function(a, b, p_.at(a, b) + row);
  }
  T& hard_row(int64_t a, int64_t b, int64_t row) {
    return a == b ? p_.vcl[a * p_.row_count + row] : p_.icl[p_.at(a, b) + row];
  }

  void products(const View& left, const View& right, T* out) {
    gram<T>(N_, N_, width_, left.own, width_, right.others, width_, out, N_);
  }

  void subtract_means(int64_t row, T scale) {
    products(embeddings_, embeddings_, products_);
    each_pair(row, [&](int64_t a, int64_t b, int64_t at) {
      hard_row(a, b, row) = p_.lse[at] - scale * products_[a * N_ + b];
    });
  }

  void subtract_tangent_means(int64_t row, T scale) {
    T* second = products_ + N_ * N_;
    products(tangents_, embeddings_, products_);
    products(embeddings_, tangents_, second);
    each_pair(row, [&](int64_t a, int64_t b, int64_t) {
      hard_row(a, b, row) -= scale * (products_[a * N_ + b] + second[a * N_ + b]);
    });
  }

  // The anchor's part goes to the gradient, that of its positives to `returned` [N, width].
  void add_gradient(int64_t sample, int64_t row, T scale, T* returned) {
    fill<T>(coefficients_, N_ * N_, T(0));
    each_pair(row, [&](int64_t a, int64_t b, int64_t at) {
      const T g = a == b ? p_.g_vcl[a * p_.row_count + row] : p_.g_icl[at];
      coefficients_[a * N_ + b] = -scale * g;
    });
    const View& view = p_.second ? tangents_ : embeddings_;
    gemm<false>(N_, D_, N_, T(1), coefficients_.get(), N_, unpacked<T>(view.others, width_),
                p_.grad_nodes + sample * D_, p_.batch * D_, true);
    gemm<true>(N_, D_, N_, T(1), coefficients_.get(), N_, unpacked<T>(view.own, width_), returned,
               width_, false);
  }

  // Every member gets what all the other members returned.
  void return_gradient(const int64_t* members, int64_t count) {
    T* total = returned_;
    fill(total, N_ * width_, T(0));
    const auto in_slice = [&](int64_t sample) {
      return sample >= p_.row_start && sample < p_.row_start + p_.row_count;
    };
    const auto each = [&](int64_t i, int64_t n) { return returned_ + ((i + 1) * N_ + n) * width_; };
    for (int64_t i = 0; i < count; ++i)
      if (in_slice(members[i]))
        for (int64_t n = 0; n < N_; ++n)
          for (int64_t d = 0; d < D_; ++d) total[n * width_ + d] += each(i, n)[d];
    for (int64_t i = 0; i < count; ++i) {
      const bool own = in_slice(members[i]);
      for (int64_t n = 0; n < N_; ++n) {
        T* to = p_.grad_nodes + (n * p_.batch + members[i]) * D_;
        for (int64_t d = 0; d < D_; ++d)
          to[d] += total[n * width_ + d] - (own ? each(i, n)[d] : T(0));
      }
    }
  }

  const MclProblem<T>& p_;
  int64_t N_, D_, width_;
  View embeddings_, tangents_;
  Buffer<T> products_;     // two of [N, N]
  Buffer<T> coefficients_; // [N, N]
  Buffer<T> returned_;     // [1 + members, N, width], the first their sum
};

// After the sweeps: needs lse, adds to grad_nodes.
template <class T> void positive_terms(const MclProblem<T>& p) {
  if (!p.wants(kVcl | kIcl)) return;
  const EvenSplit split(p.batch);
  run_parallel(split.workers, [&](int64_t worker) {
    const Classes& classes = p.classes;
    // A class belongs to the worker in whose share of the batch it starts.
    const auto mine = [&](int64_t c) {
      return classes.offsets[c] >= split.begin(worker) &&
             classes.offsets[c] < split.begin(worker + 1);
    };
    const auto size = [&](int64_t c) { return classes.offsets[c + 1] - classes.offsets[c]; };
    int64_t largest = 0;
    for (int64_t c = 0; c < classes.count; ++c)
      if (mine(c)) largest = max_of(largest, size(c));
    if (largest < 2) return;
    Positives<T> positives(p, largest);
    for (int64_t c = 0; c < classes.count; ++c)
      if (mine(c) && size(c) > 1)
        positives.class_terms(classes.members + classes.offsets[c], size(c));
  });
}

} // namespace mclfast::cpu::MCLFAST_CAPABILITY

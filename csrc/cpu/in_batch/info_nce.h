// Symmetric InfoNCE between two sets of embeddings, by bands of rows: S = a b^T / temperature is
// made again in each direction and each order, never kept whole.
#pragma once

#include <cstdint>

#include "../dispatch/kernels.h"
#include "../simd/capability.h"
#include "../simd/gemm.h"
#include "../simd/logit_row.h"
#include "../simd/vec.h"
#include "../simd/workspace.h"

namespace mclfast::cpu::MCLFAST_CAPABILITY {

template <class T> struct InfoNceBand {
  Buffer<T> logits;   // [height, stride]
  Buffer<T> tangents; // [height, stride]
  InfoNceBand(int64_t height, int64_t stride, bool second)
      : logits(height * stride), tangents(second ? height * stride : 0) {}
};

template <class T> class InfoNceSchedule {
public:
  InfoNceSchedule(const InfoNce<T>& p, Mode mode)
      : p_(p), B_(p.batch), D_(p.width), padded_(round_up(B_, kLanes<T>)),
        stride_(round_up(B_, kPanel<T>)), bands_(divide_up(B_, kHeight)),
        inverse_(T(1 / p.temperature)), second_(mode == Mode::kDoubleBackward),
        a_(p.a, 1, B_, D_, mode != Mode::kForward), b_(p.b, 1, B_, D_, mode != Mode::kForward),
        tangent_a_(p.tangent_a, second_, B_, D_, true),
        tangent_b_(p.tangent_b, second_, B_, D_, true) {}

  void forward() const {
    const EvenSplit split(2 * bands_);
    run_parallel(split.workers, [&](int64_t worker) {
      InfoNceBand<T> ws(kHeight, stride_, false);
      for (int64_t item = split.begin(worker); item < split.begin(worker + 1); ++item) {
        const bool columns = item >= bands_;
        const int64_t first = item % bands_ * kHeight, count = min_of(B_ - first, kHeight);
        logits(columns ? p_.b : p_.a, columns ? a_ : b_, first, count, ws.logits, false);
        pad(ws.logits, count, kPadding<T>);
        for (int64_t i = 0; i < count; ++i) {
          T* row = ws.logits + i * stride_;
          if (!columns) p_.diag[first + i] = row[first + i];
          (columns ? p_.col_lse : p_.row_lse)[first + i] =
              soft_row(row, T(1), row, padded_).lse(T(1));
        }
      }
    });
  }

  void backward() const {
    if (second_) tangent_means();
    const EvenSplit split(bands_);
    Gradients<T> gradients(split.workers, 2, B_ * D_);
    // A column's coefficients, padded to whole vectors.
    Buffer<T> col_lse(padded_), g_col(padded_), col_mean(second_ ? padded_ : 0);
    padded_copy(p_.col_lse, col_lse);
    padded_copy(p_.g_col, g_col);
    if (second_) padded_copy(p_.col, col_mean);
    run_parallel(split.workers, [&](int64_t worker) {
      InfoNceBand<T> ws(kHeight, stride_, second_);
      for (int64_t band = split.begin(worker); band < split.begin(worker + 1); ++band) {
        const int64_t first = band * kHeight, count = min_of(B_ - first, kHeight);
        load_band(first, count, ws);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t r = first + i;
          const T row_lse = p_.row_lse[r], g_row = p_.g_row[r];
          T* row = ws.logits + i * stride_;
          T* tangents = ws.tangents + i * stride_;
          for (int64_t c = 0; c < padded_; c += kLanes<T>) {
            const Vec<T> s = load(row + c);
            const Vec<T> along_row = g_row * exponential(s - row_lse);
            const Vec<T> along_column = load(g_col + c) * exponential(s - load(col_lse + c));
            store(row + c, along_row + along_column);
            if (!second_) continue;
            const Vec<T> sd = load(tangents + c);
            store(tangents + c,
                  along_row * (sd - p_.row[r]) + along_column * (sd - load(col_mean + c)));
          }
          row[r] += p_.g_diag[r];
        }
        T *grad_a = gradients.slot(worker, 0) + first * D_, *grad_b = gradients.slot(worker, 1);
        const auto add = [&](const T* h, const Packed<T>& a, const Packed<T>& b) {
          gemm<false>(count, D_, B_, inverse_, h, stride_, b.values(0), grad_a, D_, true);
          gemm<true>(B_, D_, count, inverse_, h, stride_, a.values(0, first), grad_b, D_, true);
        };
        add(second_ ? ws.tangents : ws.logits, a_, b_);
        if (second_) add(ws.logits, tangent_a_, tangent_b_);
      }
    });
    gradients.sum_node_into(0, p_.grad_a);
    gradients.sum_node_into(1, p_.grad_b);
  }

private:
  static constexpr int64_t kHeight = 32;

  // out [count, stride] (+)= rows first .. of `anchors` [B, D] times contrast^T / temperature
  void logits(const T* anchors, const Packed<T>& contrast, int64_t first, int64_t count, T* out,
              bool accumulate) const {
    gemm<false>(count, B_, D_, inverse_, anchors + first * D_, D_, contrast.contrast(0), out,
                stride_, accumulate);
  }
  void pad(T* rows, int64_t count, T value) const {
    for (int64_t i = 0; i < count; ++i) fill(rows + i * stride_ + B_, padded_ - B_, value);
  }
  void padded_copy(const T* from, T* to) const {
    for (int64_t c = 0; c < padded_; ++c) to[c] = c < B_ ? from[c] : T(0);
  }
  void load_band(int64_t first, int64_t count, InfoNceBand<T>& ws) const {
    logits(p_.a, b_, first, count, ws.logits, false);
    pad(ws.logits, count, kPadding<T>);
    if (!second_) return;
    logits(p_.tangent_a, b_, first, count, ws.tangents, false);
    logits(p_.a, tangent_b_, first, count, ws.tangents, true);
    pad(ws.tangents, count, T(0));
  }

  // row, col and diag: <p_row, Sd>, <p_col, Sd> and the diagonal of Sd. They are gradients of the
  // cotangents, and the second order of the softmax needs them before any of its elements.
  void tangent_means() const {
    const EvenSplit split(bands_);
    Buffer<T> col_lse(padded_), columns(split.workers * padded_);
    padded_copy(p_.col_lse, col_lse);
    fill<T>(columns, split.workers * padded_, T(0));
    run_parallel(split.workers, [&](int64_t worker) {
      InfoNceBand<T> ws(kHeight, stride_, true);
      T* column = columns + worker * padded_;
      for (int64_t band = split.begin(worker); band < split.begin(worker + 1); ++band) {
        const int64_t first = band * kHeight, count = min_of(B_ - first, kHeight);
        load_band(first, count, ws);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t r = first + i;
          const T *row = ws.logits + i * stride_, *tangents = ws.tangents + i * stride_;
          Vec<T> sum{};
          for (int64_t c = 0; c < padded_; c += kLanes<T>) {
            const Vec<T> s = load(row + c), sd = load(tangents + c);
            sum += exponential(s - p_.row_lse[r]) * sd;
            store(column + c, load(column + c) + exponential(s - load(col_lse + c)) * sd);
          }
          p_.row[r] = sum_lanes<T>(sum);
          p_.diag[r] = tangents[r];
        }
      }
    });
    for (int64_t c = 0; c < B_; ++c) {
      p_.col[c] = 0;
      for (int64_t w = 0; w < split.workers; ++w) p_.col[c] += columns[w * padded_ + c];
    }
  }

  const InfoNce<T>& p_;
  int64_t B_, D_, padded_, stride_, bands_;
  T inverse_;
  bool second_;
  Packed<T> a_, b_, tangent_a_, tangent_b_;
};

template <class T> void info_nce(const InfoNce<T>& p, Mode mode) {
  const InfoNceSchedule<T> schedule(p, mode);
  if (mode == Mode::kForward)
    schedule.forward();
  else
    schedule.backward();
}

} // namespace mclfast::cpu::MCLFAST_CAPABILITY

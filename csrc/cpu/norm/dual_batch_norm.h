// Batch normalisation in training, y = w n + b with n = (x - mean) / std, together with its tangent
// along (x_t, w_t, b_t), and the gradients of both.
//
//   y_t = A (x_t - mean_t) + D (x - mean) + b_t,   A = w / std,  D = (w_t - A q) / std,
//
// with q the mean of n x_t. Every pass reads a tensor once and writes it once: one for the
// statistics, one for the results.
//
// Two layouts: planes [outer, channels, inner], where a worker takes whole channels, and rows
// [outer, channels] (channels last, inner = 1), where a worker takes rows. Sums are formed in T
// over a chunk that stays in the cache and added up in double.
#pragma once

#include <cmath>
#include <cstdint>

#include "../dispatch/kernels.h"
#include "../simd/capability.h"
#include "../simd/vec.h"
#include "../simd/workspace.h"

namespace mclfast::cpu::MCLFAST_CAPABILITY {

// A vector or a single value behind one interface: the end of a row needs the latter.
template <class T> struct Many {
  typedef Vec<T> Value;
  static constexpr int64_t count = kLanes<T>;
  static INLINE Value get(const T* p) { return load(p); }
  static INLINE void put(T* p, Value v) { store(p, v); }
  static INLINE T sum(Value v) { return sum_lanes<T>(v); }
};
template <class T> struct One {
  typedef T Value;
  static constexpr int64_t count = 1;
  static INLINE Value get(const T* p) { return *p; }
  static INLINE void put(T* p, Value v) { *p = v; }
  static INLINE T sum(Value v) { return v; }
};

template <class T, class Function> INLINE void each(int64_t length, const Function& function) {
  int64_t i = 0;
  for (; i + kLanes<T> <= length; i += kLanes<T>) function(Many<T>(), i);
  for (; i < length; ++i) function(One<T>(), i);
}

// Sums of K series over the elements of a plane.
template <class T, int K> struct Sums {
  Vec<T> many[K] = {};
  T one[K] = {};
  INLINE Vec<T>* of(Many<T>) { return many; }
  INLINE T* of(One<T>) { return one; }
  T total(int k) const { return sum_lanes<T>(many[k]) + one[k]; }
};

// Mean of x and of x_t, sum of squares of x and of products of the two around the means.
struct DualMoments {
  double count = 0, mean = 0, mean_t = 0, squares = 0, products = 0;

  // Chan, Golub and LeVeque (1979): no cancellation, however far the means are from zero.
  void merge(const DualMoments& o) {
    if (o.count == 0) return;
    const double total = count + o.count, share = o.count / total;
    const double d = o.mean - mean, d_t = o.mean_t - mean_t;
    squares += o.squares + d * d * count * share;
    products += o.products + d * d_t * count * share;
    mean += d * share, mean_t += d_t * share, count = total;
  }
};

constexpr int64_t kNormChunk = 64;      // rows
constexpr int64_t kNormElements = 1024; // of small planes

template <class T> struct DualNormForward {
  const DualNorm<T>& p;

  void finish(int64_t c, const DualMoments& m) const {
    const double var = m.squares / m.count, rstd = 1 / std::sqrt(var + p.eps);
    p.mean[c] = T(m.mean), p.var[c] = T(var), p.rstd[c] = T(rstd);
    p.mean_t[c] = T(m.mean_t), p.q[c] = T(rstd * m.products / m.count);
  }
  double a(int64_t c) const { return (p.weight ? double(p.weight[c]) : 1.0) * p.rstd[c]; }
  double d(int64_t c) const {
    return ((p.weight_t ? double(p.weight_t[c]) : 0.0) - a(c) * p.q[c]) * p.rstd[c];
  }
  static T or_zero(const T* values, int64_t c) { return values ? values[c] : T(0); }

  // Sums over planes first .. last - 1 of a channel.
  DualMoments chunk_of_planes(int64_t c, int64_t first, int64_t last) const {
    const int64_t step = p.channels * p.inner;
    const T *x = p.x + c * p.inner, *x_t = p.x_t + c * p.inner;
    Sums<T, 2> sums;
    for (int64_t o = first; o < last; ++o)
      each<T>(p.inner, [&](auto kind, int64_t i) INLINE_LAMBDA {
        auto* s = sums.of(kind);
        s[0] += kind.get(x + o * step + i), s[1] += kind.get(x_t + o * step + i);
      });
    DualMoments m;
    m.count = double((last - first) * p.inner);
    const T mean = T(sums.total(0) / m.count), mean_t = T(sums.total(1) / m.count);
    Sums<T, 4> around;
    for (int64_t o = first; o < last; ++o)
      each<T>(p.inner, [&](auto kind, int64_t i) INLINE_LAMBDA {
        const auto u = kind.get(x + o * step + i) - mean, v = kind.get(x_t + o * step + i) - mean_t;
        auto* s = around.of(kind);
        s[0] += u, s[1] += v, s[2] += u * u, s[3] += u * v;
      });
    return moments_around(m.count, mean, mean_t, around.total(0), around.total(1),
                          around.total(2), around.total(3));
  }

  // From sums around numbers that are the means but for rounding.
  static DualMoments moments_around(double count, double mean, double mean_t, double rest,
                                    double rest_t, double squares, double products) {
    DualMoments m;
    m.count = count, m.mean = mean + rest / count, m.mean_t = mean_t + rest_t / count;
    m.squares = squares - rest * rest / count, m.products = products - rest * rest_t / count;
    return m;
  }

  void planes() const {
    const int64_t chunk = max_of(1, kNormElements / p.inner);
    const EvenSplit split(p.channels);
    run_parallel(split.workers, [&](int64_t worker) {
      for (int64_t c = split.begin(worker); c < split.begin(worker + 1); ++c) {
        DualMoments total;
        for (int64_t o = 0; o < p.outer; o += chunk)
          total.merge(chunk_of_planes(c, o, min_of(o + chunk, p.outer)));
        finish(c, total);
        const T mean = p.mean[c], mean_t = p.mean_t[c], a_ = T(a(c)), d_ = T(d(c));
        const T b = or_zero(p.bias, c), b_t = or_zero(p.bias_t, c);
        for (int64_t o = 0; o < p.outer; ++o) {
          const int64_t at = (o * p.channels + c) * p.inner;
          each<T>(p.inner, [&](auto kind, int64_t i) INLINE_LAMBDA {
            const auto u = kind.get(p.x + at + i) - mean;
            kind.put(p.y + at + i, u * a_ + b);
            kind.put(p.y_t + at + i, (kind.get(p.x_t + at + i) - mean_t) * a_ + u * d_ + b_t);
          });
        }
      }
    });
  }

  void rows() const {
    const int64_t C = p.channels;
    const EvenSplit split(p.outer);
    Buffer<DualMoments> moments(split.workers * C);
    run_parallel(split.workers, [&](int64_t worker) {
      DualMoments* own = moments.get() + worker * C;
      for (int64_t c = 0; c < C; ++c) own[c] = DualMoments();
      const int64_t end = split.begin(worker + 1);
      for (int64_t r = split.begin(worker); r < end; r += kNormChunk)
        chunk_of_rows(r, min_of(r + kNormChunk, end), own);
    });
    for (int64_t c = 0; c < C; ++c) {
      DualMoments total;
      for (int64_t worker = 0; worker < split.workers; ++worker)
        total.merge(moments.get()[worker * C + c]);
      finish(c, total);
    }
    Buffer<T> coefficients(4 * C);
    T *a_ = coefficients, *d_ = a_ + C, *b = d_ + C, *b_t = b + C;
    for (int64_t c = 0; c < C; ++c)
      a_[c] = T(a(c)), d_[c] = T(d(c)), b[c] = or_zero(p.bias, c), b_t[c] = or_zero(p.bias_t, c);
    run_parallel(split.workers, [&](int64_t worker) {
      for (int64_t r = split.begin(worker); r < split.begin(worker + 1); ++r)
        each<T>(C, [&](auto kind, int64_t c) INLINE_LAMBDA {
          const int64_t at = r * C + c;
          const auto u = kind.get(p.x + at) - kind.get(p.mean + c);
          const auto v = kind.get(p.x_t + at) - kind.get(p.mean_t + c);
          kind.put(p.y + at, u * kind.get(a_ + c) + kind.get(b + c));
          kind.put(p.y_t + at, v * kind.get(a_ + c) + u * kind.get(d_ + c) + kind.get(b_t + c));
        });
    });
  }

  void chunk_of_rows(int64_t first, int64_t last, DualMoments* own) const {
    const int64_t C = p.channels;
    const double count = double(last - first);
    each<T>(C, [&](auto kind, int64_t c) INLINE_LAMBDA {
      typedef typename decltype(kind)::Value Value;
      Value sum{}, sum_t{};
      for (int64_t r = first; r < last; ++r)
        sum += kind.get(p.x + r * C + c), sum_t += kind.get(p.x_t + r * C + c);
      const Value mean = sum * T(1 / count), mean_t = sum_t * T(1 / count);
      Value rest{}, rest_t{}, squares{}, products{};
      for (int64_t r = first; r < last; ++r) {
        const Value u = kind.get(p.x + r * C + c) - mean, v = kind.get(p.x_t + r * C + c) - mean_t;
        rest += u, rest_t += v, squares += u * u, products += u * v;
      }
      T values[6][kind.count];
      kind.put(values[0], mean), kind.put(values[1], mean_t), kind.put(values[2], rest);
      kind.put(values[3], rest_t), kind.put(values[4], squares), kind.put(values[5], products);
      for (int64_t i = 0; i < kind.count; ++i)
        own[c + i].merge(moments_around(count, values[0][i], values[1][i], values[2][i],
                                        values[3][i], values[4][i], values[5][i]));
    });
  }
};

// With gradients g of y and g_t of y_t, and the projection P(g) = (g - mean(g) - n mean(n g)) / std,
//
//   dL/dx_t = w P(g_t)
//   dL/dx   = w P(g) + (w_t - A q) P(g_t) - A (mean(n g_t) n_t + mean(n_t g_t) n)
//   dL/dw   = sum(n g + n_t g_t),   dL/db = sum(g),   n_t = P(x_t)
template <class T> struct DualNormBackward {
  const DualNormGrad<T>& p;

  static constexpr int kSums = 5; // of g, g_t, (x - mean) g, (x - mean) g_t, (x_t - mean_t) g_t

  // dL/dx = a g + b g_t + c (x_t - mean_t) + d (x - mean) + e
  // dL/dx_t = a g_t + f (x - mean) + h
  struct Coefficients {
    double a, b, c, d, e, f, h;
  };

  Coefficients finish(int64_t channel, const double* sums) const {
    const double count = double(p.outer * p.inner), rstd = p.rstd[channel], q = p.q[channel];
    const double w = p.weight ? double(p.weight[channel]) : 1.0;
    const double w_t = p.weight_t ? double(p.weight_t[channel]) : 0.0;
    const double mean_g = sums[0] / count, mean_g_t = sums[1] / count;
    const double n_g = rstd * sums[2] / count, n_g_t = rstd * sums[3] / count;
    const double n_t_g_t = rstd * sums[4] / count - q * rstd * n_g_t;
    p.g_weight[channel] = T(count * (n_g + n_t_g_t)), p.g_bias[channel] = T(sums[0]);
    Coefficients k;
    k.a = w * rstd, k.b = (w_t - k.a * q) * rstd, k.c = -k.a * n_g_t * rstd;
    k.d = (k.a * (q * rstd * n_g_t - n_g - n_t_g_t) - k.b * n_g_t) * rstd;
    k.e = -k.a * mean_g - k.b * mean_g_t, k.f = -k.a * n_g_t * rstd, k.h = -k.a * mean_g_t;
    return k;
  }

  void planes() const {
    const int64_t step = p.channels * p.inner, chunk = max_of(1, kNormElements / p.inner);
    const EvenSplit split(p.channels);
    run_parallel(split.workers, [&](int64_t worker) {
      for (int64_t c = split.begin(worker); c < split.begin(worker + 1); ++c) {
        const T mean = p.mean[c], mean_t = p.mean_t[c];
        double totals[kSums] = {};
        for (int64_t first = 0; first < p.outer; first += chunk) {
          Sums<T, kSums> sums;
          for (int64_t o = first; o < min_of(first + chunk, p.outer); ++o)
            each<T>(p.inner, [&](auto kind, int64_t i) INLINE_LAMBDA {
              const int64_t at = o * step + c * p.inner + i;
              add(sums.of(kind), kind.get(p.g + at), kind.get(p.g_t + at),
                  kind.get(p.x + at) - mean, kind.get(p.x_t + at) - mean_t);
            });
          for (int k = 0; k < kSums; ++k) totals[k] += sums.total(k);
        }
        const Coefficients k = finish(c, totals);
        const T a = T(k.a), b = T(k.b), of_t = T(k.c), d = T(k.d), e = T(k.e), f = T(k.f),
                h = T(k.h);
        for (int64_t o = 0; o < p.outer; ++o)
          each<T>(p.inner, [&](auto kind, int64_t i) INLINE_LAMBDA {
            const int64_t at = o * step + c * p.inner + i;
            const auto g = kind.get(p.g + at), g_t = kind.get(p.g_t + at);
            const auto u = kind.get(p.x + at) - mean, v = kind.get(p.x_t + at) - mean_t;
            kind.put(p.g_x + at, g * a + g_t * b + v * of_t + u * d + e);
            kind.put(p.g_x_t + at, g_t * a + u * f + h);
          });
      }
    });
  }

  template <class Value>
  static INLINE void add(Value* sums, Value g, Value g_t, Value u, Value v) {
    sums[0] += g, sums[1] += g_t, sums[2] += u * g, sums[3] += u * g_t, sums[4] += v * g_t;
  }

  void rows() const {
    const int64_t C = p.channels;
    const EvenSplit split(p.outer);
    Buffer<double> totals((split.workers + 1) * C * kSums);
    fill(totals.get(), (split.workers + 1) * C * kSums, 0.0);
    run_parallel(split.workers, [&](int64_t worker) {
      double* own = totals.get() + (worker + 1) * C * kSums;
      const int64_t end = split.begin(worker + 1);
      for (int64_t first = split.begin(worker); first < end; first += kNormChunk)
        each<T>(C, [&](auto kind, int64_t c) INLINE_LAMBDA {
          typedef typename decltype(kind)::Value Value;
          const Value mean = kind.get(p.mean + c), mean_t = kind.get(p.mean_t + c);
          Value sums[kSums] = {};
          for (int64_t r = first; r < min_of(first + kNormChunk, end); ++r) {
            const int64_t at = r * C + c;
            add(sums, kind.get(p.g + at), kind.get(p.g_t + at), kind.get(p.x + at) - mean,
                kind.get(p.x_t + at) - mean_t);
          }
          T values[kSums][kind.count];
          for (int k = 0; k < kSums; ++k) kind.put(values[k], sums[k]);
          for (int64_t i = 0; i < kind.count; ++i)
            for (int k = 0; k < kSums; ++k) own[(c + i) * kSums + k] += values[k][i];
        });
    });
    Buffer<T> coefficients(7 * C);
    T* k_ = coefficients;
    for (int64_t c = 0; c < C; ++c) {
      double* sums = totals.get() + c * kSums;
      for (int64_t worker = 1; worker <= split.workers; ++worker)
        for (int k = 0; k < kSums; ++k) sums[k] += sums[worker * C * kSums + k];
      const Coefficients k = finish(c, sums);
      const double all[7] = {k.a, k.b, k.c, k.d, k.e, k.f, k.h};
      for (int i = 0; i < 7; ++i) k_[i * C + c] = T(all[i]);
    }
    run_parallel(split.workers, [&](int64_t worker) {
      for (int64_t r = split.begin(worker); r < split.begin(worker + 1); ++r)
        each<T>(C, [&](auto kind, int64_t c) INLINE_LAMBDA {
          const int64_t at = r * C + c;
          const auto g = kind.get(p.g + at), g_t = kind.get(p.g_t + at);
          const auto u = kind.get(p.x + at) - kind.get(p.mean + c);
          const auto v = kind.get(p.x_t + at) - kind.get(p.mean_t + c);
          const auto k = [&](int i) INLINE_LAMBDA { return kind.get(k_ + i * C + c); };
          kind.put(p.g_x + at, g * k(0) + g_t * k(1) + v * k(2) + u * k(3) + k(4));
          kind.put(p.g_x_t + at, g_t * k(0) + u * k(5) + k(6));
        });
    });
  }
};

template <class T> void dual_batch_norm(const DualNorm<T>& p) {
  const DualNormForward<T> pass{p};
  p.inner > 1 ? pass.planes() : pass.rows();
}

template <class T> void dual_batch_norm_backward(const DualNormGrad<T>& p) {
  const DualNormBackward<T> pass{p};
  p.inner > 1 ? pass.planes() : pass.rows();
}

} // namespace mclfast::cpu::MCLFAST_CAPABILITY

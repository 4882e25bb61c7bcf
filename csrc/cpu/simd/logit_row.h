// One row of logits at a time, at any temperature: every exponential is relative to the row's
// maximum or to its log-sum-exp.
//
// Rows are padded to whole vectors with a value below any logit, so that its exponential vanishes;
// it is finite, because differences of logits are taken too. The anchor's own logit is hidden from
// vcl and icl by the same value.
#pragma once

#include <cmath>
#include <cstdint>

#include "capability.h"
#include "vec.h"

namespace mclfast::cpu::MCLFAST_CAPABILITY {

template <class T> constexpr T kPadding = T(-1e30);

// NaN when a logit is not finite or lies far beyond the padding. A maximum forgets NaN and minus
// infinity; a product with 0 keeps them for the price of two instructions, which wait for no memory.
template <class T> T row_max(const T* row, int64_t padded) {
  constexpr T kBeyond = sizeof(T) == 4 ? T(1e8) : T(1e277);
  Vec<T> top = load(row), poison{};
  for (int64_t c = 0; c < padded; c += kLanes<T>) {
    const Vec<T> x = load(row + c);
    top = maximum<T>(top, x);
    poison += x * kBeyond * T(0);
  }
  return max_lanes<T>(top) + sum_lanes<T>(poison);
}

// out = exp((row - top) * scale); returns the sum. `out` may be `row`. Subtracting first makes the
// largest term exactly 1, so that a row of one term only has a log-sum-exp without rounding.
template <class T> T exp_row(const T* row, T scale, T top, T* out, int64_t padded) {
  Vec<T> sum{};
  for (int64_t c = 0; c < padded; c += kLanes<T>) {
    const Vec<T> x = exponential((load(row + c) - top) * scale);
    store(out + c, x);
    sum += x;
  }
  return sum_lanes<T>(sum);
}

template <class T> void scale_row(T* row, T scale, int64_t padded) {
  for (int64_t c = 0; c < padded; c += kLanes<T>) store(row + c, load(row + c) * scale);
}

template <class T> T dot(const T* x, const T* y, int64_t padded) {
  Vec<T> sum{};
  for (int64_t c = 0; c < padded; c += kLanes<T>) sum += load(x + c) * load(y + c);
  return sum_lanes<T>(sum);
}

template <class T> T squared_norm(const T* x, int64_t length) {
  const int64_t whole = length / kLanes<T> * kLanes<T>;
  T sum = dot(x, x, whole);
  for (int64_t i = whole; i < length; ++i) sum += x[i] * x[i];
  return sum;
}

// <q, teacher - student>
template <class T>
T mean_difference(const T* q, const T* teacher, const T* student, int64_t padded) {
  Vec<T> sum{};
  for (int64_t c = 0; c < padded; c += kLanes<T>)
    sum += load(q + c) * (load(teacher + c) - load(student + c));
  return sum_lanes<T>(sum);
}

// The row's own logit replaced by padding while the guard lives.
template <class T> class HiddenSelf {
public:
  HiddenSelf(T* row, int64_t self) : place_(row + self), value_(*place_) {
    *place_ = kPadding<T>;
  }
  ~HiddenSelf() { *place_ = value_; }

private:
  T* place_;
  T value_;
};

// log sum exp over the columns other than `self`; 0 for a batch of one, which has none.
template <class T>
T contrastive_lse(T* row, int64_t self, T* scratch, int64_t batch, int64_t padded) {
  if (batch == 1) return T(0);
  HiddenSelf<T> hidden(row, self);
  const T top = row_max(row, padded);
  return top + std::log(exp_row(row, T(1), top, scratch, padded));
}

// weights = exp(row - lse) without the column `self`; returns their sum. Dividing by it takes out
// the rounding of lse, which at a sharp temperature is large beside 1.
template <class T>
T contrastive_weights(T* row, int64_t self, T lse, T* weights, int64_t padded) {
  HiddenSelf<T> hidden(row, self);
  const T sum = exp_row(row, T(1), lse, weights, padded);
  weights[self] = T(0);
  return sum;
}

// softmax(row / kl_temperature) = weights / sum; log-sum-exp: top / kl_temperature + log(sum).
template <class T> struct SoftRow {
  T top, sum;
  T lse(T inverse_kl) const { return top * inverse_kl + std::log(sum); }
};

template <class T> SoftRow<T> soft_row(const T* row, T inverse_kl, T* weights, int64_t padded) {
  SoftRow<T> soft;
  soft.top = row_max(row, padded);
  soft.sum = exp_row(row, inverse_kl, soft.top, weights, padded);
  return soft;
}

// log-sum-exp of the student less that of the teacher, without the cancellation of the two
// logarithms.
template <class T>
T lse_difference(const SoftRow<T>& student, const SoftRow<T>& teacher, T inverse_kl) {
  return (student.top - teacher.top) * inverse_kl + std::log(student.sum / teacher.sum);
}

} // namespace mclfast::cpu::MCLFAST_CAPABILITY

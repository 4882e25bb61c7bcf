// Momentum update of memory banks, in place: every place belongs to one worker.
#pragma once

#include <cmath>
#include <cstdint>

#include "../dispatch/kernels.h"
#include "../simd/capability.h"
#include "../simd/logit_row.h"
#include "../simd/workspace.h"
#include "bank_elements.h"

namespace mclfast::cpu::MCLFAST_CAPABILITY {

template <class T, class Value>
void update_entry(T momentum, const T* embedding, int64_t width, T* mixed, Value* entry) {
  widen_row(entry, mixed, width);
  for (int64_t i = 0; i < width; ++i)
    mixed[i] = momentum * mixed[i] + (T(1) - momentum) * embedding[i];
  const T norm = std::sqrt(squared_norm(mixed, width));
  const T scale = T(1) / (norm < T(1e-6) ? T(1e-6) : norm); // NaN stays
  for (int64_t i = 0; i < width; ++i) narrow(mixed[i] * scale, entry[i]);
}

template <class T> void bank_update(const BankUpdate<T>& p) {
  const EvenSplit split(p.banks_count * p.count);
  with_element_type(p.element, [&](auto zero) {
    auto* banks = static_cast<decltype(zero)*>(p.banks);
    run_parallel(split.workers, [&](int64_t worker) {
      Buffer<T> mixed(p.width);
      for (int64_t i = split.begin(worker); i < split.begin(worker + 1); ++i) {
        const int64_t m = i / p.count, k = i % p.count;
        update_entry(T(p.momentum), p.embeddings + (m * p.batch + p.sources[k]) * p.width, p.width,
                     mixed.get(), banks + (m * p.samples + p.places[k]) * p.width);
      }
    });
  });
}

} // namespace mclfast::cpu::MCLFAST_CAPABILITY

// Keys drawn by a counter-based generator: the draws of an anchor depend on the seed, the step and
// the anchor's number only, so that every backend and any split of a batch draws the same.
//
// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
#pragma once

#include <cstdint>

#include "../dispatch/kernels.h"
#include "capability.h"
#include "workspace.h"

namespace mclfast::cpu::MCLFAST_CAPABILITY {

struct PhiloxBlock {
  uint64_t draws[2];
};

INLINE PhiloxBlock philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0 | uint64_t(c1) << 32, c2 | uint64_t(c3) << 32}};
}

// Scales a draw to 0 .. bound - 1.
INLINE int64_t below(uint64_t draw, int64_t bound) {
  return int64_t(static_cast<unsigned __int128>(draw) * uint64_t(bound) >> 64);
}

// Calls take(d, draw) for the draws d = 0 .. count - 1 of an anchor.
template <class Take>
INLINE void draw_each(const SampleContrast& p, int64_t anchor, uint32_t stream, int64_t count,
                      const Take& take) {
  for (int64_t d = 0; d < count; d += 2) {
    const PhiloxBlock block = philox(uint32_t(d / 2), uint32_t(anchor), p.step, stream, p.seed);
    take(d, block.draws[0]);
    if (d + 1 < count) take(d + 1, block.draws[1]);
  }
}

inline void sample_contrast(const SampleContrast& p) {
  const EvenSplit split(p.batch);
  run_parallel(split.workers, [&](int64_t worker) {
    for (int64_t r = split.begin(worker); r < split.begin(worker + 1); ++r) {
      const int64_t anchor = p.index[r], label = p.labels[anchor];
      const int64_t start = p.starts[label], size = p.starts[label + 1] - start;
      const int64_t own = p.position[anchor] - start;
      int64_t* positives = p.positives + r * (1 + p.positives_count);
      positives[0] = anchor;
      draw_each(p, anchor, 0, p.positives_count, [&](int64_t d, uint64_t draw) {
        const int64_t t = below(draw, size - 1);
        // A class of one sample has no positive but the anchor itself.
        positives[1 + d] = size == 1 ? anchor : p.order[start + t + (t >= own)];
      });
      int64_t* negatives = p.negatives + r * p.negatives_count;
      draw_each(p, anchor, 1, p.negatives_count, [&](int64_t d, uint64_t draw) {
        const int64_t t = below(draw, p.samples - size);
        negatives[d] = p.order[t + (t >= start ? size : 0)];
      });
    }
  });
}

} // namespace mclfast::cpu::MCLFAST_CAPABILITY

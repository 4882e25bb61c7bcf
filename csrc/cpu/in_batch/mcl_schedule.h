// Schedule of one mcl_rows call: pairs of nodes and bands of anchors over the workers, then the sum
// of the workers' gradients, then the positives.
#pragma once

#include <cstdint>

#include "../../families.h"
#include "../dispatch/kernels.h"
#include "../simd/capability.h"
#include "../simd/workspace.h"
#include "intra_band.h"
#include "mcl_problem.h"
#include "pair_band.h"
#include "positives.h"
#include "tile_pair.h"

namespace mclfast::cpu::MCLFAST_CAPABILITY {

template <class T> void mcl_rows(const MclRows<T>& arguments, Mode mode) {
  const MclProblem<T> p(arguments, mode);
  const int64_t N = p.nodes_count, B = p.batch, R = p.row_count;
  if (R == 0) {
    if (p.grad_nodes) fill(p.grad_nodes, N * B * p.width, T(0));
    return;
  }
  const bool gradient = p.backward || p.second;
  const Packed<T> packed(p.nodes, N, B, p.width, gradient);
  const Packed<T> packed_tangents(p.tangents, p.second ? N : 0, B, p.width, true);
  const NodePairs pairs(p);
  const bool tiles = pairs.count > 0 && tile_pair_applies(p);

  // Low enough to give every worker a band and to keep the logits of a band in the cache.
  constexpr int64_t kBandBytes = 1 << 20;
  const int64_t row_bytes = N * p.stride * int64_t(sizeof(T));
  const int64_t fair = round_up(divide_up(R, worker_count()), 8);
  const int64_t cross_height = clamp(fair, 8, 64);
  const int64_t intra_height = clamp(min_of(fair, kBandBytes / row_bytes / 8 * 8), 8, 64);
  const int64_t cross_bands = divide_up(R, cross_height);
  const int64_t cross_items = pairs.count * (tiles ? 1 : cross_bands);
  const int64_t intra_items =
      p.wants(kVcl | kSoftVcl) ? divide_up(R, intra_height) : int64_t(0);
  // In matrix products: one [B, B] per tile pair, two bands per cross band, N per intra band.
  const WeightedSplit split(cross_items, tiles ? double(B) : 2.0 * double(cross_height),
                            intra_items, double(N * intra_height));

  Gradients<T> gradients(gradient ? split.workers : 0, N, B * p.width);
  const TilePairFunction<T> tile = choose_tile_pair(p);
  run_parallel(split.workers, [&](int64_t worker) {
    const int64_t begin = split.begin(worker), end = split.begin(worker + 1);
    const int64_t cross_end = min_of(end, cross_items);
    if (begin < cross_end && tiles) {
      PairWorkspace<T> ws(p);
      for (int64_t i = begin; i < cross_end; ++i)
        tile(p, packed, &packed_tangents, pairs.pairs[i].a, pairs.pairs[i].b, ws, &gradients,
             worker);
    } else if (begin < cross_end) {
      CrossBand<T> ws(p, cross_height);
      for (int64_t i = begin; i < cross_end; ++i) {
        const NodePairs::Pair pair = pairs.pairs[i / cross_bands];
        const int64_t first = i % cross_bands * cross_height;
        cross_band(p, packed, &packed_tangents, pair.a, pair.b, first,
                   min_of(R - first, cross_height), ws, &gradients, worker);
      }
    }
    if (end > cross_items) {
      IntraBand<T> ws(p, intra_height);
      for (int64_t i = max_of(begin, cross_items); i < end; ++i) {
        const int64_t first = (i - cross_items) * intra_height;
        intra_band(p, packed, &packed_tangents, first, min_of(R - first, intra_height), ws,
                   &gradients, worker);
      }
    }
  });
  if (gradient) gradients.sum_into(p.grad_nodes);
  positive_terms(p);
}

} // namespace mclfast::cpu::MCLFAST_CAPABILITY

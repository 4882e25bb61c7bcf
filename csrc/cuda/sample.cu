// Positives and negatives of each anchor, from counters: one thread per draw.
#include "device.cuh"
#include "launch.cuh"
#include "philox.h"

namespace mclfast::cuda {
namespace {

// Draw `draw` of a stream (0: positives, 1: negatives) of an anchor, uniform in [0, count).
__device__ __forceinline__ int64_t uniform(const Sample& s, int64_t anchor, uint32_t stream,
                                           int draw, int64_t count) {
  const PhiloxBlock w = philox(
      {{static_cast<uint32_t>(draw / 2), static_cast<uint32_t>(anchor), s.step, stream}},
      static_cast<uint32_t>(s.seed), static_cast<uint32_t>(s.seed >> 32));
  const int half = draw % 2 * 2;
  const uint64_t bits = half == 0 ? w.w[0] | uint64_t{w.w[1]} << 32 : w.w[2] | uint64_t{w.w[3]} << 32;
  return static_cast<int64_t>(__umul64hi(bits, static_cast<uint64_t>(count)));
}

__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ Sample s) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t draws = 1 + s.positives + s.negatives;
  if (i >= s.batch * draws) return;
  const int64_t r = i / draws;
  const int k = static_cast<int>(i % draws);
  const int64_t anchor = s.index[r];
  const int label = s.labels[anchor];
  const int64_t start = s.starts[label], size = s.starts[label + 1] - start;
  if (k == 0) {
    s.pos_idx[r * (1 + s.positives)] = anchor;
  } else if (k <= s.positives) {
    int64_t t = 0;  // of a class of one: the anchor itself
    if (size > 1) {
      t = uniform(s, anchor, 0, k - 1, size - 1);
      t += t >= s.position[anchor] - start;
    }
    s.pos_idx[r * (1 + s.positives) + k] = s.order[start + t];
  } else {
    const int draw = k - 1 - s.positives;
    int64_t t = uniform(s, anchor, 1, draw, s.samples - size);
    if (t >= start) t += size;
    s.neg_idx[r * s.negatives + draw] = s.order[t];
  }
}

}  // namespace

cudaError_t sample_contrast(const Sample& s, cudaStream_t stream) {
  const int64_t draws = static_cast<int64_t>(s.batch) * (1 + s.positives + s.negatives);
  return launch(sample_kernel, (draws + kThreads - 1) / kThreads, kThreads, 0, stream, s);
}

}  // namespace mclfast::cuda

// Statistics of one anchor: what a tile of scores adds to them, how parts combine, and the logit
// gradients that follow from them. Row (m, e) is the vector of scores of node e in bank m.
#pragma once

#include <cfloat>
#include <cstdint>

#include <cuda_runtime.h>

#include "../families.h"
#include "device.cuh"
#include "launch.h"

namespace mclfast::cuda {

// A partial sum over no column. Finite, so that differences of two such are 0 and not NaN.
constexpr float kEmpty = -FLT_MAX;

// Which rows and banks take part.
struct Graph {
  int* network;       // [N]
  int *first, *last;  // [M], the nodes that need bank m lie in [first, last)

  __host__ __device__ Graph(Carver& memory, int nodes, int networks) {
    network = memory.take<int>(nodes);
    first = memory.take<int>(networks);
    last = memory.take<int>(networks);
  }
};

__device__ __forceinline__ bool row_active(unsigned families, bool intra) {
  return families & (intra ? kVcl | kSoftVcl : kIcl | kSoftIcl);
}

__device__ __forceinline__ bool row_soft(unsigned families, bool intra) {
  return families & (intra ? kSoftVcl : kSoftIcl);
}

// Ends with a barrier.
__device__ __forceinline__ void load_graph(const Bank& b, const Graph& graph) {
  for (int n = threadIdx.x; n < b.node_count; n += kThreads) graph.network[n] = b.networks[n];
  __syncthreads();
  for (int m = threadIdx.x; m < b.network_count; m += kThreads) {
    int first = b.node_count, last = 0;
    for (int n = 0; n < b.node_count; ++n) {
      if (!row_active(b.families, graph.network[n] == m)) continue;
      first = min(first, n);
      last = n + 1;
    }
    graph.first[m] = first;
    graph.last[m] = last;
  }
  __syncthreads();
}

// Row that row (m, e) is compared with in the soft terms, through node s of another network (intra)
// or of network m (inter); -1: none. The relation is symmetric.
__device__ __forceinline__ int partner(const Graph& graph, int nodes, int m, int e, int s) {
  const int own = graph.network[e], other = graph.network[s];
  if (own == m) return other == m ? -1 : other * nodes + s;
  return other == m ? own * nodes + s : -1;
}

// Place of the pair (row (m, e) as teacher, its partner through s) in a [2, N, N] array: soft_vcl
// [student, teacher], then soft_icl [a, b] with the teacher in node a.
__device__ __forceinline__ int pair_slot(int nodes, bool intra, int e, int s) {
  return intra ? s * nodes + e : (nodes + e) * nodes + s;
}

__host__ __device__ inline int record_size(int nodes, int networks) {
  return 4 * networks * nodes + 2 * nodes * nodes;
}

// Partial sums over some columns, as floats that lie behind one another.
// Forward: top = max z, hard = sum exp(z - top), soft = sum exp((z - top) / T), pos = sum of z over
// positives, pair = sum exp((z_t - top_t) / T) (z_t - z_s).
// Double backward: hard = sum q y, soft = sum p y, pos = sum of y over positives,
// pair = sum p_t y_s.
struct Record {
  float *top, *hard, *soft, *pos;  // [M, N] each
  float* pair;                     // [2, N, N], see pair_slot

  __device__ Record(float* data, int rows)
      : top(data), hard(data + rows), soft(data + 2 * rows), pos(data + 3 * rows),
        pair(data + 4 * rows) {}
};

__device__ __forceinline__ void clear_record(float* data, int rows, int size) {
  for (int i = threadIdx.x; i < size; i += kThreads) data[i] = i < rows ? kEmpty : 0.0f;
}

// Adds `count` columns from column `begin` on to the record of row (m, e). One warp per row:
// nothing else touches its entries. `w` [count] is scratch of this row.
__device__ __forceinline__ void forward_row(const Bank& b, const Graph& graph, const float* z,
                                            int stride, float* w, int begin, int count, int m,
                                            int e, const Record& record) {
  const int lane = threadIdx.x & 31, nodes = b.node_count, row = m * nodes + e;
  const bool intra = graph.network[e] == m;
  if (!row_active(b.families, intra)) return;
  const bool soft_terms = row_soft(b.families, intra);
  const float inverse = 1.0f / b.kl_temperature;
  const int first = intra && begin == 0 ? 1 : 0;  // the anchor's own entry
  const float* own = z + row * stride;

  float tile_top = kEmpty;
  for (int k = first + lane; k < count; k += 32) tile_top = fmaxf(tile_top, own[k]);
  tile_top = warp_max(tile_top);
  float hard = 0, soft = 0, pos = 0;
  for (int k = first + lane; k < count; k += 32) {
    const float t = own[k] - tile_top, x = expf(t * inverse);
    hard += expf(t);
    soft += x;
    w[k] = x;  // read by this lane only
    if (begin + k <= b.positives) pos += own[k];
  }
  hard = warp_sum(hard);
  soft = warp_sum(soft);
  if (begin <= b.positives) pos = warp_sum(pos);

  const float old = record.top[row], top = fmaxf(old, tile_top);
  if (soft_terms) {
    const float old_scale = expf((old - top) * inverse);
    const float tile_scale = expf((tile_top - top) * inverse);
    for (int s = 0; s < nodes; ++s) {
      const int other = partner(graph, nodes, m, e, s);
      if (other < 0) continue;
      float sum = 0;
      for (int k = first + lane; k < count; k += 32)
        sum += w[k] * (own[k] - z[other * stride + k]);
      sum = warp_sum(sum);
      float& pair = record.pair[pair_slot(nodes, intra, e, s)];
      if (lane == 0) pair = pair * old_scale + sum * tile_scale;
    }
  }
  __syncwarp();  // every lane has read the old top
  if (lane == 0) {
    record.top[row] = top;
    record.hard[row] = record.hard[row] * expf(old - top) + hard * expf(tile_top - top);
    record.soft[row] = record.soft[row] * expf((old - top) * inverse) +
                       soft * expf((tile_top - top) * inverse);
    record.pos[row] += pos;
  }
}

// The same for the double backward: y is [.., stride] with the rows of z.
__device__ __forceinline__ void tangent_row(const Bank& b, const Graph& graph, const float* z,
                                            const float* y, int stride, int stacked, float* w,
                                            int begin, int count, int m, int e, float lse,
                                            float kl_lse, const Record& record) {
  const int lane = threadIdx.x & 31, nodes = b.node_count, row = m * nodes + e;
  const bool intra = graph.network[e] == m;
  if (!row_active(b.families, intra)) return;
  const float inverse = 1.0f / b.kl_temperature;
  const int first = intra && begin == 0 ? 1 : 0;
  const float* own = z + (m * stacked + e) * stride;
  const float* own_y = y + (m * stacked + e) * stride;
  float hard = 0, soft = 0, pos = 0;
  for (int k = first + lane; k < count; k += 32) {
    const float p = expf(own[k] * inverse - kl_lse);
    hard += expf(own[k] - lse) * own_y[k];
    soft += p * own_y[k];
    w[k] = p;
    if (begin + k <= b.positives) pos += own_y[k];
  }
  hard = warp_sum(hard);
  soft = warp_sum(soft);
  if (begin <= b.positives) pos = warp_sum(pos);
  if (row_soft(b.families, intra)) {
    for (int s = 0; s < nodes; ++s) {
      const int other = partner(graph, nodes, m, e, s);
      if (other < 0) continue;
      const float* other_y = y + (other / nodes * stacked + other % nodes) * stride;
      float sum = 0;
      for (int k = first + lane; k < count; k += 32) sum += w[k] * other_y[k];
      sum = warp_sum(sum);
      if (lane == 0) record.pair[pair_slot(nodes, intra, e, s)] += sum;
    }
  }
  if (lane == 0) {
    record.hard[row] += hard;
    record.soft[row] += soft;
    record.pos[row] += pos;
  }
}

// Records of the blocks of one anchor, [record_size, parts]: lanes read neighbouring parts. Other
// blocks may have written them during this kernel: reads go past the non-coherent cache.
struct Parts {
  const float* data;
  int count;

  __device__ __forceinline__ float at(int i, int part) const {
    return __ldcg(data + static_cast<int64_t>(i) * count + part);
  }

  // Sum over the parts by one warp: of entry i, or with weights exp(shift of the part's top).
  __device__ __forceinline__ float sum(int i) const {
    float total = 0;
    for (int part = threadIdx.x & 31; part < count; part += 32) total += at(i, part);
    return warp_sum(total);
  }
  __device__ __forceinline__ float scaled_sum(int i, int row, float top, float inverse) const {
    float total = 0;
    for (int part = threadIdx.x & 31; part < count; part += 32)
      total += at(i, part) * expf((at(row, part) - top) * inverse);
    return warp_sum(total);
  }
};

// This block's record among them.
__device__ __forceinline__ void write_record(const float* record, int size, float* data, int parts,
                                             int part) {
  for (int i = threadIdx.x; i < size; i += kThreads)
    data[static_cast<int64_t>(i) * parts + part] = record[i];
}

// Statistics of one anchor from its forward records.
struct Combined {
  float *top, *soft, *lse, *kl_lse;  // [M, N] each

  __host__ __device__ Combined(Carver& memory, int rows) {
    top = memory.take<float>(rows);
    soft = memory.take<float>(rows);
    lse = memory.take<float>(rows);
    kl_lse = memory.take<float>(rows);
  }
};

// Ends with a barrier.
__device__ __forceinline__ void combine_statistics(const Bank& b, const Graph& graph,
                                                   const Parts& parts, const Combined& out) {
  const int rows = b.network_count * b.node_count, lane = threadIdx.x & 31;
  const float inverse = 1.0f / b.kl_temperature;
  for (int row = threadIdx.x / 32; row < rows; row += kWarps) {
    const bool intra = graph.network[row % b.node_count] == row / b.node_count;
    const bool active = row_active(b.families, intra);
    float top = kEmpty, hard = 1, soft = 1;
    if (active) {
      for (int part = lane; part < parts.count; part += 32) top = fmaxf(top, parts.at(row, part));
      top = warp_max(top);
      hard = parts.scaled_sum(rows + row, row, top, 1.0f);
      soft = parts.scaled_sum(2 * rows + row, row, top, inverse);
    }
    if (lane != 0) continue;
    out.top[row] = top;
    out.soft[row] = soft;
    out.lse[row] = active ? top + logf(hard) : 0.0f;
    out.kl_lse[row] = active ? top * inverse + logf(soft) : 0.0f;
  }
  __syncthreads();
}

// Rows and statistics of anchor r, from the same records; outputs that are null are left out. One
// warp per output: this is warp `warp` of `warps`, which may be those of several blocks.
__device__ __forceinline__ void write_rows(const Bank& b, const Graph& graph, int r,
                                           const Parts& parts, const Combined& in, const Rows& out,
                                           float* lse, float* kl_lse, int warp, int warps) {
  const int nodes = b.node_count, rows = b.network_count * nodes, pairs = nodes * nodes;
  const int64_t batch = b.batch;
  const float t = b.kl_temperature;
  const bool writes = (threadIdx.x & 31) == 0;
  for (int row = warp; row < rows; row += warps) {
    const int e = row % nodes;
    const bool intra = graph.network[e] == row / nodes;
    const int positives = b.positives + (intra ? 0 : 1);
    float value = 0;
    if (b.families & (intra ? kVcl : kIcl) && positives > 0)
      value = in.lse[row] - parts.sum(3 * rows + row) / positives;
    if (!writes) continue;
    lse[row * batch + r] = in.lse[row];
    if (kl_lse != nullptr) kl_lse[row * batch + r] = in.kl_lse[row];
    if (intra && out.vcl != nullptr) out.vcl[e * batch + r] = value;
    if (out.icl != nullptr) out.icl[row * batch + r] = intra ? 0.0f : value;
  }
  if (out.soft_vcl == nullptr) return;
  for (int i = warp; i < 2 * pairs; i += warps) {
    const int a = i / nodes % nodes, c = i % nodes;
    const bool intra = i < pairs;
    const int net_a = graph.network[a], net_c = graph.network[c];
    float value = 0;
    if (net_a != net_c && row_soft(b.families, intra)) {
      const int teacher = intra ? net_c * nodes + c : net_c * nodes + a;
      const int student = intra ? net_a * nodes + a : net_a * nodes + c;
      const float cross = parts.scaled_sum(4 * rows + i, teacher, in.top[teacher], 1.0f / t);
      // The difference of the kl_lse, from its parts: it is far smaller than they are.
      const float log_ratio = logf(in.soft[teacher] / in.soft[student]);
      value = t * (cross / in.soft[teacher] - (in.top[teacher] - in.top[student])) -
              t * t * log_ratio;
    }
    float* to = intra ? out.soft_vcl : out.soft_icl;
    if (writes) to[i % pairs * batch + r] = value;
  }
}

// Coefficients of anchor r for its logit gradients.
struct Coefficients {
  float *lse, *kl_lse;          // [M, N]
  float *hard, *positive;       // [M, N], of the softmax at temperature 1; for a positive column
  float *soft_vcl, *soft_icl;   // [N, N], T times the cotangent; 0 inside a network

  __host__ __device__ Coefficients(Carver& memory, int nodes, int networks) {
    lse = memory.take<float>(networks * nodes);
    kl_lse = memory.take<float>(networks * nodes);
    hard = memory.take<float>(networks * nodes);
    positive = memory.take<float>(networks * nodes);
    soft_vcl = memory.take<float>(nodes * nodes);
    soft_icl = memory.take<float>(nodes * nodes);
  }
};

// All but the statistics. No barrier.
__device__ __forceinline__ void load_cotangents(const Bank& b, const Graph& graph,
                                                const Cotangents& g, int r,
                                                const Coefficients& c) {
  const int nodes = b.node_count;
  const int64_t batch = b.batch;
  for (int row = threadIdx.x; row < b.network_count * nodes; row += kThreads) {
    const int e = row % nodes;
    const bool intra = graph.network[e] == row / nodes;
    const int positives = b.positives + (intra ? 0 : 1);
    float hard = 0;
    if (b.families & (intra ? kVcl : kIcl) && positives > 0)
      hard = intra ? g.vcl[e * batch + r] : g.icl[row * batch + r];
    c.hard[row] = hard;
    c.positive[row] = positives > 0 ? hard / positives : 0.0f;
  }
  for (int i = threadIdx.x; i < nodes * nodes; i += kThreads) {
    const bool other = graph.network[i / nodes] != graph.network[i % nodes];
    const float t = b.kl_temperature;
    c.soft_vcl[i] = other && b.families & kSoftVcl ? t * g.soft_vcl[i * batch + r] : 0.0f;
    c.soft_icl[i] = other && b.families & kSoftIcl ? t * g.soft_icl[i * batch + r] : 0.0f;
  }
}

// T times the cotangent of the pair in which row (m, e) is the student, its partner through s the
// teacher.
__device__ __forceinline__ float student_weight(const Coefficients& c, int nodes, bool intra, int e,
                                                int s) {
  return intra ? c.soft_vcl[e * nodes + s] : c.soft_icl[s * nodes + e];
}

// p of row (m, e) for the tile: one warp per row.
__device__ __forceinline__ void soft_probabilities(const Bank& b, const Graph& graph,
                                                   const Coefficients& c, const float* z,
                                                   int stride, int count, int m, int e, float* p) {
  if (!row_soft(b.families, graph.network[e] == m)) return;
  const int row = m * b.node_count + e;
  const float inverse = 1.0f / b.kl_temperature, kl_lse = c.kl_lse[row];
  for (int k = threadIdx.x & 31; k < count; k += 32)
    p[row * stride + k] = expf(z[row * stride + k] * inverse - kl_lse);
}

// Replaces the scores of row (m, e) by logit gradients, zeros from `count` up to `padded` columns.
__device__ __forceinline__ void logit_gradients(const Bank& b, const Graph& graph,
                                                const Coefficients& c, const float* p, int stride,
                                                int begin, int count, int padded, int m, int e,
                                                float* z) {
  const int nodes = b.node_count, row = m * nodes + e;
  const bool intra = graph.network[e] == m;
  const bool active = row_active(b.families, intra), soft_terms = row_soft(b.families, intra);
  const float lse = c.lse[row], hard = c.hard[row], positive = c.positive[row];
  for (int k = threadIdx.x & 31; k < padded; k += 32) {
    float& at = z[row * stride + k];
    float gz = 0;
    if (active && k < count && !(intra && begin + k == 0)) {
      gz = hard * expf(at - lse);
      if (begin + k <= b.positives) gz -= positive;
      if (soft_terms) {
        const float own = p[row * stride + k];
        for (int s = 0; s < nodes; ++s) {
          const int other = partner(graph, nodes, m, e, s);
          if (other < 0) continue;
          gz += student_weight(c, nodes, intra, e, s) * (own - p[other * stride + k]);
        }
      }
    }
    at = gz;
  }
}

}  // namespace mclfast::cuda

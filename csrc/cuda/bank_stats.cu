// Rows and log-partitions of the memory-bank terms, and the row inner products of their double
// backward: each bank row is read once, from where it lies, for all nodes.
#include "../families.h"
#include "bank_rows.cuh"
#include "bank_tile.cuh"
#include "launch.cuh"
#include "launch_plan.h"

namespace mclfast::cuda {
namespace {

struct StatsParams {
  Bank bank;
  const void* tangents;       // double backward: [N, B, D], and its statistics [M, N, B]
  const float *lse, *kl_lse;
  float* records;             // [B, record_size, splits]
  int tile, span, splits;
};

struct StatsShared {
  Graph graph;
  float *nodes, *z, *w, *record;
  int* keys;
  int padded, stride;

  __host__ __device__ StatsShared(Carver& memory, const Bank& b, int tile, bool second)
      : graph(memory, b.node_count, b.network_count), padded((b.width + 3) / 4 * 4),
        stride(score_stride(tile)) {
    const int rows = b.network_count * b.node_count, copies = second ? 2 : 1;
    nodes = memory.take<float>(copies * b.node_count * padded);
    z = memory.take<float>(copies * rows * stride);
    w = memory.take<float>(rows * stride);
    record = memory.take<float>(record_size(b.node_count, b.network_count));
    keys = memory.take<int>(tile);
  }
};

template <bool kSecond>
__global__ void __launch_bounds__(kThreads, 2) stats_kernel(const __grid_constant__ StatsParams p) {
  const Bank& b = p.bank;
  Carver memory{dynamic_shared(), 0};
  const StatsShared s(memory, b, p.tile, kSecond);
  const int r = blockIdx.x / p.splits, warp = threadIdx.x / 32;
  const int nodes = b.node_count, rows = b.network_count * nodes;
  const int stacked = kSecond ? 2 * nodes : nodes;
  const int size = record_size(nodes, b.network_count);
  const int begin = blockIdx.x % p.splits * p.span;
  const int end = min(begin + p.span, 1 + b.positives + b.negatives);
  const float scale = 1.0f / b.temperature;

  load_nodes(b, b.nodes, r, s.nodes, s.padded);
  if (kSecond) load_nodes(b, p.tangents, r, s.nodes + nodes * s.padded, s.padded);
  clear_record(s.record, kSecond ? 0 : rows, size);
  load_graph(b, s.graph);
  const GlobalRows source(b, s.keys);
  const Record record(s.record, rows);

  for (int tile = begin; tile < end; tile += p.tile) {
    const int count = min(p.tile, end - tile), groups = (count + kGroup - 1) / kGroup;
    // The last group may be short: its keys repeat the last column and their scores are not used.
    for (int k = threadIdx.x; k < groups * kGroup; k += kThreads)
      s.keys[k] = static_cast<int>(*key_address(b, r, min(tile + k, end - 1)));
    __syncthreads();
    for (int unit = warp; unit < b.network_count * groups; unit += kWarps) {
      const int m = unit / groups, first = s.graph.first[m], last = s.graph.last[m];
      if (first >= last) continue;
      score_group(source, s.nodes, s.padded, b.width, scale, m, unit % groups,
                  kSecond ? 0 : first, kSecond ? stacked : last, s.z + m * stacked * s.stride,
                  s.stride);
    }
    __syncthreads();
    for (int row = warp; row < rows; row += kWarps) {
      const int m = row / nodes, e = row % nodes;
      float* w = s.w + row * s.stride;
      if (kSecond) {
        const int64_t at = static_cast<int64_t>(row) * b.batch + r;
        tangent_row(b, s.graph, s.z, s.z + nodes * s.stride, s.stride, stacked, w, tile, count, m,
                    e, p.lse[at], p.kl_lse[at], record);
      } else {
        forward_row(b, s.graph, s.z, s.stride, w, tile, count, m, e, record);
      }
    }
    __syncthreads();
  }
  write_record(s.record, size, p.records + static_cast<int64_t>(r) * p.splits * size, p.splits,
               blockIdx.x % p.splits);
}

struct CombineParams {
  Bank bank;
  Rows rows;
  float *lse, *kl_lse;  // forward: [M, N, B]
  float *inner_hard, *inner_soft;  // double backward: [M, N, B]
  const float* records;
  int splits;
};

__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ CombineParams p) {
  const Bank& b = p.bank;
  Carver memory{dynamic_shared(), 0};
  const Graph graph(memory, b.node_count, b.network_count);
  const Combined combined(memory, b.network_count * b.node_count);
  const int r = blockIdx.x, size = record_size(b.node_count, b.network_count);
  const Parts parts{p.records + static_cast<int64_t>(r) * p.splits * size, p.splits};
  load_graph(b, graph);
  combine_statistics(b, graph, parts, combined);
  write_rows(b, graph, r, parts, combined, p.rows, p.lse, p.kl_lse, threadIdx.x / 32, kWarps);
}

// Gradients of the cotangents: linear in the record.
__global__ void __launch_bounds__(kThreads)
    combine_tangents_kernel(const __grid_constant__ CombineParams p) {
  const Bank& b = p.bank;
  Carver memory{dynamic_shared(), 0};
  const Graph graph(memory, b.node_count, b.network_count);
  const int nodes = b.node_count, rows = b.network_count * nodes, r = blockIdx.x;
  const int size = record_size(nodes, b.network_count);
  const int64_t batch = b.batch;
  float* total = memory.take<float>(size);
  const Parts parts{p.records + static_cast<int64_t>(r) * p.splits * size, p.splits};
  load_graph(b, graph);
  for (int i = threadIdx.x / 32; i < size; i += kWarps) {
    const float sum = parts.sum(i);
    if (threadIdx.x % 32 == 0) total[i] = sum;
  }
  __syncthreads();
  const Record record(total, rows);
  for (int row = threadIdx.x; row < rows; row += kThreads) {
    const int e = row % nodes;
    const bool intra = graph.network[e] == row / nodes;
    p.inner_hard[row * batch + r] = record.hard[row];
    p.inner_soft[row * batch + r] = record.soft[row];
    const float hard = record.hard[row], pos = record.pos[row];
    if (intra)
      p.rows.vcl[e * batch + r] =
          b.families & kVcl && b.positives > 0 ? hard - pos / b.positives : 0.0f;
    p.rows.icl[row * batch + r] =
        b.families & kIcl && !intra ? hard - pos / (b.positives + 1) : 0.0f;
  }
  for (int i = threadIdx.x; i < 2 * nodes * nodes; i += kThreads) {
    const int a = i / nodes % nodes, c = i % nodes;
    const bool intra = i < nodes * nodes;
    float value = 0;
    if (graph.network[a] != graph.network[c] && row_soft(b.families, intra)) {
      const int student = graph.network[a] * nodes + (intra ? a : c);
      value = b.kl_temperature * (record.soft[student] - record.pair[i]);
    }
    float* to = intra ? p.rows.soft_vcl : p.rows.soft_icl;
    to[(a * nodes + c) * batch + r] = value;
  }
}

size_t stats_shared(const Bank& b, int tile, bool second) {
  Carver memory{nullptr, 0};
  StatsShared(memory, b, tile, second);
  return memory.used;
}

int stats_tile(const Bank& b, bool second) {
  return choose_tile(256, [&](int tile) { return stats_shared(b, tile, second); });
}

Split stats_split(const Bank& b, int tile) {
  return Split(b, tile, sizeof(float) * record_size(b.node_count, b.network_count));
}

template <bool kSecond>
cudaError_t run_stats(const Bank& b, StatsParams p, CombineParams combine, cudaStream_t stream) {
  const int tile = stats_tile(b, kSecond);
  if (tile == 0) return cudaErrorInvalidConfiguration;
  const Split split = stats_split(b, tile);
  p.bank = combine.bank = b;
  p.tile = tile, p.span = split.span, p.splits = combine.splits = split.splits;
  combine.records = p.records;
  const int64_t blocks = static_cast<int64_t>(b.batch) * split.splits;
  const size_t shared = stats_shared(b, tile, kSecond);
  if (const cudaError_t error = launch(stats_kernel<kSecond>, blocks, kThreads, shared, stream, p))
    return error;
  Carver memory{nullptr, 0};
  Graph(memory, b.node_count, b.network_count);
  if (kSecond)
    memory.take<float>(record_size(b.node_count, b.network_count));
  else
    Combined(memory, b.network_count * b.node_count);
  return launch(kSecond ? combine_tangents_kernel : combine_kernel, b.batch, kThreads, memory.used,
                stream, combine);
}

}  // namespace

size_t statistics_workspace(const Bank& b) {
  size_t bytes = 0;
  for (const bool second : {false, true}) {
    const int tile = stats_tile(b, second);
    if (tile == 0) continue;
    const size_t records = static_cast<size_t>(b.batch) * stats_split(b, tile).splits;
    bytes = std::max(bytes, records * record_size(b.node_count, b.network_count) * sizeof(float));
  }
  return bytes;
}

cudaError_t bank_mcl_forward(const Bank& b, const Rows& rows, float* lse, float* kl_lse,
                             void* workspace, cudaStream_t stream) {
  StatsParams p{};
  p.records = static_cast<float*>(workspace);
  CombineParams combine{};
  combine.rows = rows, combine.lse = lse, combine.kl_lse = kl_lse;
  return run_stats<false>(b, p, combine, stream);
}

cudaError_t tangent_statistics(const Bank& b, const void* tangents, const float* lse,
                               const float* kl_lse, const Rows& h, float* inner_hard,
                               float* inner_soft, void* workspace, cudaStream_t stream) {
  StatsParams p{};
  p.tangents = tangents, p.lse = lse, p.kl_lse = kl_lse;
  p.records = static_cast<float*>(workspace);
  CombineParams combine{};
  combine.rows = h, combine.inner_hard = inner_hard, combine.inner_soft = inner_soft;
  return run_stats<true>(b, p, combine, stream);
}

cudaError_t bank_nce_lse(const Bank& bank, float* lse, void* workspace, cudaStream_t stream) {
  Bank b = bank;
  b.families = kIcl;
  b.kl_temperature = 1;
  return bank_mcl_forward(b, Rows{}, lse, nullptr, workspace, stream);
}

}  // namespace mclfast::cuda

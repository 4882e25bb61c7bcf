// Rows and gradient in one kernel, for cotangents known in advance. A team of blocks owns one
// anchor at a time and keeps its scores in shared memory; partial statistics are exchanged through
// global memory. The second read of the bank rows, for the gradient, comes from the L2 cache: as
// many teams run as have their rows fit in half of it.
#include "bank_grad.cuh"
#include "bank_rows.cuh"
#include "bank_tile.cuh"
#include "launch.cuh"
#include "launch_plan.h"

namespace mclfast::cuda {
namespace {

struct FusedParams {
  Bank bank;
  Cotangents g;
  Rows rows;
  float *lse, *kl_lse;  // [M, N, B]
  void* grad;           // [N, B, D]
  unsigned* arrived;    // [teams], zero at the start
  float* records;       // [teams, 2, record_size, team]
  float* partial;       // [teams, 2, team, N, D]
  int teams, team, tile;
};

struct FusedShared {
  Graph graph;
  Coefficients coefficients;
  Combined combined;
  float *nodes, *record, *z, *p, *sums;
  int* keys;
  int padded, stride;

  __host__ __device__ FusedShared(Carver& memory, const Bank& b, int tile)
      : graph(memory, b.node_count, b.network_count),
        coefficients(memory, b.node_count, b.network_count),
        combined(memory, b.network_count * b.node_count), padded((b.width + 3) / 4 * 4),
        stride(score_stride(tile)) {
    const size_t scores = static_cast<size_t>(b.network_count) * b.node_count * stride;
    nodes = memory.take<float>(b.node_count * padded);
    record = memory.take<float>(record_size(b.node_count, b.network_count));
    keys = memory.take<int>(tile);
    z = memory.take<float>(scores);
    p = memory.take<float>(scores);
    // The sums of the end take the place of the scores.
    const size_t needed =
        static_cast<size_t>(Ownership(b.node_count, b.width).tiles) * kNodeTile * kChunk;
    sums = z;
    if (needed > 2 * scores) memory.take<float>(needed - 2 * scores);
  }
};

// All blocks of a team have come `steps` times. Their writes from before are visible after.
__device__ __forceinline__ void team_barrier(unsigned* arrived, unsigned steps, unsigned team) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    while (*static_cast<volatile unsigned*>(arrived) < steps * team) __nanosleep(20);
    __threadfence();
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads, 2) fused_kernel(const __grid_constant__ FusedParams p) {
  const Bank& b = p.bank;
  Carver memory{dynamic_shared(), 0};
  const FusedShared s(memory, b, p.tile);
  const int team = blockIdx.x / p.team, rank = blockIdx.x % p.team, warp = threadIdx.x / 32;
  const int nodes = b.node_count, rows = b.network_count * nodes;
  const int size = record_size(nodes, b.network_count), all = 1 + b.positives + b.negatives;
  const int begin = rank * p.tile, count = max(0, min(p.tile, all - begin));
  const int groups = (count + kGroup - 1) / kGroup;
  const float scale = 1.0f / b.temperature;
  const GlobalRows source(b, s.keys);
  load_graph(b, s.graph);

  for (int step = 0, r = team;; ++step, r += p.teams) {
    // Two sets of exchange buffers: a fast block may be one step ahead of a slow one.
    const int set = team * 2 + step % 2;
    float* records = p.records + static_cast<int64_t>(set) * p.team * size;
    if (r < b.batch) {
      load_nodes(b, b.nodes, r, s.nodes, s.padded);
      load_cotangents(b, s.graph, p.g, r, s.coefficients);
      clear_record(s.record, rows, size);
      for (int k = threadIdx.x; k < groups * kGroup; k += kThreads)
        s.keys[k] = static_cast<int>(*key_address(b, r, min(begin + k, all - 1)));
      __syncthreads();
      for (int unit = warp; unit < b.network_count * groups; unit += kWarps) {
        const int m = unit / groups, first = s.graph.first[m], last = s.graph.last[m];
        if (first >= last) continue;
        score_group(source, s.nodes, s.padded, b.width, scale, m, unit % groups, first, last,
                    s.z + m * nodes * s.stride, s.stride);
      }
      __syncthreads();
      for (int row = warp; row < rows; row += kWarps)
        forward_row(b, s.graph, s.z, s.stride, s.p + row * s.stride, begin, count, row / nodes,
                    row % nodes, Record(s.record, rows));
      __syncthreads();
      write_record(s.record, size, records, p.team, rank);
    }
    team_barrier(p.arrived + team, step + 1, p.team);
    if (step > 0) {
      // The gradient of the anchor before: one warp of the team per entry.
      const int entries = nodes * b.width;
      const float* partial = p.partial + static_cast<int64_t>(set ^ 1) * p.team * entries;
      for (int i = rank * kWarps + warp; i < entries; i += p.team * kWarps) {
        float total = 0;
        for (int part = threadIdx.x % 32; part < p.team; part += 32)
          total += __ldcg(partial + static_cast<int64_t>(part) * entries + i);
        total = warp_sum(total);
        const int64_t n = i / b.width, d = i % b.width;
        if (threadIdx.x % 32 == 0)
          store_element(p.grad, (n * b.batch + r - p.teams) * b.width + d, b.node_type,
                        total * scale);
      }
    }
    if (r >= b.batch) break;

    const Parts parts{records, p.team};
    combine_statistics(b, s.graph, parts, s.combined);
    write_rows(b, s.graph, r, parts, s.combined, p.rows, p.lse, p.kl_lse, rank * kWarps + warp,
               p.team * kWarps);
    for (int row = threadIdx.x; row < rows; row += kThreads) {
      s.coefficients.lse[row] = s.combined.lse[row];
      s.coefficients.kl_lse[row] = s.combined.kl_lse[row];
    }
    __syncthreads();
    for (int row = warp; row < rows; row += kWarps)
      soft_probabilities(b, s.graph, s.coefficients, s.z, s.stride, count, row / nodes, row % nodes,
                         s.p);
    __syncthreads();
    for (int row = warp; row < rows; row += kWarps)
      logit_gradients(b, s.graph, s.coefficients, s.p, s.stride, begin, count, groups * kGroup,
                      row / nodes, row % nodes, s.z);
    __syncthreads();
    GradientSum sum;
    sum.clear();
    sum.add(source, s.z, s.stride, nodes * s.stride, s.graph, b, 0, groups);
    sum.store(s.sums, p.partial + (static_cast<int64_t>(set) * p.team + rank) * nodes * b.width, nodes, b.width, 0);
  }
}

struct FusedPlan {
  int teams = 0, team = 0, tile = 0;  // 0: does not fit
  size_t shared = 0;

  explicit FusedPlan(const Bank& b) {
    const int parts = Ownership::total(b.node_count, b.width);
    if (b.batch == 0 || parts > Ownership(b.node_count, b.width).tiles) return;
    int device = 0, processors = 0, cache = 0, cooperative = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return;
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device);
    cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
    if (!cooperative) return;
    const int64_t row_bytes = static_cast<int64_t>(b.width) * element_size(b.bank_type);
    const int64_t anchor_bytes = std::max<int64_t>(columns(b) * b.network_count * row_bytes, 1);
    for (int per_processor = 2; per_processor >= 1; --per_processor) {
      const int resident = processors * per_processor;
      const int64_t most = std::min(b.batch, resident);
      const int concurrent = static_cast<int>(std::clamp<int64_t>(cache / 2 / anchor_bytes, 1, most));
      // Fewer than 32 keys for a block are not worth the exchange.
      const int blocks = std::min(resident / concurrent, (columns(b) + 31) / 32);
      const int keys = ((columns(b) + blocks - 1) / blocks + kGroup - 1) / kGroup * kGroup;
      Carver memory{nullptr, 0};
      FusedShared(memory, b, keys);
      int fitting = 0;
      if (memory.used > shared_limit() || allow_shared(fused_kernel, memory.used) != cudaSuccess ||
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fitting, fused_kernel, kThreads,
                                                        memory.used) != cudaSuccess ||
          fitting < per_processor)
        continue;
      team = (columns(b) + keys - 1) / keys;
      teams = concurrent;
      tile = keys;
      shared = memory.used;
      return;
    }
  }
};

}  // namespace

size_t fused_workspace(const Bank& b) {
  const FusedPlan plan(b);
  const size_t floats = record_size(b.node_count, b.network_count) + b.node_count * b.width;
  return sizeof(float) * (plan.teams + 4 + 2 * floats * plan.teams * plan.team);
}

cudaError_t launch_fused(const Bank& b, const Cotangents& g, const Rows& rows, float* lse,
                         float* kl_lse, void* grad_nodes, void* workspace, cudaStream_t stream) {
  const FusedPlan plan(b);
  if (plan.team == 0) return cudaErrorNotSupported;
  Carver memory{static_cast<char*>(workspace), 0};
  FusedParams p{};
  p.bank = b, p.g = g, p.rows = rows, p.lse = lse, p.kl_lse = kl_lse, p.grad = grad_nodes;
  p.teams = plan.teams, p.team = plan.team, p.tile = plan.tile;
  const size_t blocks = static_cast<size_t>(plan.teams) * plan.team;
  // First, for its alignment.
  p.partial = memory.take<float>(2 * blocks * b.node_count * b.width);
  p.arrived = memory.take<unsigned>(plan.teams);
  p.records = memory.take<float>(2 * blocks * record_size(b.node_count, b.network_count));
  if (const cudaError_t error =
          cudaMemsetAsync(p.arrived, 0, plan.teams * sizeof(unsigned), stream))
    return error;
  void* arguments[] = {&p};
  return cudaLaunchCooperativeKernel(fused_kernel, dim3(static_cast<unsigned>(blocks)),
                                     dim3(kThreads), arguments, plan.shared, stream);
}

}  // namespace mclfast::cuda

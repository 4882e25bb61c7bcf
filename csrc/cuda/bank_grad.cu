// Gradients from known statistics. Tiles of bank rows come to shared memory by asynchronous copies,
// one tile ahead; both products read them there, so each row is read once from where it lies.
#include <cuda_pipeline_primitives.h>

#include "../families.h"
#include "bank_grad.cuh"
#include "bank_rows.cuh"
#include "bank_tile.cuh"
#include "launch.cuh"
#include "launch_plan.h"

namespace mclfast::cuda {
namespace {

enum class Mode { kBackward, kDouble, kNce, kNceDouble };

__host__ __device__ constexpr bool has_tangents(Mode mode) {
  return mode == Mode::kDouble || mode == Mode::kNceDouble;
}

struct GradParams {
  Bank bank;
  const void* tangents;                    // [N, B, D]
  Cotangents g;
  const float *lse, *kl_lse;               // [M, N, B]
  const float *inner_hard, *inner_soft;    // [M, N, B], double backward
  const float* log_normalizer;             // [M, M]
  float eps;
  float* partial;                          // [B, splits, N, D]
  float* partial_rows;                     // [B, splits, M, N], NCE
  int tile, span, splits, stages, passes;
};

struct GradShared {
  Graph graph;
  Coefficients coefficients;
  float *nodes, *z, *p, *sums;
  float *inner_hard, *inner_soft, *soft;  // [M, N], double backward
  float* rows;                            // [M, N], NCE
  char* banks;
  int64_t* keys;  // two tiles of them
  int padded, stride, row_bytes, stage_bytes;

  __host__ __device__ GradShared(Carver& memory, const Bank& b, int tile, int stages, Mode mode)
      : graph(memory, b.node_count, b.network_count),
        coefficients(memory, b.node_count, b.network_count), padded((b.width + 3) / 4 * 4),
        stride(score_stride(tile)), row_bytes((b.width * element_size(b.bank_type) + 15) / 16 * 16),
        stage_bytes(b.network_count * tile * row_bytes) {
    const int row_count = b.network_count * b.node_count, copies = has_tangents(mode) ? 2 : 1;
    const bool probabilities = mode == Mode::kBackward && b.families & (kSoftVcl | kSoftIcl);
    nodes = memory.take<float>(copies * b.node_count * padded);
    z = memory.take<float>(copies * row_count * stride);
    p = memory.take<float>(probabilities ? row_count * stride : 0);
    inner_hard = memory.take<float>(mode == Mode::kDouble ? row_count : 0);
    inner_soft = memory.take<float>(mode == Mode::kDouble ? row_count : 0);
    soft = memory.take<float>(mode == Mode::kDouble ? row_count : 0);
    rows = memory.take<float>(mode == Mode::kNce ? row_count : 0);
    keys = memory.take<int64_t>(2 * tile);
    banks = memory.take<char>(stages * stage_bytes);
    // The sums of the end take the place of the banks.
    const size_t needed =
        sizeof(float) * Ownership(b.node_count, b.width).tiles * kNodeTile * kChunk;
    const size_t had = static_cast<size_t>(stages) * stage_bytes;
    sums = reinterpret_cast<float*>(banks);
    if (needed > had) memory.take<char>(needed - had);
  }
};

// Starts the copies of one tile of `count` keys. One warp per row.
__device__ __forceinline__ void fetch_tile(const Bank& b, const Graph& graph,
                                           const int64_t* keys, int count, int tile, char* to, int row_bytes) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int size = element_size(b.bank_type), bytes = b.width * size;
  const char* banks = static_cast<const char*>(b.banks);
  const bool vector = bytes % 16 == 0 && reinterpret_cast<uintptr_t>(banks) % 16 == 0;
#pragma unroll 4
  for (int i = warp; i < b.network_count * count; i += kWarps) {
    const int m = i / count, k = i % count;
    if (graph.first[m] >= graph.last[m]) continue;
    const char* from = banks + (m * b.samples + keys[k]) * bytes;
    char* row = to + (m * tile + k) * row_bytes;
    if (vector) {
      for (int at = 16 * lane; at < bytes; at += 512)
        __pipeline_memcpy_async(row + at, from + at, 16);
    } else if (size == 4) {
      for (int at = 4 * lane; at < bytes; at += 128)
        __pipeline_memcpy_async(row + at, from + at, 4);
    } else {
      // Two bytes are fewer than an asynchronous copy takes.
      for (int d = lane; d < b.width; d += 32)
        reinterpret_cast<unsigned short*>(row)[d] =
            reinterpret_cast<const unsigned short*>(from)[d];
    }
  }
}

// Starts the copies of the keys of `count` columns of anchor r.
__device__ __forceinline__ void fetch_keys(const Bank& b, int r, int begin, int count,
                                           int64_t* to) {
  for (int i = threadIdx.x; i < count; i += kThreads)
    __pipeline_memcpy_async(to + i, key_address(b, r, begin + i), sizeof(int64_t));
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// log sigmoid(x), for any x.
__device__ __forceinline__ float log_sigmoid(float x) {
  return fminf(x, 0.0f) - log1pf(expf(-fabsf(x)));
}

// Sum of the cotangents of the soft terms whose student is row (m, e); NaN where the student or a
// teacher is not finite, because 0 times its weights is NaN too.
__device__ __forceinline__ float soft_weight(const Bank& b, const Graph& graph,
                                             const Coefficients& c, int m, int e) {
  float sum = 0;
  for (int s = 0; s < b.node_count; ++s) {
    const int teacher = partner(graph, b.node_count, m, e, s);
    if (teacher < 0) continue;
    sum += student_weight(c, b.node_count, graph.network[e] == m, e, s);
    sum += 0.0f * (c.kl_lse[m * b.node_count + e] + c.kl_lse[teacher]);
  }
  return sum / b.kl_temperature;  // the weights carry it
}

// Derivative of the logit gradients of row (m, e) along the tangents, into z.
__device__ __forceinline__ void second_logit_gradients(const Bank& b, const GradShared& s,
                                                       int stacked, int begin, int count,
                                                       int padded, int m, int e) {
  const int row = m * b.node_count + e;
  const float hard = s.coefficients.hard[row], soft = s.soft[row];
  const bool intra = s.graph.network[e] == m, active = row_active(b.families, intra);
  const float inverse = 1.0f / b.kl_temperature;
  float* z = s.z + (m * stacked + e) * s.stride;
  const float* y = z + b.node_count * s.stride;
  for (int k = threadIdx.x & 31; k < padded; k += 32) {
    float hz = 0;
    if (active && k < count && !(intra && begin + k == 0)) {
      hz = hard * expf(z[k] - s.coefficients.lse[row]) * (y[k] - s.inner_hard[row]);
      if (soft != 0)
        hz += soft * expf(z[k] * inverse - s.coefficients.kl_lse[row]) *
              (y[k] - s.inner_soft[row]);
    }
    z[k] = hz;
  }
}

// Noise-contrastive estimation: logit gradients (or their derivative) of bank m, anchor e, into z;
// returns this lane's share of the row.
template <bool kSecond>
__device__ __forceinline__ float nce_logit_gradients(const Bank& b, const GradShared& s, int begin,
                                                     int count, int padded, int m, int e,
                                                     float log_normalizer, float eps) {
  const int stacked = kSecond ? 2 * b.node_count : b.node_count;
  const float c = static_cast<float>(b.negatives) / static_cast<float>(b.samples);
  const float log_shifted = logf(c + eps), log_ratio = logf(c) - log_shifted;
  const float weight = 1.0f / b.batch;
  float* z = s.z + (m * stacked + e) * s.stride;
  const float* y = z + b.node_count * s.stride;
  float share = 0;
  for (int k = threadIdx.x & 31; k < padded; k += 32) {
    float gz = 0;
    if (m != e && k < count) {
      const float x = z[k] - log_normalizer - log_shifted;
      const bool positive = begin + k == 0;
      if (kSecond)
        gz = weight * sigmoid(x) * sigmoid(-x) * y[k];
      else if (positive)
        gz = -weight * sigmoid(-x);
      else
        gz = weight * sigmoid(x);
      if (!kSecond) share -= positive ? log_sigmoid(x) : log_ratio + log_sigmoid(-x);
    }
    z[k] = gz;
  }
  return share;
}

template <Mode kMode>
__global__ void __launch_bounds__(kThreads, 2) grad_kernel(const __grid_constant__ GradParams p) {
  const Bank& b = p.bank;
  Carver memory{dynamic_shared(), 0};
  const GradShared s(memory, b, p.tile, p.stages, kMode);
  const int pass = blockIdx.x % p.passes, block = blockIdx.x / p.passes;
  const int r = block / p.splits, warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int nodes = b.node_count, rows = b.network_count * nodes;
  const int stacked = has_tangents(kMode) ? 2 * nodes : nodes;
  const int begin = block % p.splits * p.span;
  const int end = min(begin + p.span, 1 + b.positives + b.negatives);
  const float scale = 1.0f / b.temperature;
  const int64_t batch = b.batch;

  load_nodes(b, b.nodes, r, s.nodes, s.padded);
  if (has_tangents(kMode)) load_nodes(b, p.tangents, r, s.nodes + nodes * s.padded, s.padded);
  for (int i = threadIdx.x; i < p.stages * s.stage_bytes / 4; i += kThreads)
    reinterpret_cast<float*>(s.banks)[i] = 0;  // the copies leave the padding and missing keys
  for (int i = threadIdx.x; i < 2 * p.tile && begin + i < end; i += kThreads)
    s.keys[i] = *key_address(b, r, begin + i);
  load_graph(b, s.graph);
  if (kMode == Mode::kBackward || kMode == Mode::kDouble) {
    load_cotangents(b, s.graph, p.g, r, s.coefficients);
    for (int row = threadIdx.x; row < rows; row += kThreads) {
      s.coefficients.lse[row] = p.lse[row * batch + r];
      s.coefficients.kl_lse[row] = p.kl_lse[row * batch + r];
      if (kMode == Mode::kDouble) {
        s.inner_hard[row] = p.inner_hard[row * batch + r];
        s.inner_soft[row] = p.inner_soft[row * batch + r];
      }
    }
  }
  if (kMode == Mode::kDouble) {
    __syncthreads();
    for (int row = threadIdx.x; row < rows; row += kThreads)
      s.soft[row] = soft_weight(b, s.graph, s.coefficients, row / nodes, row % nodes);
  }
  if (kMode == Mode::kNce)
    for (int row = threadIdx.x; row < rows; row += kThreads) s.rows[row] = 0;
  fetch_tile(b, s.graph, s.keys, min(p.tile, end - begin), p.tile, s.banks, s.row_bytes);
  __pipeline_commit();

  GradientSum sum;
  sum.clear();
  SharedRows source{s.banks, p.tile, s.row_bytes, b.width, b.bank_type};
  for (int tile = begin, index = 0; tile < end; tile += p.tile, ++index) {
    const int count = min(p.tile, end - tile), groups = (count + kGroup - 1) / kGroup;
    // While this tile is worked on, the next one comes, and the keys of the one after.
    const int next = tile + p.tile;
    const auto fetch_next = [&] {
      if (next >= end) return;
      fetch_tile(b, s.graph, s.keys + (index + 1) % 2 * p.tile, min(p.tile, end - next), p.tile,
                 s.banks + (index + 1) % p.stages * s.stage_bytes, s.row_bytes);
      fetch_keys(b, r, next + p.tile, min(p.tile, end - next - p.tile),
                 s.keys + index % 2 * p.tile);
      __pipeline_commit();
    };
    __pipeline_wait_prior(0);
    __syncthreads();
    if (p.stages == 2) fetch_next();
    source.tile = s.banks + index % p.stages * s.stage_bytes;

    for (int unit = warp; unit < b.network_count * groups; unit += kWarps) {
      const int m = unit / groups, first = s.graph.first[m], last = s.graph.last[m];
      if (first >= last) continue;
      score_group(source, s.nodes, s.padded, b.width, scale, m, unit % groups,
                  has_tangents(kMode) ? 0 : first, has_tangents(kMode) ? stacked : last,
                  s.z + m * stacked * s.stride, s.stride);
    }
    __syncthreads();
    if (kMode == Mode::kBackward && b.families & (kSoftVcl | kSoftIcl)) {
      for (int row = warp; row < rows; row += kWarps)
        soft_probabilities(b, s.graph, s.coefficients, s.z, s.stride, count, row / nodes,
                           row % nodes, s.p);
      __syncthreads();
    }
    const int filled = groups * kGroup;
    for (int row = warp; row < rows; row += kWarps) {
      const int m = row / nodes, e = row % nodes;
      if (kMode == Mode::kBackward) {
        logit_gradients(b, s.graph, s.coefficients, s.p, s.stride, tile, count, filled, m, e, s.z);
      } else if (kMode == Mode::kDouble) {
        second_logit_gradients(b, s, stacked, tile, count, filled, m, e);
      } else {
        const float normalizer = p.log_normalizer[row];
        float share = nce_logit_gradients<kMode == Mode::kNceDouble>(
            b, s, tile, count, filled, m, e, normalizer, p.eps);
        if (kMode == Mode::kNce) {
          share = warp_sum(share);
          if (lane == 0) s.rows[row] += share;
        }
      }
    }
    __syncthreads();
    sum.add(source, s.z, s.stride, stacked * s.stride, s.graph, b, pass, groups);
    if (p.stages == 1) {
      __syncthreads();
      fetch_next();
    }
  }
  sum.store(s.sums, p.partial + static_cast<int64_t>(block) * nodes * b.width, nodes, b.width,
            pass);
  if (kMode == Mode::kNce && pass == 0)
    for (int row = threadIdx.x; row < rows; row += kThreads)
      p.partial_rows[static_cast<int64_t>(block) * rows + row] = s.rows[row];
}

struct SumParams {
  const float* partial;  // [B, splits, N, D]
  void* out;             // [N, B, D]
  int batch, splits, nodes, width, type;
  float scale;
};

__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ SumParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t size = static_cast<int64_t>(p.nodes) * p.width;
  if (i >= size * p.batch) return;
  const int64_t r = i / size, at = i % size;
  float sum = 0;
  for (int split = 0; split < p.splits; ++split)
    sum += p.partial[(r * p.splits + split) * size + at];
  const int64_t n = at / p.width, d = at % p.width;
  store_element(p.out, (n * p.batch + r) * p.width + d, p.type, sum * p.scale);
}

cudaError_t sum_partial(const float* partial, void* out, int batch, int splits, int nodes,
                        int width, int type, float scale, cudaStream_t stream) {
  const int64_t total = static_cast<int64_t>(batch) * nodes * width;
  return launch(sum_kernel, (total + kThreads - 1) / kThreads, kThreads, 0, stream,
                SumParams{partial, out, batch, splits, nodes, width, type, scale});
}

struct GradPlan {
  int tile = 0, stages = 0, passes;
  size_t shared = 0;

  GradPlan(const Bank& b, Mode mode) {
    const auto bytes = [&](int columns, int stage_count) {
      Carver memory{nullptr, 0};
      GradShared(memory, b, columns, stage_count, mode);
      return memory.used;
    };
    for (stages = 2; stages >= 1; --stages) {
      tile = choose_tile(64, [&](int columns) { return bytes(columns, stages); });
      if (tile != 0) break;
    }
    if (tile != 0) shared = bytes(tile, stages);
    const int parts = Ownership::total(b.node_count, b.width);
    const int tiles = Ownership(b.node_count, b.width).tiles;
    passes = (parts + tiles - 1) / tiles;
  }
};

int64_t partial_floats(const Bank& b) {
  return static_cast<int64_t>(b.node_count) * (b.width + b.network_count);
}

Split grad_split(const Bank& b, int tile) {
  return Split(b, tile, sizeof(float) * partial_floats(b));
}

template <Mode kMode>
cudaError_t run_grad(const Bank& b, GradParams p, void* grad, float* nce_rows, void* workspace,
                     cudaStream_t stream) {
  const GradPlan plan(b, kMode);
  if (plan.tile == 0) return cudaErrorInvalidConfiguration;
  const Split split = grad_split(b, plan.tile);
  const int64_t blocks = static_cast<int64_t>(b.batch) * split.splits;
  const int rows = b.network_count * b.node_count;
  p.bank = b;
  p.tile = plan.tile, p.stages = plan.stages, p.passes = plan.passes;
  p.span = split.span, p.splits = split.splits;
  p.partial = static_cast<float*>(workspace);
  p.partial_rows = p.partial + blocks * b.node_count * b.width;
  if (const cudaError_t error =
          launch(grad_kernel<kMode>, blocks * plan.passes, kThreads, plan.shared, stream, p))
    return error;
  if (kMode == Mode::kNce)
    if (const cudaError_t error = sum_partial(p.partial_rows, nce_rows, b.batch, split.splits, rows,
                                              1, kFloat32, 1.0f, stream))
      return error;
  return sum_partial(p.partial, grad, b.batch, split.splits, b.node_count, b.width, b.node_type,
                     1.0f / b.temperature, stream);
}

// The double backward keeps its inner products behind what the kernels leave.
size_t inner_bytes(const Bank& b) {
  return sizeof(float) * b.network_count * b.node_count * static_cast<size_t>(b.batch);
}

}  // namespace

size_t gradient_workspace(const Bank& b) {
  size_t bytes = 0;
  for (const Mode mode : {Mode::kBackward, Mode::kDouble, Mode::kNce, Mode::kNceDouble}) {
    const GradPlan plan(b, mode);
    if (plan.tile == 0) continue;
    const size_t blocks = static_cast<size_t>(b.batch) * grad_split(b, plan.tile).splits;
    bytes = std::max(bytes, blocks * partial_floats(b) * sizeof(float));
  }
  return bytes;
}

cudaError_t bank_workspace(const Bank& b, size_t* bytes) {
  const size_t parts =
      std::max({statistics_workspace(b), gradient_workspace(b), fused_workspace(b)});
  *bytes = (parts + 15) / 16 * 16 + 2 * inner_bytes(b);
  return cudaSuccess;
}

cudaError_t bank_mcl_backward(const Bank& b, const Cotangents& g, const float* lse,
                              const float* kl_lse, void* grad_nodes, void* workspace,
                              cudaStream_t stream) {
  GradParams p{};
  p.g = g, p.lse = lse, p.kl_lse = kl_lse;
  return run_grad<Mode::kBackward>(b, p, grad_nodes, nullptr, workspace, stream);
}

cudaError_t bank_mcl_fused(const Bank& b, const Cotangents& g, const Rows& rows, float* lse,
                           float* kl_lse, void* grad_nodes, void* workspace, cudaStream_t stream) {
  const cudaError_t fused = launch_fused(b, g, rows, lse, kl_lse, grad_nodes, workspace, stream);
  if (fused != cudaErrorNotSupported) return fused;
  if (const cudaError_t error = bank_mcl_forward(b, rows, lse, kl_lse, workspace, stream))
    return error;
  return bank_mcl_backward(b, g, lse, kl_lse, grad_nodes, workspace, stream);
}

cudaError_t bank_mcl_double_backward(const Bank& b, const void* tangents, const Cotangents& g,
                                     const float* lse, const float* kl_lse, void* h_nodes,
                                     const Rows& h, void* workspace, cudaStream_t stream) {
  size_t bytes = 0;
  if (const cudaError_t error = bank_workspace(b, &bytes)) return error;
  char* inner = static_cast<char*>(workspace) + bytes - 2 * inner_bytes(b);
  GradParams p{};
  float* inner_hard = reinterpret_cast<float*>(inner);
  float* inner_soft = reinterpret_cast<float*>(inner + inner_bytes(b));
  if (const cudaError_t error = tangent_statistics(b, tangents, lse, kl_lse, h, inner_hard,
                                                   inner_soft, workspace, stream))
    return error;
  p.tangents = tangents, p.g = g, p.lse = lse, p.kl_lse = kl_lse;
  p.inner_hard = inner_hard, p.inner_soft = inner_soft;
  return run_grad<Mode::kDouble>(b, p, h_nodes, nullptr, workspace, stream);
}

cudaError_t bank_nce_fused(const Bank& bank, const float* log_normalizer, float eps, float* rows,
                           void* grad_nodes, void* workspace, cudaStream_t stream) {
  Bank b = bank;
  b.families = kIcl;  // every bank with the nodes of the other networks
  GradParams p{};
  p.log_normalizer = log_normalizer, p.eps = eps;
  return run_grad<Mode::kNce>(b, p, grad_nodes, rows, workspace, stream);
}

cudaError_t bank_nce_double_backward(const Bank& bank, const void* tangents,
                                     const float* log_normalizer, float eps, void* h_nodes,
                                     void* workspace, cudaStream_t stream) {
  Bank b = bank;
  b.families = kIcl;
  GradParams p{};
  p.tangents = tangents, p.log_normalizer = log_normalizer, p.eps = eps;
  return run_grad<Mode::kNceDouble>(b, p, h_nodes, nullptr, workspace, stream);
}

}  // namespace mclfast::cuda

// Gradients of the embeddings of one anchor: warps own tiles of 8 nodes x 128 features and keep
// their sums in registers.
#pragma once

#include <cuda_runtime.h>

#include "bank_rows.cuh"
#include "bank_tile.cuh"
#include "device.cuh"
#include "launch.h"

namespace mclfast::cuda {

// Which part of the gradient a warp sums. Where there are fewer parts than warps, several warps
// share one and split the keys.
struct Ownership {
  int tiles;    // parts of one launch, a power of two up to kWarps
  int sharers;  // warps of a part

  __host__ __device__ static int total(int nodes, int width) {
    return ((nodes + kNodeTile - 1) / kNodeTile) * ((width + kChunk - 1) / kChunk);
  }
  __host__ __device__ Ownership(int nodes, int width) : tiles(1) {
    while (tiles < kWarps && tiles < total(nodes, width)) tiles *= 2;
    sharers = kWarps / tiles;
  }
};

// Place of a warp in the gradient; made anew where it is used, which costs less than the registers
// to keep it.
struct WarpPart {
  int n0, d, share, sharers;
  bool active;

  // pass: which group of Ownership::tiles parts this block works on.
  __device__ __forceinline__ WarpPart(int nodes, int width, int pass) {
    const Ownership own(nodes, width);
    const int warp = threadIdx.x / 32, part = pass * own.tiles + warp / own.sharers;
    const int chunks = (width + kChunk - 1) / kChunk;
    sharers = own.sharers;
    share = warp % sharers;
    active = part < Ownership::total(nodes, width);
    n0 = part / chunks * kNodeTile;
    d = part % chunks * kChunk + 4 * (threadIdx.x & 31);
  }
};

struct GradientSum {
  float4 acc[kNodeTile];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < kNodeTile; ++j) acc[j] = make_float4(0, 0, 0, 0);
  }

  // Bank m has rows of gz at gz + m * bank_stride; banks without a node in [first, last) are left.
  template <class RowSource>
  __device__ __forceinline__ void add(const RowSource& rows, const float* gz, int stride,
                                      int bank_stride, const Graph& graph, const Bank& b, int pass,
                                      int groups) {
    const WarpPart part(b.node_count, b.width, pass);
    if (!part.active) return;
    for (int unit = part.share; unit < b.network_count * groups; unit += part.sharers) {
      const int m = unit / groups;
      if (graph.first[m] >= graph.last[m]) continue;
      gradient_group(rows, gz + m * bank_stride, stride, m, unit % groups, part.n0, b.node_count,
                     part.d, acc);
    }
  }

  // Sums over the sharers in a fixed order and writes the parts to out [nodes, width], which
  // is 16-byte aligned where width % 4 == 0. `scratch` holds [tiles, kNodeTile, kChunk]. All threads
  // call this; it begins with a barrier, and one has to follow before `scratch` changes.
  __device__ __forceinline__ void store(float* scratch, float* out, int nodes, int width,
                                        int pass) {
    const WarpPart part(nodes, width, pass);
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    float4* sums = reinterpret_cast<float4*>(scratch) + warp / part.sharers * kNodeTile * 32 + lane;
    for (int turn = 0; turn < part.sharers; ++turn) {
      __syncthreads();
      if (part.share != turn) continue;
#pragma unroll
      for (int j = 0; j < kNodeTile; ++j) {
        float4 sum = acc[j];
        if (turn > 0) add_scaled(sum, 1.0f, sums[32 * j]);
        sums[32 * j] = sum;
      }
    }
    __syncthreads();
    if (part.active && part.share == 0) {
#pragma unroll
      for (int j = 0; j < kNodeTile; ++j) {
        if (part.n0 + j >= nodes) continue;
        const float4 sum = sums[32 * j];
        float* to = out + (part.n0 + j) * width + part.d;
        if (width % 4 == 0) {
          if (part.d < width) *reinterpret_cast<float4*>(to) = sum;
          continue;
        }
        const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (part.d + i < width) to[i] = values[i];
      }
    }
  }
};

}  // namespace mclfast::cuda

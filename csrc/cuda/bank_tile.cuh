// The two products of a tile of bank rows: scores of all nodes, and the gradient from logit
// gradients. A warp works on groups of 4 keys; each of its lanes holds 4 neighbouring features.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "device.cuh"
#include "launch.h"

namespace mclfast::cuda {

constexpr int kGroup = 4;         // keys
constexpr int kNodeTile = 8;      // nodes
constexpr int kChunk = 4 * 32;    // features of a warp

// Where the data-set number of column k of anchor r stands.
__device__ __forceinline__ const int64_t* key_address(const Bank& b, int r, int k) {
  return k <= b.positives ? b.pos_idx + r * b.pos_stride + k
                          : b.neg_idx + r * b.neg_stride + (k - 1 - b.positives);
}

// Stride of rows of `keys` scores: 16-byte aligned, and 8 nodes x 4 keys hit 32 different banks.
__host__ __device__ constexpr int score_stride(int keys) { return (keys + 31) / 32 * 32 + 4; }

// Bank rows read where they lie.
struct GlobalRows {
  const char* banks;
  const int* keys;  // of the tile
  int64_t samples;
  int width, type;
  bool aligned;  // rows allow vector loads

  __device__ GlobalRows(const Bank& b, const int* tile_keys)
      : banks(static_cast<const char*>(b.banks)), keys(tile_keys), samples(b.samples),
        width(b.width), type(b.bank_type) {
    const unsigned vector = 4 * element_size(type);
    aligned = width % 4 == 0 && reinterpret_cast<uintptr_t>(banks) % vector == 0;
  }

  // Features d..d+3 of the keys of group g in bank m; zeros beyond the width.
  __device__ __forceinline__ void load(float4 (&x)[kGroup], int m, int g, int d) const {
    if (d >= width) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) x[i] = make_float4(0, 0, 0, 0);
      return;
    }
    int64_t at[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      at[i] = (m * samples + keys[g * kGroup + i]) * width + d;
    if (!aligned) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        x[i] = make_float4(element(at[i], d), element(at[i] + 1, d + 1),
                           element(at[i] + 2, d + 2), element(at[i] + 3, d + 3));
    } else if (type == kFloat32) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        x[i] = __ldg(reinterpret_cast<const float4*>(banks + 4 * at[i]));
    } else {
      uint2 bits[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        bits[i] = __ldg(reinterpret_cast<const uint2*>(banks + 2 * at[i]));
#pragma unroll
      for (int i = 0; i < kGroup; ++i) x[i] = unpack(bits[i], type);
    }
  }

  __device__ __forceinline__ float element(int64_t at, int d) const {
    return d < width ? load_element(banks, at, type) : 0.0f;
  }
};

// Bank rows copied to shared memory: [M, tile_keys] rows of row_bytes, padded with zeros.
struct SharedRows {
  const char* tile;
  int tile_keys, row_bytes, width, type;

  __device__ __forceinline__ void load(float4 (&x)[kGroup], int m, int g, int d) const {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const char* row = tile + (m * tile_keys + g * kGroup + i) * row_bytes;
      if (d >= width)
        x[i] = make_float4(0, 0, 0, 0);
      else if (type == kFloat32)
        x[i] = *reinterpret_cast<const float4*>(row + 4 * d);
      else
        x[i] = unpack(*reinterpret_cast<const uint2*>(row + 2 * d), type);
    }
  }
};

// One step of transposed_sum; a template because the array must be indexed by constants.
template <int kHalf>
__device__ __forceinline__ void fold(float (&v)[32], int lane) {
  const bool upper = lane & kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float keep = upper ? v[i + kHalf] : v[i];
    const float send = upper ? v[i] : v[i + kHalf];
    v[i] = keep + __shfl_xor_sync(kAllLanes, send, kHalf);
  }
}

// Sums each of 32 values over the warp; lane i gets the sum of value i. Every step halves the
// values a lane holds: 31 shuffles in place of 160.
__device__ __forceinline__ float transposed_sum(float (&v)[32], int lane) {
  fold<16>(v, lane);
  fold<8>(v, lane);
  fold<4>(v, lane);
  fold<2>(v, lane);
  fold<1>(v, lane);
  return v[0];
}

// Scores of group g against nodes [first, last) of `nodes` [.., padded], into z [.., stride].
template <class RowSource>
__device__ __forceinline__ void score_group(const RowSource& rows, const float* nodes, int padded,
                                            int width, float scale, int m, int g, int first,
                                            int last, float* z, int stride) {
  const int lane = threadIdx.x & 31;
  float4 x[kGroup];
  for (int n0 = first; n0 < last; n0 += kNodeTile) {
    float sums[kNodeTile * kGroup];
#pragma unroll
    for (int i = 0; i < kNodeTile * kGroup; ++i) sums[i] = 0;
    for (int c = 0; c < width; c += kChunk) {
      const int d = c + 4 * lane;
      // A single chunk stays in registers for all nodes.
      if (n0 == first || width > kChunk) rows.load(x, m, g, d);
#pragma unroll
      for (int j = 0; j < kNodeTile; ++j) {
        if (n0 + j >= last || d >= width) continue;
        const float4 e = *reinterpret_cast<const float4*>(nodes + (n0 + j) * padded + d);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          float& sum = sums[j * kGroup + i];
          sum = fmaf(x[i].x, e.x, sum);
          sum = fmaf(x[i].y, e.y, sum);
          sum = fmaf(x[i].z, e.z, sum);
          sum = fmaf(x[i].w, e.w, sum);
        }
      }
    }
    const float sum = transposed_sum(sums, lane);
    const int n = n0 + lane / kGroup;
    if (n < last) z[n * stride + g * kGroup + lane % kGroup] = sum * scale;
  }
}

__device__ __forceinline__ void add_scaled(float4& sum, float w, const float4& x) {
  sum.x = fmaf(w, x.x, sum.x);
  sum.y = fmaf(w, x.y, sum.y);
  sum.z = fmaf(w, x.z, sum.z);
  sum.w = fmaf(w, x.w, sum.w);
}

// acc[j] += sum over the keys of group g of gz[n0 + j][key] times features d..d+3 of its row.
template <class RowSource>
__device__ __forceinline__ void gradient_group(const RowSource& rows, const float* gz, int stride,
                                               int m, int g, int n0, int last, int d,
                                               float4 (&acc)[kNodeTile]) {
  float4 x[kGroup];
  rows.load(x, m, g, d);
#pragma unroll
  for (int j = 0; j < kNodeTile; ++j) {
    if (n0 + j >= last) continue;
    const float4 w = *reinterpret_cast<const float4*>(gz + (n0 + j) * stride + g * kGroup);
    add_scaled(acc[j], w.x, x[0]);
    add_scaled(acc[j], w.y, x[1]);
    add_scaled(acc[j], w.z, x[2]);
    add_scaled(acc[j], w.w, x[3]);
  }
}

// Nodes of anchor r as float32, [node_count, padded], zeros beyond the width. No barrier.
__device__ __forceinline__ void load_nodes(const Bank& b, const void* nodes, int r, float* out,
                                           int padded) {
  for (int i = threadIdx.x; i < b.node_count * padded; i += kThreads) {
    const int n = i / padded, d = i % padded;
    const int64_t at = (static_cast<int64_t>(n) * b.batch + r) * b.width + d;
    out[i] = d < b.width ? load_element(nodes, at, b.node_type) : 0.0f;
  }
}

}  // namespace mclfast::cuda

// How the columns of an anchor are cut into tiles and spread over blocks. Host code only. Nothing
// but the fused kernel depends on the device: results of the others are the same on all.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "launch.h"

namespace mclfast::cuda {

// Enough blocks for several rounds on the largest devices; more only adds partial results.
#ifndef MCLFAST_WANTED_BLOCKS  // tests set it: a small problem would never fill a block twice
#define MCLFAST_WANTED_BLOCKS 2048
#endif
constexpr int64_t kWantedBlocks = MCLFAST_WANTED_BLOCKS;
constexpr int64_t kPartialBytes = 64 << 20;
constexpr size_t kPreferredShared = 100 * 1024;  // two blocks per multiprocessor

inline int columns(const Bank& b) { return 1 + b.positives + b.negatives; }
inline int padded_width(const Bank& b) { return (b.width + 3) / 4 * 4; }

struct Split {
  int tile;    // columns that a block has in shared memory at a time, a multiple of 4
  int span;    // columns of a block, a multiple of tile
  int splits;  // blocks per anchor

  // partial: bytes that each block leaves behind.
  Split(const Bank& b, int tile_columns, int64_t partial) : tile(tile_columns) {
    const int64_t tiles = (columns(b) + tile - 1) / tile;
    const int64_t batch = std::max(b.batch, 1);
    int64_t wanted = std::min((kWantedBlocks + batch - 1) / batch, kPartialBytes / (batch * partial));
    wanted = std::clamp<int64_t>(wanted, 1, tiles);
    const int64_t per_block = (tiles + wanted - 1) / wanted;
    span = static_cast<int>(per_block * tile);
    splits = static_cast<int>((tiles + per_block - 1) / per_block);
  }
};

inline size_t shared_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 48 * 1024;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
      cudaSuccess)
    return 48 * 1024;
  return static_cast<size_t>(bytes);
}

// The widest of the tiles that leaves room for two blocks; else the widest that fits at all; 0:
// none does. `bytes` maps a tile to its shared memory.
template <class Bytes>
int choose_tile(int widest, Bytes bytes) {
  const size_t most = shared_limit();
  for (const size_t limit : {std::min(kPreferredShared, most), most})
    for (int tile = widest; tile >= 4; tile /= 2)
      if (bytes(tile) <= limit) return tile;
  return 0;
}

// Workspace that the parts of an operator need, see bank_workspace.
size_t statistics_workspace(const Bank& bank);
size_t gradient_workspace(const Bank& bank);
size_t fused_workspace(const Bank& bank);

// Row inner products of the double backward, and the gradients of the cotangents.
// inner_hard = <q, y>, inner_soft = <p, y>, [M, N, B] each.
cudaError_t tangent_statistics(const Bank& bank, const void* tangents, const float* lse,
                               const float* kl_lse, const Rows& h, float* inner_hard,
                               float* inner_soft, void* workspace, cudaStream_t stream);

// cudaErrorNotSupported, and nothing done, where the kernel cannot run the problem on this device.
cudaError_t launch_fused(const Bank& bank, const Cotangents& g, const Rows& rows, float* lse,
                         float* kl_lse, void* grad_nodes, void* workspace, cudaStream_t stream);

}  // namespace mclfast::cuda

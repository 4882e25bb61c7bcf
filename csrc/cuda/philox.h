// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3, SC 2011).
// Plain C++; a CUDA compiler gets the device qualifiers.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MCLFAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MCLFAST_HOST_DEVICE inline
#endif

namespace mclfast {

struct PhiloxBlock {
  uint32_t w[4];
};

MCLFAST_HOST_DEVICE PhiloxBlock philox(PhiloxBlock c, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c.w[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * c.w[2];
    c = {{static_cast<uint32_t>(b >> 32) ^ c.w[1] ^ key0, static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ c.w[3] ^ key1, static_cast<uint32_t>(a)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace mclfast

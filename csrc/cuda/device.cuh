// Device functions shared by the kernels: warp sums, conversions, dynamic shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launch.h"

namespace mclfast::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ char* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ uint4 dynamic_shared_memory[];
  return reinterpret_cast<char*>(dynamic_shared_memory);
#else
  return emulation::dynamic_shared();
#endif
}

// Cuts a block of memory into aligned arrays. From a null base it only counts, so that the host
// computes the size with the code that the device lays the arrays out with.
struct Carver {
  char* base;
  size_t used;

  template <class T>
  __host__ __device__ T* take(size_t count) {
    T* out = reinterpret_cast<T*>(base + used);
    used += (count * sizeof(T) + 15) / 16 * 16;
    return out;
  }
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int h = 16; h > 0; h >>= 1) x += __shfl_xor_sync(kAllLanes, x, h);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int h = 16; h > 0; h >>= 1) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, h));
  return x;
}

__host__ __device__ constexpr int element_size(int type) { return type == kFloat32 ? 4 : 2; }

__device__ __forceinline__ float half_bits(unsigned bits, int type) {
  return type == kBFloat16 ? __uint_as_float(bits << 16)
                           : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ __forceinline__ float load_element(const void* data, int64_t i, int type) {
  if (type == kFloat32) return static_cast<const float*>(data)[i];
  return half_bits(static_cast<const unsigned short*>(data)[i], type);
}

__device__ __forceinline__ void store_element(void* data, int64_t i, int type, float x) {
  if (type == kFloat32)
    static_cast<float*>(data)[i] = x;
  else if (type == kBFloat16)
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(x);
  else
    static_cast<__half*>(data)[i] = __float2half_rn(x);
}

// Four 16-bit numbers from the bits of a pair of words.
__device__ __forceinline__ float4 unpack(uint2 bits, int type) {
  return make_float4(half_bits(bits.x & 0xffffu, type), half_bits(bits.x >> 16, type),
                     half_bits(bits.y & 0xffffu, type), half_bits(bits.y >> 16, type));
}

}  // namespace mclfast::cuda

// Stands in for the headers of the CUDA toolkit so that a C++ compiler builds the kernels of
// csrc/cuda and runs them on the CPU: threads of a block are fibers, see emulation.cpp. Only what
// those kernels use is here. Takes the place of the real header by the order of include folders.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
};
using cudaStream_t = void*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrL2CacheSize,
  cudaDevAttrCooperativeLaunch,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Of the fiber that runs.
extern dim3 threadIdx, blockIdx;

namespace emulation {

struct Device {
  int processors = 2, cache = 1 << 20, cooperative = 1, shared = 227 * 1024;
};
extern Device device;

char* dynamic_shared();
void block_barrier();
void warp_barrier();
void yield();
// Slot of a lane of the running fiber's warp, for exchanges between lanes.
uint64_t& lane_slot(int lane);
int lane();
void copy_async(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_copies(size_t groups_left);

void allow_shared(const void* kernel, size_t bytes);
int blocks_per_processor(size_t shared);
cudaError_t run(const void* kernel, const std::function<void()>& body, dim3 grid, dim3 block,
                size_t shared, bool cooperative);

template <class T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= 8);
  std::memcpy(&lane_slot(lane()), &value, sizeof(T));
  warp_barrier();
  T out;
  std::memcpy(&out, &lane_slot(from), sizeof(T));
  warp_barrier();
  return out;
}

}  // namespace emulation

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp() { emulation::warp_barrier(); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) { emulation::yield(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(value, emulation::lane() ^ mask);
}
inline int __any_sync(unsigned, bool predicate) {
  int any = predicate;
  for (int h = 16; h > 0; h >>= 1) any |= __shfl_xor_sync(0xffffffffu, any, h);
  return any;
}

inline unsigned atomicAdd(unsigned* at, unsigned value) {
  const unsigned old = *at;
  *at += value;
  return old;
}
template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
using std::max;
using std::min;

inline cudaError_t cudaGetDevice(int* id) {
  *id = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const emulation::Device& d = emulation::device;
  const int values[] = {d.processors, d.cache, d.cooperative, d.shared};
  *value = values[attribute];
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}
template <class P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P), cudaFuncAttribute, int bytes) {
  if (bytes > emulation::device.shared) return cudaErrorInvalidValue;
  emulation::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
  return cudaSuccess;
}
template <class P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P), int,
                                                          size_t shared) {
  *blocks = emulation::blocks_per_processor(shared);
  return cudaSuccess;
}
template <class P>
cudaError_t cudaLaunchKernel(void (*kernel)(P), dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
  const P params = *static_cast<P*>(arguments[0]);
  return emulation::run(reinterpret_cast<const void*>(kernel), [&] { kernel(params); }, grid, block,
                        shared, false);
}
template <class P>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(P), dim3 grid, dim3 block, void** arguments,
                                        size_t shared, cudaStream_t) {
  const P params = *static_cast<P*>(arguments[0]);
  return emulation::run(reinterpret_cast<const void*>(kernel), [&] { kernel(params); }, grid, block,
                        shared, true);
}

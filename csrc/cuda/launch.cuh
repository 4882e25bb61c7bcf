// Launches of kernels that take one struct by value.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

namespace mclfast::cuda {

// A block may use more than 48 KiB of dynamic shared memory only after being allowed to.
template <class P>
cudaError_t allow_shared(void (*kernel)(P), size_t shared) {
  if (shared <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared));
}

template <class P>
cudaError_t launch(void (*kernel)(P), int64_t blocks, int threads, size_t shared,
                   cudaStream_t stream, P params) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (const cudaError_t error = allow_shared(kernel, shared)) return error;
  void* arguments[] = {&params};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), arguments,
                          shared, stream);
}

}  // namespace mclfast::cuda

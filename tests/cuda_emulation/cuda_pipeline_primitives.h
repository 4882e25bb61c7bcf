// Copies happen when they are waited for, not when they start: a missing wait shows.
#pragma once
#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  emulation::copy_async(to, from, bytes);
}
inline void __pipeline_commit() { emulation::commit_copies(); }
inline void __pipeline_wait_prior(size_t groups) { emulation::wait_copies(groups); }

// Threads and memory that the kernels take from torch, and the choice of the instruction set.
#include "runtime.h"

#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include <ATen/Parallel.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>

namespace mclfast::cpu {

void* allocate(size_t bytes) { return c10::alloc_cpu(bytes); }

void release(void* data) noexcept { c10::free_cpu(data); }

int64_t worker_count() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

void run_workers(int64_t count, void (*task)(void* context, int64_t worker), void* context) {
#ifdef __SANITIZE_THREAD__
  // ThreadSanitizer does not see how the threads of OpenMP wait for each other.
  std::vector<std::thread> threads;
  for (int64_t worker = 1; worker < count; ++worker) threads.emplace_back(task, context, worker);
  if (count > 0) task(context, 0);
  for (std::thread& thread : threads) thread.join();
#else
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) task(context, worker);
  });
#endif
}

namespace {

bool supported(const char* name) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (std::strcmp(name, "avx2") == 0)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (std::strcmp(name, "avx512") == 0)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return std::strcmp(name, "default") == 0;
}

const Kernels* choose() {
  const Kernels* const all[] = {kernels_avx512(), kernels_avx2(), kernels_default()};
  const char* wanted = std::getenv("MCLFAST_CPU_CAPABILITY");
  for (const Kernels* set : all) {
    if (!set || !supported(set->name)) continue;
    if (!wanted || std::strcmp(wanted, set->name) == 0) return set;
  }
  TORCH_CHECK(false, "MCLFAST_CPU_CAPABILITY must be default, avx2 or avx512 and supported by "
                     "this processor, got ", wanted);
}

} // namespace

const Kernels& kernels() {
  static const Kernels& chosen = *choose();
  return chosen;
}

} // namespace mclfast::cpu

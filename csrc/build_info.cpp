#include "build_info.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/version.h>

namespace mclfast {
namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("gcc ") + __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

// Without -fopenmp torch's header turns at::parallel_for into a plain loop, so this is a fact
// of this build and not of torch.
std::string parallel() {
#if AT_PARALLEL_OPENMP && defined(_OPENMP)
  return "OpenMP";
#elif AT_PARALLEL_NATIVE
  return "native";
#else
  return "serial";
#endif
}

std::vector<std::string> simd() {
  std::vector<std::string> names;
#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
  if (__builtin_cpu_supports("avx2")) names.emplace_back("avx2");
  if (__builtin_cpu_supports("fma")) names.emplace_back("fma");
  if (__builtin_cpu_supports("avx512f")) names.emplace_back("avx512f");
  if (__builtin_cpu_supports("avx512dq")) names.emplace_back("avx512dq");
  if (__builtin_cpu_supports("avx512bw")) names.emplace_back("avx512bw");
  if (__builtin_cpu_supports("avx512vl")) names.emplace_back("avx512vl");
#elif defined(__aarch64__)
  names.emplace_back("neon");
#endif
  return names;
}

}  // namespace

BuildInfo build_info() {
  BuildInfo info;
  info.compiler = compiler();
#if defined(_MSVC_LANG)
  info.cxx_standard = _MSVC_LANG;
#else
  info.cxx_standard = __cplusplus;
#endif
  info.torch = TORCH_VERSION;
  info.parallel = parallel();
  info.threads = at::get_num_threads();
  info.cpu_capability = at::get_cpu_capability();
  info.simd = simd();
#ifdef NDEBUG
  info.build_type = "release";
#else
  info.build_type = "debug";
#endif
#ifdef MCLFAST_WITH_CUDA
  info.with_cuda = true;
#else
  info.with_cuda = false;
#endif
  return info;
}

}  // namespace mclfast

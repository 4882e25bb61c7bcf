// Compiler, flags and versions of the extension, for bug reports.
#pragma once

#include <string>
#include <vector>

namespace mclfast {

struct BuildInfo {
  std::string compiler;         // name and version
  long cxx_standard;            // 202002 for C++20
  std::string torch;            // torch version of the headers, without local suffix
  std::string parallel;         // what at::parallel_for runs on: "OpenMP", "native", "serial"
  int threads;                  // at::get_num_threads() at the time of the call
  std::string cpu_capability;   // instruction set that torch's own kernels use
  std::vector<std::string> simd;  // instruction sets of this CPU that kernels here may use
  std::string build_type;       // "release" or "debug"
  bool with_cuda;
};

BuildInfo build_info();

}  // namespace mclfast

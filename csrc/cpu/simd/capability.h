// The beginning of every header that is compiled once per instruction set.
//
// Before they include such a header, the files dispatch/kernels_*.cpp define
//   MCLFAST_CAPABILITY     the namespace, so that the linker cannot merge functions of two sets,
//   MCLFAST_VECTOR_BYTES   the width of a vector,
// and they include all other headers, outside of the region compiled for the instruction set.
#pragma once

#include <cstdint>

// Undefined only where a header is opened alone, by an editor or by tests/ops/test_csrc_headers.py.
#ifndef MCLFAST_CAPABILITY
#define MCLFAST_CAPABILITY baseline
#define MCLFAST_VECTOR_BYTES 16
#endif

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define INLINE_LAMBDA __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace mclfast::cpu::MCLFAST_CAPABILITY {

// Own functions, because those of <algorithm> would be compiled for this instruction set.
constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return max_of(low, min_of(x, high));
}
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

} // namespace mclfast::cpu::MCLFAST_CAPABILITY

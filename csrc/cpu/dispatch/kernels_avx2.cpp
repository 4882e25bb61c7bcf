// The target region below covers the headers of the kernels and nothing else. Whatever else they
// include is included here, before it: inline functions that other files share must not be compiled
// for this instruction set. The region spares the build system flags for single files.
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "../../families.h"
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define MCLFAST_CAPABILITY avx2
#define MCLFAST_VECTOR_BYTES 32
#include "kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace mclfast::cpu {

const Kernels* kernels_avx2() {
  static const Kernels kernels{"avx2", avx2::mcl_rows<float>, avx2::mcl_rows<double>,
                               avx2::info_nce<float>, avx2::info_nce<double>,
                               avx2::bank_rows<float>, avx2::bank_rows<double>,
                               avx2::bank_nce<float>, avx2::bank_nce<double>,
                               avx2::bank_update<float>, avx2::bank_update<double>,
                               avx2::sample_contrast,
                               avx2::dual_batch_norm<float>, avx2::dual_batch_norm<double>,
                               avx2::dual_batch_norm_backward<float>,
                               avx2::dual_batch_norm_backward<double>};
  return &kernels;
}

} // namespace mclfast::cpu

#else

namespace mclfast::cpu {

const Kernels* kernels_avx2() { return nullptr; }

} // namespace mclfast::cpu

#endif

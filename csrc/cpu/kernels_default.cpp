#include <cmath>

#include "kernels.h"

#define MCLFAST_CAPABILITY baseline
#define MCLFAST_VECTOR_BYTES 16
#include "kernels_impl.h"

namespace mclfast::cpu {

const Kernels* kernels_default() {
  static const Kernels kernels{"default", baseline::mcl_rows<float>, baseline::mcl_rows<double>,
                               baseline::info_nce<float>, baseline::info_nce<double>};
  return &kernels;
}

} // namespace mclfast::cpu

#include "kernels.h"

#define MCLFAST_CAPABILITY baseline
#define MCLFAST_VECTOR_BYTES 16
#include "kernels_impl.h"

namespace mclfast::cpu {

const Kernels* kernels_default() {
  static const Kernels kernels{"default", baseline::mcl_rows<float>, baseline::mcl_rows<double>,
                               baseline::info_nce<float>, baseline::info_nce<double>,
                               baseline::bank_rows<float>, baseline::bank_rows<double>,
                               baseline::bank_nce<float>, baseline::bank_nce<double>,
                               baseline::bank_update<float>, baseline::bank_update<double>,
                               baseline::sample_contrast,
                               baseline::dual_batch_norm<float>, baseline::dual_batch_norm<double>,
                               baseline::dual_batch_norm_backward<float>,
                               baseline::dual_batch_norm_backward<double>};
  return &kernels;
}

} // namespace mclfast::cpu

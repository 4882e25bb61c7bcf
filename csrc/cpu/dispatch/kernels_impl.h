// The kernels of one instruction set. The including file defines
//   MCLFAST_CAPABILITY     the namespace, so that the linker cannot merge two sets,
//   MCLFAST_VECTOR_BYTES   the width of a vector,
// and includes <cmath> and kernels.h first, outside of any target region.

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define INLINE_LAMBDA __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace mclfast::cpu {
namespace MCLFAST_CAPABILITY {

constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return max_of(low, min_of(x, high));
}
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

#include "../simd/vec.h"
#include "../simd/gemm.h"
#include "../simd/workspace.h"
#include "../simd/logit_row.h"
#include "../in_batch/mcl_problem.h"
#include "../in_batch/tile_pair.h"
#include "../in_batch/pair_band.h"
#include "../in_batch/intra_band.h"
#include "../in_batch/positives.h"
#include "../in_batch/mcl_schedule.h"
#include "../in_batch/info_nce.h"
#include "../banks/bank_elements.h"
#include "../banks/bank_sweep.h"
#include "../banks/bank_schedule.h"
#include "../banks/bank_nce.h"
#include "../banks/bank_update.h"
#include "../simd/philox.h"
#include "../norm/dual_batch_norm.h"

} // namespace MCLFAST_CAPABILITY
} // namespace mclfast::cpu

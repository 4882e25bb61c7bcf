#pragma once

#include "kernels.h"

namespace mclfast::cpu {

// The kernels of the widest instruction set of this processor, or of the one named by the
// environment variable MCLFAST_CPU_CAPABILITY (default, avx2, avx512), read at the first call.
const Kernels& kernels();

} // namespace mclfast::cpu

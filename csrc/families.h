// The families of rows, as bits of the `families` argument of every operator: the one definition
// for the CPU and CUDA code. Plain C++, no header of torch.
#pragma once

namespace mclfast {

enum Family : unsigned { kVcl = 1, kSoftVcl = 2, kIcl = 4, kSoftIcl = 8 };

}  // namespace mclfast

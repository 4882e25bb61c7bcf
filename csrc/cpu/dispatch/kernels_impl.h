// All kernels of one instruction set: what the table of a file kernels_*.cpp points to.
#pragma once

#include "../banks/bank_nce.h"
#include "../banks/bank_schedule.h"
#include "../banks/bank_update.h"
#include "../in_batch/info_nce.h"
#include "../in_batch/mcl_schedule.h"
#include "../norm/dual_batch_norm.h"
#include "../simd/philox.h"

// SPDX-License-Identifier: Apache-2.0
//
// The kernels for avx2. CMakeLists.txt gives this file its own instruction set flags.
#define STRAIT_LEVEL_AVX2
#define STRAIT_LEVEL level_avx2
#include "kernels/cpu/level_body.h"

namespace strait::cpu {
const LevelTable kAvx2Table = STRAIT_LEVEL_TABLE;
}  // namespace strait::cpu

// SPDX-License-Identifier: Apache-2.0
//
// The kernels for avx512. CMakeLists.txt gives this file its own instruction set flags.
#define STRAIT_LEVEL_AVX512
#define STRAIT_LEVEL level_avx512
#include "kernels/cpu/level_body.h"

namespace strait::cpu {
const LevelTable kAvx512Table = STRAIT_LEVEL_TABLE;
}  // namespace strait::cpu

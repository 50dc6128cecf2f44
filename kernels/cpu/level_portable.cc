// SPDX-License-Identifier: Apache-2.0
//
// The kernels for any machine: correct, slow, the same bits.
#define STRAIT_LEVEL level_portable
#include "kernels/cpu/level_body.h"

namespace strait::cpu {
const LevelTable kPortableTable = STRAIT_LEVEL_TABLE;
}  // namespace strait::cpu

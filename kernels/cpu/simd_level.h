// SPDX-License-Identifier: Apache-2.0
//
// SimdLevel: the instruction sets that the CPU kernels are compiled for. All give the same bits.
//
// Thread:  any.
// Errors:  ResolveSimdLevel: InvalidArgument (unknown name), FailedPrecondition (not on this CPU).
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "absl/status/statusor.h"

namespace strait::cpu {

enum class SimdLevel : uint8_t { kPortable, kAvx2, kAvx512 };

// "portable", "avx2", "avx512".
std::string_view SimdLevelName(SimdLevel level);

// True if this build and this CPU (with its operating system) can run the level.
bool SimdLevelAvailable(SimdLevel level);

// The level to use: forced, else the one named by STRAIT_SIMD, else the widest available.
absl::StatusOr<SimdLevel> ResolveSimdLevel(std::optional<SimdLevel> forced);

}  // namespace strait::cpu

// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/simd_level.h"

#include <cstdlib>
#include <string>

#include "absl/status/status.h"

namespace strait::cpu {
namespace {

constexpr SimdLevel kLevels[] = {SimdLevel::kPortable, SimdLevel::kAvx2, SimdLevel::kAvx512};

absl::Status NotAvailable(SimdLevel level, const char* asked_by) {
  return absl::FailedPreconditionError(std::string("SIMD level '") +
                                       std::string(SimdLevelName(level)) + "' (" + asked_by +
                                       ") is not available on this CPU; use 'portable' or leave "
                                       "it unset to get the widest available");
}

}  // namespace

std::string_view SimdLevelName(SimdLevel level) {
  switch (level) {
    case SimdLevel::kPortable:
      return "portable";
    case SimdLevel::kAvx2:
      return "avx2";
    case SimdLevel::kAvx512:
      return "avx512";
  }
  return "unknown";
}

bool SimdLevelAvailable(SimdLevel level) {
  switch (level) {
    case SimdLevel::kPortable:
      return true;
#if defined(STRAIT_X86)
    // The compiler's run-time checks include what the operating system saves (xgetbv).
    case SimdLevel::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case SimdLevel::kAvx512:
      return SimdLevelAvailable(SimdLevel::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
#else
    case SimdLevel::kAvx2:
    case SimdLevel::kAvx512:
      return false;
#endif
  }
  return false;
}

absl::StatusOr<SimdLevel> ResolveSimdLevel(std::optional<SimdLevel> forced) {
  if (forced) {
    if (!SimdLevelAvailable(*forced)) return NotAvailable(*forced, "asked for by the program");
    return *forced;
  }
  if (const char* name = std::getenv("STRAIT_SIMD"); name != nullptr && *name != '\0') {
    for (SimdLevel level : kLevels) {
      if (SimdLevelName(level) != name) continue;
      if (!SimdLevelAvailable(level)) return NotAvailable(level, "STRAIT_SIMD");
      return level;
    }
    return absl::InvalidArgumentError(std::string("STRAIT_SIMD='") + name +
                                      "' is not a SIMD level; use portable, avx2 or avx512");
  }
  SimdLevel widest = SimdLevel::kPortable;
  for (SimdLevel level : kLevels) {
    if (SimdLevelAvailable(level)) widest = level;
  }
  return widest;
}

}  // namespace strait::cpu

// SPDX-License-Identifier: Apache-2.0
//
// STRAIT_CHECK ends the process when we got something wrong; what the world gets wrong is a
// Status.
//
// Thread:  any.
// Why:     abseil's CHECK came after the version that Debian 12 ships. This header needs only the
//          standard library, so every folder, kernels included, may use it.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace strait::internal {
[[noreturn]] inline void CheckFailed(const char* file, int line, const char* condition,
                                     const char* message) {
  std::fprintf(stderr, "%s:%d: check failed: %s%s%s\n", file, line, condition, *message ? ": " : "",
               message);
  std::fflush(stderr);
  std::abort();
}
}  // namespace strait::internal

// STRAIT_CHECK(condition) or STRAIT_CHECK(condition, "what it means").
#define STRAIT_CHECK(condition, ...)                                                   \
  do {                                                                                 \
    if (!(condition)) [[unlikely]]                                                     \
      ::strait::internal::CheckFailed(__FILE__, __LINE__, #condition, "" __VA_ARGS__); \
  } while (false)

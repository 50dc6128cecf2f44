// SPDX-License-Identifier: Apache-2.0
//
// Early return on an error status.
//   STRAIT_RETURN_IF_ERROR(expression of absl::Status);
//   STRAIT_ASSIGN_OR_RETURN(auto x, expression of absl::StatusOr<T>);
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define STRAIT_CONCAT_INNER(a, b) a##b
#define STRAIT_CONCAT(a, b) STRAIT_CONCAT_INNER(a, b)

#define STRAIT_RETURN_IF_ERROR(expr)                                \
  do {                                                              \
    if (absl::Status strait_status = (expr); !strait_status.ok()) { \
      return strait_status;                                         \
    }                                                               \
  } while (false)

#define STRAIT_ASSIGN_OR_RETURN(lhs, expr) \
  STRAIT_ASSIGN_OR_RETURN_IMPL(STRAIT_CONCAT(strait_or_, __LINE__), lhs, expr)
#define STRAIT_ASSIGN_OR_RETURN_IMPL(tmp, lhs, expr) \
  auto tmp = (expr);                                 \
  if (!tmp.ok()) return tmp.status();                \
  lhs = std::move(tmp).value()

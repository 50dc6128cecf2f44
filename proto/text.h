// SPDX-License-Identifier: Apache-2.0
//
// std::string_view to abseil's and back: Debian 12's abseil has a string_view of its own.
#pragma once

#include <string_view>

#include "absl/strings/string_view.h"

namespace strait {

inline absl::string_view ToAbsl(std::string_view s) { return {s.data(), s.size()}; }
inline std::string_view ToStd(absl::string_view s) { return {s.data(), s.size()}; }

}  // namespace strait

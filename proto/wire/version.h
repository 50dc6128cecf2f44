// SPDX-License-Identifier: Apache-2.0
//
// Versions that two processes compare before they trust each other.
#pragma once

#include <cstdint>

namespace strait {

// Raised whenever a .proto changes its meaning. Exchanged in Hello; ends must be equal.
inline constexpr uint32_t kWireVersion = 11;

inline constexpr char kVersion[] = "0.1.0";

}  // namespace strait

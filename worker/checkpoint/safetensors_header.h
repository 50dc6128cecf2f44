// SPDX-License-Identifier: Apache-2.0
//
// Parses the JSON header of a safetensors file: {"name": {"dtype", "shape", "data_offsets"}, …}.
//
// Thread:  pure function.
// Errors:  InvalidArgument names `path`, the byte of the header and what was expected;
//          ResourceExhausted for what is over a limit.
// Limits:  limits::kMaxTensorsPerFile, kMaxTensorRank, kMaxTensorNameBytes.
// Why:     streaming, because a tree of a header with 100,000 tensors costs time and memory, and
//          because a tree forgets duplicate keys, which must be refused.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace strait {

struct HeaderEntry {
  std::string name;
  std::string dtype;
  std::vector<uint64_t> shape;
  uint64_t begin = 0;  // from the end of the header
  uint64_t end = 0;
};

// Names may repeat and numbers may be absurd: only the form is checked here.
absl::StatusOr<std::vector<HeaderEntry>> ParseSafetensorsHeader(std::string_view json,
                                                                const std::string& path);

}  // namespace strait

// SPDX-License-Identifier: Apache-2.0
//
// UTF-8: one step at a time, validation, and repair.
//
// Thread:  any; pure functions.
// Why:     Repair follows Unicode's "maximal subpart" rule, as Hugging Face's decoder does, so
//          that text repaired piece by piece equals text repaired whole.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace strait {

struct Utf8Step {
  enum class Kind {
    kCharacter,   // a whole character of `length` bytes
    kIncomplete,  // all `length` bytes are the start of a character that more bytes could complete
    kInvalid,     // the first `length` bytes can never become a character
  };
  Kind kind;
  uint8_t length;
  char32_t code_point;  // of kCharacter
};

// REQUIRES: bytes is not empty.
Utf8Step NextUtf8(std::string_view bytes);

void AppendUtf8(char32_t code_point, std::string* out);

// Byte offset of the first byte that is not part of valid UTF-8.
std::optional<size_t> FindInvalidUtf8(std::string_view bytes);

// Text from any bytes: each maximal broken part becomes one U+FFFD.
std::string Utf8Lossy(std::string_view bytes);

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";

}  // namespace strait

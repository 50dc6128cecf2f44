// SPDX-License-Identifier: Apache-2.0
//
// std::string_view to abseil's and back (Debian 12's abseil has a string_view of its own), and text
// of unknown origin made fit for a terminal, a log and a protobuf string.
//
// Thread:  pure functions.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "absl/strings/string_view.h"

namespace strait {

inline absl::string_view ToAbsl(std::string_view s) { return {s.data(), s.size()}; }
inline std::string_view ToStd(absl::string_view s) { return {s.data(), s.size()}; }

// Bytes of the printable UTF-8 character that `text` begins with; 0: it is empty, or begins with a
// control character or with what is no UTF-8.
size_t PrintableBytes(std::string_view text);

// `text` as one line: control characters and what is no UTF-8 as \n, \t, \r or \xNN, byte by byte;
// cut between characters to at most `bytes_max` (at least 3), then with "…" for its end.
std::string PrintableText(std::string_view text, size_t bytes_max);

}  // namespace strait

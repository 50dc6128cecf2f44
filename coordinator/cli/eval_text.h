// SPDX-License-Identifier: Apache-2.0
//
// ReadText reads what `strait eval` scores: plain UTF-8 text, or JSON lines with a document each.
//
// Thread:  any. For .xz a child process runs until the call returns.
// Errors:  NotFound (no such file, with why), InvalidArgument (empty, not UTF-8 with the byte
//          offset, a line that is no {"text": …} with its number), DataLoss (what xz refuses),
//          ResourceExhausted (over kMaxTextBytes), Unavailable (`xz` is not installed).
// Limits:  kMaxTextBytes, after decompression.
// Why:     `xz -dc` is run rather than liblzma linked: one optional file form is not worth a build
//          dependency of every binary, the program is part of any Debian that can build this one,
//          and a damaged file then breaks a child and not us.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace strait::cli {

inline constexpr size_t kMaxTextBytes = 512u << 20;

struct TextFile {
  std::string path;
  // JSON lines: each document stands for itself. Plain text: one document, to be cut.
  bool is_lines = false;
  std::vector<std::string> documents;
  size_t num_bytes = 0;  // of all documents
};

// By the file's name: *.jsonl and *.jsonl.xz are JSON lines, all else is plain text; a name that
// ends in .xz is decompressed.
absl::StatusOr<TextFile> ReadText(const std::string& path);

// The part of ReadText that follows the reading.
absl::StatusOr<TextFile> ParseText(const std::string& path, bool is_lines, std::string bytes);

}  // namespace strait::cli

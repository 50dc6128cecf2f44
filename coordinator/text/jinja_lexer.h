// SPDX-License-Identifier: Apache-2.0
//
// Lex cuts a template's source into text and the tokens of its tags, with white space around tags
// already taken away as trim_blocks, lstrip_blocks and the '-' and '+' marks ask.
//
// Thread:  any; a pure function.
// Errors:  InvalidArgument for what no Jinja accepts, Unimplemented for what only we do not; with
//          the line.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace strait::jinja {

struct Token {
  enum class Kind {
    kText,
    kOutputBegin,  // {{
    kOutputEnd,
    kBlockBegin,  // {%
    kBlockEnd,
    kName,
    kString,  // escapes decoded
    kInteger,
    kFloat,
    kOperator,
    kEnd,
  };
  Kind kind;
  std::string text;
  int line;
};

absl::StatusOr<std::vector<Token>> Lex(std::string_view source);

// "chat template, line 7: …"
absl::Status SyntaxError(int line, std::string_view message);
absl::Status Unsupported(int line, std::string_view construct);

}  // namespace strait::jinja

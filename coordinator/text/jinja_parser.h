// SPDX-License-Identifier: Apache-2.0
//
// ParseTemplate makes a tree of a template's source, and refuses at once whatever rendering could
// not do.
//
// Thread:  any; a pure function.
// Errors:  as ChatTemplate::Parse.
#pragma once

#include <string_view>

#include "absl/status/statusor.h"
#include "coordinator/text/jinja_ast.h"

namespace strait::jinja {

absl::StatusOr<Block> ParseTemplate(std::string_view source);

}  // namespace strait::jinja

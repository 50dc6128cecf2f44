// SPDX-License-Identifier: Apache-2.0
//
// The functions, filters, tests and methods that templates may call: each a pure function of its
// values.
//
// Thread:  any; constants.
// Errors:  InvalidArgument for values that Python refuses, ResourceExhausted for a result over the
//          limit.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/text/jinja_value.h"

namespace strait::jinja {

using Keywords = std::vector<std::pair<std::string, Value>>;

struct Builtin {
  std::string_view name;
  size_t min_values;  // the subject of a filter, test or method included
  size_t max_values;
  // Keywords in the order in which they would follow as plain values; "*" takes any keyword.
  std::vector<std::string_view> keywords;
  // `values` has max_values elements, undefined where none was given.
  absl::StatusOr<Value> (*call)(const std::vector<Value>& values, const Keywords& keywords);
};

// Null when there is none of that name.
const Builtin* FindFunction(std::string_view name);
const Builtin* FindFilter(std::string_view name);
const Builtin* FindTest(std::string_view name);
const Builtin* FindMethod(std::string_view name);

// `needle in haystack`, as the operator and the test need it.
absl::StatusOr<bool> Contains(const Value& haystack, const Value& needle);

}  // namespace strait::jinja

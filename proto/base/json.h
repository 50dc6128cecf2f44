// SPDX-License-Identifier: Apache-2.0
//
// JSON: bounded parsing, and typed getters whose errors name the key, the place and the fix.
//
// Thread:  any; values are plain data.
// Errors:  InvalidArgument (not JSON, with the byte offset; wrong type, naming the key), NotFound
//          (missing key, unreadable file), ResourceExhausted (text or nesting over its bound).
// Limits:  bytes: the caller's; nesting: kMaxJsonDepth. Of duplicate keys the last one counts.
// Why:     Boost.JSON is compiled once, in json.cc (boost/json/src.hpp); nobody else includes that
//          header.
#pragma once

#include <boost/json/array.hpp>
#include <boost/json/object.hpp>
#include <boost/json/serialize.hpp>
#include <boost/json/value.hpp>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace strait::json {

using Value = boost::json::value;
using Object = boost::json::object;
using Array = boost::json::array;

inline constexpr size_t kMaxJsonDepth = 64;

// `what` names the text in errors: "config.json", "request body".
absl::StatusOr<Value> Parse(std::string_view text, std::string_view what,
                            size_t max_depth = kMaxJsonDepth);

// The same for a file of at most `max_bytes`. Errors name the path.
absl::StatusOr<Value> ParseFile(const std::string& path, size_t max_bytes);

// The whole file as a string, refused over `max_bytes`.
absl::StatusOr<std::string> ReadFile(const std::string& path, size_t max_bytes);

// The member, or null when it is absent *or JSON null*.
const Value* Find(const Object& object, std::string_view key);

// The top-level value as an object; `what` as in Parse.
absl::StatusOr<const Object*> AsObject(const Value& value, std::string_view what);

// Required members. `what` names the enclosing thing: "config.json", "config.json: rope_scaling".
absl::StatusOr<std::string> GetString(const Object& object, std::string_view key,
                                      std::string_view what);
absl::StatusOr<int64_t> GetInt(const Object& object, std::string_view key, std::string_view what);
absl::StatusOr<double> GetDouble(const Object& object, std::string_view key, std::string_view what);
absl::StatusOr<bool> GetBool(const Object& object, std::string_view key, std::string_view what);
absl::StatusOr<const Object*> GetObject(const Object& object, std::string_view key,
                                        std::string_view what);
absl::StatusOr<const Array*> GetArray(const Object& object, std::string_view key,
                                      std::string_view what);

// The same with a default for a member that is absent or null; a wrong type is still an error.
absl::StatusOr<std::string> GetStringOr(const Object& object, std::string_view key,
                                        std::string_view fallback, std::string_view what);
absl::StatusOr<int64_t> GetIntOr(const Object& object, std::string_view key, int64_t fallback,
                                 std::string_view what);
absl::StatusOr<double> GetDoubleOr(const Object& object, std::string_view key, double fallback,
                                   std::string_view what);
absl::StatusOr<bool> GetBoolOr(const Object& object, std::string_view key, bool fallback,
                               std::string_view what);

// An integer within [low, high]; the error states the bounds.
absl::StatusOr<int64_t> GetIntIn(const Object& object, std::string_view key, int64_t low,
                                 int64_t high, std::string_view what);

// "string", "integer" …: how errors call a value's type.
std::string_view TypeName(const Value& value);

std::string_view View(const boost::json::string& s);

}  // namespace strait::json

// SPDX-License-Identifier: Apache-2.0
#include "proto/base/json.h"

#include <boost/json/parser.hpp>
#include <boost/json/src.hpp>  // the one place that compiles Boost.JSON
#include <cmath>
#include <fstream>
#include <limits>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"

namespace strait::json {
namespace {

absl::Status WrongType(const Value& value, std::string_view key, std::string_view what,
                       std::string_view wanted) {
  return absl::InvalidArgumentError(absl::StrCat(ToAbsl(what), ": \"", ToAbsl(key), "\" must be ",
                                                 ToAbsl(wanted), ", not ",
                                                 ToAbsl(TypeName(value))));
}

absl::StatusOr<const Value*> Require(const Object& object, std::string_view key,
                                     std::string_view what) {
  const Value* value = object.if_contains(boost::json::string_view(key.data(), key.size()));
  if (value == nullptr) {
    return absl::NotFoundError(absl::StrCat(ToAbsl(what), ": \"", ToAbsl(key), "\" is missing"));
  }
  return value;
}

absl::StatusOr<int64_t> ToInt(const Value& value, std::string_view key, std::string_view what) {
  if (value.is_int64()) return value.get_int64();
  // Some writers print whole numbers as 64.0; those mean the integer.
  if (value.is_double()) {
    const double d = value.get_double();
    if (std::trunc(d) == d && std::abs(d) <= 9007199254740992.0) return static_cast<int64_t>(d);
  }
  return WrongType(value, key, what, "an integer");
}

absl::StatusOr<double> ToDouble(const Value& value, std::string_view key, std::string_view what) {
  if (value.is_double()) return value.get_double();
  if (value.is_int64()) return static_cast<double>(value.get_int64());
  if (value.is_uint64()) return static_cast<double>(value.get_uint64());
  return WrongType(value, key, what, "a number");
}

}  // namespace

std::string_view View(const boost::json::string& s) { return {s.data(), s.size()}; }

std::string_view TypeName(const Value& value) {
  switch (value.kind()) {
    case boost::json::kind::null:
      return "null";
    case boost::json::kind::bool_:
      return "a boolean";
    case boost::json::kind::int64:
    case boost::json::kind::uint64:
      return "an integer";
    case boost::json::kind::double_:
      return "a number";
    case boost::json::kind::string:
      return "a string";
    case boost::json::kind::array:
      return "an array";
    case boost::json::kind::object:
      return "an object";
  }
  return "unknown";
}

absl::StatusOr<Value> Parse(std::string_view text, std::string_view what, size_t max_depth) {
  boost::json::parse_options options;
  options.max_depth = max_depth;
  boost::json::parser parser({}, options);
  boost::system::error_code error;
  const size_t consumed = parser.write_some(text.data(), text.size(), error);
  if (!error && consumed < text.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat(ToAbsl(what), ": JSON ends at byte ", consumed, " but more text follows"));
  }
  if (error == boost::json::error::too_deep) {
    return absl::ResourceExhaustedError(absl::StrCat(ToAbsl(what), ": JSON is nested deeper than ",
                                                     max_depth, " levels at byte ", consumed));
  }
  if (error == boost::json::error::incomplete) {
    return absl::InvalidArgumentError(
        absl::StrCat(ToAbsl(what), ": JSON is cut off after ", text.size(), " bytes"));
  }
  if (error) {
    return absl::InvalidArgumentError(
        absl::StrCat(ToAbsl(what), ": not valid JSON at byte ", consumed, ": ", error.message()));
  }
  return parser.release();
}

absl::StatusOr<std::string> ReadFile(const std::string& path, size_t max_bytes) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": cannot be opened"));
  file.seekg(0, std::ios::end);
  const std::streamoff size = file.tellg();
  if (size < 0) return absl::NotFoundError(absl::StrCat(path, ": cannot be read"));
  if (static_cast<uint64_t>(size) > max_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat(path, ": ", size, " bytes, more than the limit of ", max_bytes));
  }
  std::string text(static_cast<size_t>(size), '\0');
  file.seekg(0);
  if (size > 0 && !file.read(text.data(), size)) {
    return absl::NotFoundError(absl::StrCat(path, ": cannot be read"));
  }
  return text;
}

absl::StatusOr<Value> ParseFile(const std::string& path, size_t max_bytes) {
  STRAIT_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, max_bytes));
  return Parse(text, path);
}

const Value* Find(const Object& object, std::string_view key) {
  const Value* value = object.if_contains(boost::json::string_view(key.data(), key.size()));
  return value == nullptr || value->is_null() ? nullptr : value;
}

absl::StatusOr<const Object*> AsObject(const Value& value, std::string_view what) {
  if (const Object* object = value.if_object()) return object;
  return absl::InvalidArgumentError(
      absl::StrCat(ToAbsl(what), ": must be a JSON object, not ", ToAbsl(TypeName(value))));
}

absl::StatusOr<std::string> GetString(const Object& object, std::string_view key,
                                      std::string_view what) {
  STRAIT_ASSIGN_OR_RETURN(const Value* value, Require(object, key, what));
  if (!value->is_string()) return WrongType(*value, key, what, "a string");
  return std::string(View(value->get_string()));
}

absl::StatusOr<int64_t> GetInt(const Object& object, std::string_view key, std::string_view what) {
  STRAIT_ASSIGN_OR_RETURN(const Value* value, Require(object, key, what));
  return ToInt(*value, key, what);
}

absl::StatusOr<double> GetDouble(const Object& object, std::string_view key,
                                 std::string_view what) {
  STRAIT_ASSIGN_OR_RETURN(const Value* value, Require(object, key, what));
  return ToDouble(*value, key, what);
}

absl::StatusOr<bool> GetBool(const Object& object, std::string_view key, std::string_view what) {
  STRAIT_ASSIGN_OR_RETURN(const Value* value, Require(object, key, what));
  if (!value->is_bool()) return WrongType(*value, key, what, "true or false");
  return value->get_bool();
}

absl::StatusOr<const Object*> GetObject(const Object& object, std::string_view key,
                                        std::string_view what) {
  STRAIT_ASSIGN_OR_RETURN(const Value* value, Require(object, key, what));
  if (!value->is_object()) return WrongType(*value, key, what, "an object");
  return &value->get_object();
}

absl::StatusOr<const Array*> GetArray(const Object& object, std::string_view key,
                                      std::string_view what) {
  STRAIT_ASSIGN_OR_RETURN(const Value* value, Require(object, key, what));
  if (!value->is_array()) return WrongType(*value, key, what, "an array");
  return &value->get_array();
}

absl::StatusOr<std::string> GetStringOr(const Object& object, std::string_view key,
                                        std::string_view fallback, std::string_view what) {
  if (Find(object, key) == nullptr) return std::string(fallback);
  return GetString(object, key, what);
}

absl::StatusOr<int64_t> GetIntOr(const Object& object, std::string_view key, int64_t fallback,
                                 std::string_view what) {
  if (Find(object, key) == nullptr) return fallback;
  return GetInt(object, key, what);
}

absl::StatusOr<double> GetDoubleOr(const Object& object, std::string_view key, double fallback,
                                   std::string_view what) {
  if (Find(object, key) == nullptr) return fallback;
  return GetDouble(object, key, what);
}

absl::StatusOr<bool> GetBoolOr(const Object& object, std::string_view key, bool fallback,
                               std::string_view what) {
  if (Find(object, key) == nullptr) return fallback;
  return GetBool(object, key, what);
}

absl::StatusOr<int64_t> GetIntIn(const Object& object, std::string_view key, int64_t low,
                                 int64_t high, std::string_view what) {
  STRAIT_ASSIGN_OR_RETURN(const int64_t value, GetInt(object, key, what));
  if (value < low || value > high) {
    return absl::InvalidArgumentError(absl::StrCat(ToAbsl(what), ": \"", ToAbsl(key), "\" is ",
                                                   value, ", outside ", low, " to ", high));
  }
  return value;
}

}  // namespace strait::json

// SPDX-License-Identifier: Apache-2.0
//
// Fields reads the members of a request's JSON object, with their types and bounds, into C++
// values.
//
// Borrows: the object.
// Thread:  one thread at a time.
// Errors:  the first one is kept: status 400 and `param` naming the member; later reads return
//          defaults, so a parser reads everything and asks once.
// Why:     absent and null mean the same; members that nobody reads are ignored, as clients
//          expect.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "coordinator/http/api_error.h"
#include "proto/base/json.h"

namespace strait {

class Fields {
 public:
  explicit Fields(const json::Object& object) : object_(&object) {}

  // Null when absent, null or of another type.
  const json::Value* Any(std::string_view name) const { return json::Find(*object_, name); }

  bool Bool(std::string_view name, bool fallback);
  std::optional<std::string> String(std::string_view name);
  // Whole numbers; 16.0 counts as one.
  std::optional<int64_t> Int(std::string_view name, int64_t low, int64_t high);
  // A finite number from low to high; `open` leaves `low` itself out.
  float Number(std::string_view name, float fallback, double low, double high, bool open = false);
  const json::Object* Object(std::string_view name);

  // Keeps the first error.
  void Fail(std::string_view param, std::string message, std::string code = "");
  void Fail(ApiError error);
  bool ok() const { return !error_.has_value(); }
  const std::optional<ApiError>& error() const { return error_; }

 private:
  const json::Object* object_;
  std::optional<ApiError> error_;
};

// A JSON number without a fraction, in the range of int64.
std::optional<int64_t> WholeNumber(const json::Value& value);

}  // namespace strait

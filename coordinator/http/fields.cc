// SPDX-License-Identifier: Apache-2.0
#include "coordinator/http/fields.h"

#include <cmath>
#include <cstdio>

namespace strait {
namespace {

constexpr double kMaxExactInt =
    9007199254740992.0;  // 2^53: beyond it a double may have lost digits

std::string Show(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

std::string Wanted(std::string_view name, std::string_view type, const json::Value& value) {
  return "\"" + std::string(name) + "\" must be " + std::string(type) + ", not " +
         std::string(json::TypeName(value));
}

}  // namespace

std::optional<int64_t> WholeNumber(const json::Value& value) {
  if (value.is_int64()) return value.get_int64();
  if (value.is_double()) {
    const double d = value.get_double();
    if (std::trunc(d) == d && std::abs(d) <= kMaxExactInt) return static_cast<int64_t>(d);
  }
  return std::nullopt;
}

void Fields::Fail(std::string_view param, std::string message, std::string code) {
  Fail(ApiError{400, std::move(message), std::string(param), std::move(code)});
}

void Fields::Fail(ApiError error) {
  if (!error_) error_ = std::move(error);
}

bool Fields::Bool(std::string_view name, bool fallback) {
  const json::Value* value = Any(name);
  if (value == nullptr) return fallback;
  if (value->is_bool()) return value->get_bool();
  Fail(name, Wanted(name, "true or false", *value));
  return fallback;
}

std::optional<std::string> Fields::String(std::string_view name) {
  const json::Value* value = Any(name);
  if (value == nullptr) return std::nullopt;
  if (value->is_string()) return std::string(json::View(value->get_string()));
  Fail(name, Wanted(name, "a string", *value));
  return std::nullopt;
}

std::optional<int64_t> Fields::Int(std::string_view name, int64_t low, int64_t high) {
  const json::Value* value = Any(name);
  if (value == nullptr) return std::nullopt;
  const std::optional<int64_t> number = WholeNumber(*value);
  if (!number && !value->is_number()) {
    Fail(name, Wanted(name, "an integer", *value));
    return std::nullopt;
  }
  if (!number || *number < low || *number > high) {
    Fail(name, "\"" + std::string(name) + "\" must be an integer from " + std::to_string(low) +
                   " to " + std::to_string(high) +
                   (number ? ", not " + std::to_string(*number) : std::string()));
    return std::nullopt;
  }
  return number;
}

float Fields::Number(std::string_view name, float fallback, double low, double high, bool open) {
  const json::Value* value = Any(name);
  if (value == nullptr) return fallback;
  if (!value->is_number()) {
    Fail(name, Wanted(name, "a number", *value));
    return fallback;
  }
  const double number = value->to_number<double>();
  // Written so that not-a-number fails.
  if (!(open ? number > low : number >= low) || !(number <= high)) {
    Fail(name, "\"" + std::string(name) + "\" must be " + (open ? "greater than " : "at least ") +
                   Show(low) + " and at most " + Show(high) + ", not " + Show(number));
    return fallback;
  }
  return static_cast<float>(number);
}

const json::Object* Fields::Object(std::string_view name) {
  const json::Value* value = Any(name);
  if (value == nullptr) return nullptr;
  if (value->is_object()) return &value->get_object();
  Fail(name, Wanted(name, "an object", *value));
  return nullptr;
}

}  // namespace strait

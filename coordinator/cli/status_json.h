// SPDX-License-Identifier: Apache-2.0
//
// Reading GET /strait/status leniently: what a server does not tell is empty, not an error.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "proto/json.h"

namespace strait::cli {

// The objects of a list member; empty when it is none.
inline std::vector<const json::Object*> Objects(const json::Object& object, std::string_view key) {
  std::vector<const json::Object*> out;
  const json::Value* value = json::Find(object, key);
  if (!value || !value->is_array()) return out;
  for (const json::Value& element : value->get_array()) {
    if (element.is_object()) out.push_back(&element.get_object());
  }
  return out;
}

inline double Number(const json::Object& object, std::string_view key) {
  return json::GetDoubleOr(object, key, 0, "status").value_or(0);
}

inline std::string Text(const json::Object& object, std::string_view key) {
  return json::GetStringOr(object, key, "", "status").value_or("");
}

}  // namespace strait::cli

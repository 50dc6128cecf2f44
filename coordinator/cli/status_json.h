// SPDX-License-Identifier: Apache-2.0
//
// Reading GET /strait/status leniently: what a server does not tell is empty, not an error.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "proto/base/json.h"
#include "proto/base/limits.h"

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

// A count: nothing below 0.
inline uint64_t Count(const json::Object& object, std::string_view key) {
  const double value = Number(object, key);
  return value > 0 ? static_cast<uint64_t>(value) : 0;
}

inline std::string Text(const json::Object& object, std::string_view key) {
  return json::GetStringOr(object, key, "", "status").value_or("");
}

// What its worker tells of the stage that has a place in a pipeline; null when none does.
inline const json::Object* StageOfWorker(const json::Object& status, double stage_id) {
  for (const json::Object* worker : Objects(status, "workers")) {
    for (const json::Object* stage : Objects(*worker, "stages")) {
      if (Number(*stage, "stage_id") == stage_id) return stage;
    }
  }
  return nullptr;
}

// Bytes that one token takes in each layer's cache, as the stages of the first active pipeline tell
// by the size of a latent block; empty when they do not tell, or not of every layer.
inline std::vector<double> CacheBytesPerTokenByLayer(const json::Object& status) {
  for (const json::Object* pipeline : Objects(status, "pipelines")) {
    if (Text(*pipeline, "state") != "active") continue;
    std::vector<double> by_layer;
    for (const json::Object* place : Objects(*pipeline, "stages")) {
      const json::Object* stage = StageOfWorker(status, Number(*place, "stage_id"));
      if (stage == nullptr) return {};
      const double block = Number(*stage, "block_bytes");
      const double begin = Number(*stage, "layer_begin"), end = Number(*stage, "layer_end");
      if (block <= 0 || begin != static_cast<double>(by_layer.size()) || end <= begin ||
          end > limits::kMaxHiddenLayers) {
        return {};
      }
      by_layer.resize(static_cast<size_t>(end), block / limits::kBlockTokens);
    }
    return by_layer;
  }
  return {};
}

}  // namespace strait::cli

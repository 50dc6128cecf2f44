// SPDX-License-Identifier: Apache-2.0
//
// PartCache remembers which layers, embedding and head the models of a backend have, so that another
// model takes the same ones.
//
// Owns:    nothing: a part lives as long as a model that has it.
// Thread:  loader thread only; parts may be given up on any.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "proto/base/ids.h"
#include "worker/checkpoint/weights.h"

namespace strait {

// L, E, H: what a backend keeps of a layer, of the embedding, of the head.
template <class L, class E, class H>
struct ModelParts {
  std::vector<std::shared_ptr<const L>> layers;  // as WeightParts::layers; null: not had
  std::shared_ptr<const E> embedding;
  std::shared_ptr<const H> head;
};

template <class L, class E, class H>
class PartCache {
 public:
  using Parts = ModelParts<L, E, H>;

  // What is there of `needed`.
  Parts Find(const WeightParts& needed) const {
    Parts parts;
    for (const LayerIndex layer : needed.layers) {
      const auto it = layers_.find(layer);
      parts.layers.push_back(it == layers_.end() ? nullptr : it->second.lock());
    }
    if (needed.embedding) parts.embedding = embedding_.lock();
    if (needed.head) parts.head = head_.lock();
    return parts;
  }
  // What of `needed` Find did not find.
  static WeightParts Missing(const WeightParts& needed, const Parts& found) {
    WeightParts missing;
    for (size_t i = 0; i < needed.layers.size(); ++i) {
      if (found.layers[i] == nullptr) missing.layers.push_back(needed.layers[i]);
    }
    missing.embedding = needed.embedding && found.embedding == nullptr;
    missing.head = needed.head && found.head == nullptr;
    return missing;
  }
  // All of `needed`, for who comes next.
  void Remember(const WeightParts& needed, const Parts& parts) {
    for (size_t i = 0; i < needed.layers.size(); ++i) layers_[needed.layers[i]] = parts.layers[i];
    if (parts.embedding != nullptr) embedding_ = parts.embedding;
    if (parts.head != nullptr) head_ = parts.head;
  }

 private:
  std::map<LayerIndex, std::weak_ptr<const L>> layers_;
  std::weak_ptr<const E> embedding_;
  std::weak_ptr<const H> head_;
};

}  // namespace strait

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

namespace strait {

// L, E, H: what a backend keeps of a layer, of the embedding, of the head.
template <class L, class E, class H>
struct ModelParts {
  std::vector<std::shared_ptr<const L>> layers;  // null: not had
  std::shared_ptr<const E> embedding;
  std::shared_ptr<const H> head;
};

template <class L, class E, class H>
class PartCache {
 public:
  using Parts = ModelParts<L, E, H>;

  // What is there of a stage with these layers; the embedding and the head whether it needs them or not.
  Parts Find(LayerRange layers) const {
    Parts parts;
    for (LayerIndex layer = layers.begin; layer < layers.end; ++layer) {
      const auto it = layers_.find(layer);
      parts.layers.push_back(it == layers_.end() ? nullptr : it->second.lock());
    }
    parts.embedding = embedding_.lock();
    parts.head = head_.lock();
    return parts;
  }
  // All parts of a stage with these layers, for who comes next.
  void Remember(LayerRange layers, const Parts& parts) {
    for (LayerIndex layer = layers.begin; layer < layers.end; ++layer) {
      layers_[layer] = parts.layers[layer - layers.begin];
    }
    if (parts.embedding != nullptr) embedding_ = parts.embedding;
    if (parts.head != nullptr) head_ = parts.head;
  }

 private:
  std::map<LayerIndex, std::weak_ptr<const L>> layers_;
  std::weak_ptr<const E> embedding_;
  std::weak_ptr<const H> head_;
};

}  // namespace strait

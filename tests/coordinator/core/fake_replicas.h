// SPDX-License-Identifier: Apache-2.0
//
// FakeReplicas is what a test's worker has in host memory of other workers' prefix blocks.
//
// Thread:  the test's.
// Why:     it counts on its own, so that books which forget a copy, or have one too many, are found.
#pragma once

#include <cstdint>
#include <deque>
#include <set>
#include <utility>

#include "proto/base/ids.h"
#include "proto/model/content_key.h"
#include "strait/v1/cluster.pb.h"

namespace strait {

struct FakeReplicas {
  std::set<std::pair<ContentKey, LayerIndex>> blocks;
  std::deque<v1::Replicate> asked;  // not answered
  uint64_t secret = 0;              // that who asks for them shows
  std::set<uint64_t> secrets;       // that it ever knew, on other streams

  bool Has(const ContentKey& key, LayerRange layers) const {
    for (LayerIndex layer = layers.begin; layer < layers.end; ++layer) {
      if (!blocks.contains({key, layer})) return false;
    }
    return true;
  }
  void Forget(const v1::Replicate& told) {
    const auto keys = ParseContentKeys(told.forget());
    if (!keys.ok()) return;
    for (const ContentKey& key : *keys) {
      for (LayerIndex layer = told.layer_begin(); layer < told.layer_end(); ++layer) {
        blocks.erase({key, layer});
      }
    }
  }
};

}  // namespace strait

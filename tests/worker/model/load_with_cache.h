// SPDX-License-Identifier: Apache-2.0
//
// Loads a stage as a worker does: first the cache that it may hold, then the weights.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <utility>

#include "proto/base/status_macros.h"
#include "worker/backend.h"

namespace strait {

inline absl::StatusOr<std::unique_ptr<StageModel>> LoadWithCache(
    Backend* backend, const StageSpec& spec,
    std::function<void(uint64_t, uint64_t)> progress = [](uint64_t, uint64_t) {}) {
  CacheMemory& cache = backend->cache();
  const uint32_t before = cache.num_blocks();
  STRAIT_RETURN_IF_ERROR(cache.Resize(before + spec.pool_blocks, {}));
  auto model = backend->Load(spec, std::move(progress));
  if (!model.ok()) {
    EXPECT_TRUE(cache.Resize(before, {}).ok());
  }
  return model;
}

}  // namespace strait

// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/departed.h"

#include <utility>

#include "proto/base/check.h"

namespace strait {

void DepartedStages::Add(uint64_t stage_id, DepartedStage stage) {
  stages_[stage_id] = std::move(stage);
  if (stages_.size() > kMaxDepartedStages) stages_.erase(stages_.begin());
}

const DepartedStage* DepartedStages::Find(uint64_t stage_id) const {
  const auto it = stages_.find(stage_id);
  return it == stages_.end() ? nullptr : &it->second;
}

DepartedStage DepartedStages::Take(uint64_t stage_id) {
  auto node = stages_.extract(stage_id);
  STRAIT_CHECK(!node.empty());
  return std::move(node.mapped());
}

}  // namespace strait

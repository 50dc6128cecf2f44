// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cuda/graph_ledger.h"

#include <algorithm>

#include "proto/base/check.h"

namespace strait {

std::vector<int32_t> GraphLedger::Add(int32_t rows, uint64_t bytes) {
  STRAIT_CHECK(!graphs_.contains(rows));
  std::vector<int32_t> leave;
  while (!graphs_.empty() && (bytes_ + bytes > max_bytes_ || graphs_.size() >= kMaxGraphs)) {
    const auto oldest = std::min_element(
        graphs_.begin(), graphs_.end(),
        [](const auto& a, const auto& b) { return a.second.used < b.second.used; });
    leave.push_back(oldest->first);
    bytes_ -= oldest->second.bytes;
    graphs_.erase(oldest);
  }
  graphs_[rows] = {bytes, ++uses_};
  bytes_ += bytes;
  return leave;
}

void GraphLedger::Used(int32_t rows) {
  const auto it = graphs_.find(rows);
  STRAIT_CHECK(it != graphs_.end());
  it->second.used = ++uses_;
}

}  // namespace strait

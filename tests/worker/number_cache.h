// SPDX-License-Identifier: Apache-2.0
//
// NumberCache is the CacheMemory of models whose rows are one number each. What was never written, and
// what a block had before its memory came back, is noise.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "worker/cache/cache_memory.h"

namespace strait {

class NumberCache final : public CacheMemory {
 public:
  // `take`: asked for `blocks` more, or given back so many where negative; may refuse.
  using Take = std::function<absl::Status(int64_t blocks)>;
  explicit NumberCache(Take take = {}) : take_(std::move(take)) {}

  absl::Status Resize(uint32_t num_blocks, absl::Span<const BlockMove> moves) override {
    const int64_t more = int64_t{num_blocks} - int64_t{this->num_blocks()};
    if (take_) {
      if (absl::Status taken = take_(more); !taken.ok()) return taken;
    }
    STRAIT_CHECK(more <= 0 || moves.empty());
    STRAIT_CHECK(idle() || more >= 0, "a cache became smaller while a step was begun");
    for (const BlockMove& move : moves) {
      STRAIT_CHECK(move.to < num_blocks && move.from >= num_blocks);
      for (uint32_t r = 0; r < limits::kBlockTokens; ++r) {
        rows_[size_t{move.to} * limits::kBlockTokens + r] =
            rows_[size_t{move.from} * limits::kBlockTokens + r];
      }
    }
    const size_t before = rows_.size();
    rows_.resize(size_t{num_blocks} * limits::kBlockTokens);
    for (size_t i = before; i < rows_.size(); ++i) rows_[i] = (i + 1) * 0x9E3779B97F4A7C15u;
    return absl::OkStatus();
  }
  uint32_t num_blocks() const override {
    return static_cast<uint32_t>(rows_.size() / limits::kBlockTokens);
  }

  // By block and row.
  uint64_t& Row(BlockId block, uint32_t row) {
    STRAIT_CHECK(block < num_blocks(), "a block beyond the cache");
    return rows_[size_t{block} * limits::kBlockTokens + row];
  }
  uint64_t Peek(BlockId block, uint32_t row) const {
    return rows_.at(size_t{block} * limits::kBlockTokens + row);
  }
  uint64_t& RowAt(uint64_t index) { return rows_.at(index); }

  // What its models do with steps.
  void StepBegun() { ++num_begun_; }
  void StepFinished() { --num_begun_; }
  bool idle() const { return num_begun_ == 0; }

 private:
  const Take take_;
  std::vector<uint64_t> rows_;  // [blocks, kBlockTokens]
  int num_begun_ = 0;
};

}  // namespace strait

// SPDX-License-Identifier: Apache-2.0
//
// What the tests of prefix blocks share: a small cluster whose workers object to what an honest one would refuse,
// and whose caches hold a number of blocks that is told.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "tests/coordinator/core/harness.h"

namespace strait {

// One layer has 1,000 bytes, embedding and head 500, a workspace 50, a block of all layers 512.
constexpr uint64_t Memory(uint64_t blocks) { return 5050 + blocks * 512; }

inline CoreOptions PrefixOptions(uint32_t num_stages) {
  CoreOptions options;
  options.prefix_cache = true;
  options.num_stages = num_stages;
  options.max_step_tokens = 256;
  options.prefill_chunk = 256;
  return options;
}

// `stem`: which tokens it has.
inline RequestSpec Prompt(uint32_t stem, uint32_t tokens, uint32_t max_tokens = 2) {
  RequestSpec request = OneSequence(tokens, max_tokens);
  for (TokenId& token : request.sequences[0].prompt) token = (token + 7 * stem) % 100;
  return request;
}

class PrefixFixture : public testing::Test {
 protected:
  void Start(CoreOptions options, std::vector<uint64_t> memory) {
    h_ = std::make_unique<Harness>(options, SmallModel());
    for (const uint64_t bytes : memory) w_.push_back(h_->Attach(bytes));
    ASSERT_TRUE(h_->core.Ready());
  }
  void TearDown() override {
    ASSERT_NE(h_, nullptr);
    EXPECT_THAT(h_->problems, testing::IsEmpty());
    for (const auto& [id, worker] : h_->workers) EXPECT_FALSE(worker.evicted) << worker.why;
  }

  std::unique_ptr<Harness> h_;
  std::vector<WorkerId> w_;
};

}  // namespace strait

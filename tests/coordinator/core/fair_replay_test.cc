// SPDX-License-Identifier: Apache-2.0
//
// Defends: in which order prompts and replays are computed. Who has little left goes first, so that after a death short
// sequences do not wait for long ones; the oldest has its share of every step, so that it never waits for many short ones.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

using testing::IsEmpty;

constexpr uint64_t kMemory = 100'000;
constexpr uint32_t kStep = 64;

CoreOptions Options() {
  CoreOptions options;
  options.num_stages = 1;
  options.max_step_tokens = kStep;
  options.prefill_chunk = kStep;
  return options;
}

uint32_t RowsOf(const v1::StepPlan& plan, uint64_t sequence) {
  for (const v1::SequenceStep& step : plan.sequences()) {
    if (step.sequence_id() == sequence) return std::max(1, step.literals().ids_size());
  }
  return 0;
}
uint32_t RowsOf(const v1::StepPlan& plan) {
  uint32_t rows = 0;
  for (const v1::SequenceStep& step : plan.sequences())
    rows += std::max(1, step.literals().ids_size());
  return rows;
}

// The bug: ten streams of a few tokens stood still until two of 8,000, which were older, had been computed again.
TEST(FairReplayTest, ShortOnesDoNotWaitForLongOnes) {
  Harness h(Options(), SmallModel());
  WorkerId worker = h.Attach(kMemory);
  const auto until_all_have_tokens = [&] {
    for (int i = 0; i < 200; ++i) {
      bool all = true;
      for (uint64_t id = 1; id <= h.last_request; ++id)
        all = all && !h.tokens[RequestId{id}].empty();
      if (all) return;
      h.Report(worker);
    }
    FAIL() << "no tokens";
  };
  for (int i = 0; i < 2; ++i) h.Submit(OneSequence(800, 200));
  until_all_have_tokens();
  for (int i = 0; i < 10; ++i) h.Submit(OneSequence(30, 200));
  until_all_have_tokens();
  h.Lose(worker);
  worker = h.Attach(kMemory);
  std::map<uint64_t, size_t> before;
  for (uint64_t id = 1; id <= 12; ++id) before[id] = h.tokens[RequestId{id}].size();
  const auto resumed = [&](uint64_t id) { return h.tokens[RequestId{id}].size() > before[id]; };
  int steps = 0;
  for (; steps < 100 && !resumed(2); ++steps) {
    const v1::StepPlan& plan = h.StageOf(worker).plans.front();
    const uint64_t oldest = resumed(1) ? 2 : 1;
    // A share of what decoding leaves, of either long one.
    if (!resumed(oldest) && RowsOf(plan, oldest) > 1) {
      EXPECT_GE(RowsOf(plan, oldest) * 4, kStep - 12);
    }
    EXPECT_LE(RowsOf(plan), kStep);
    h.Report(worker);
    if (!resumed(1) && !resumed(2)) continue;
    for (uint64_t id = 3; id <= 12; ++id) EXPECT_TRUE(resumed(id)) << id;
  }
  EXPECT_LT(steps, 60) << "1,600 rows beside ten that decode";
  h.Run();
  for (uint64_t id = 1; id <= 12; ++id) EXPECT_EQ(h.tokens[RequestId{id}].size(), 200u);
  EXPECT_THAT(h.problems, IsEmpty());
}

TEST(FairReplayTest, AFloodOfShortOnesLeavesTheOldestItsShare) {
  Harness h(Options(), SmallModel());
  const WorkerId worker = h.Attach(kMemory);
  const RequestId old = h.Submit(OneSequence(800, 5));
  int steps = 0;
  for (; steps < 100 && h.tokens[old].empty(); ++steps) {
    for (int i = 0; i < 4; ++i) h.Submit(OneSequence(kStep, 1));
    const v1::StepPlan& plan = h.StageOf(worker).plans.front();
    if (steps > 3) {
      EXPECT_GT(RowsOf(plan), RowsOf(plan, 1)) << "the short ones have the rest";
    }
    EXPECT_GE(RowsOf(plan, 1), kStep / 4);
    h.Report(worker);
  }
  EXPECT_LE(steps, 4 * 800 / static_cast<int>(kStep) + 3);
}

}  // namespace
}  // namespace strait

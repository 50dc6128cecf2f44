// SPDX-License-Identifier: Apache-2.0
//
// Defends: stages that share a cache compute beside each other, and none writes into what another one uses.
#include <gtest/gtest.h>

#include "tests/worker/stage/take_over_fixture.h"

namespace strait {
namespace {

using SharedCacheTest = TakeOverTest;

// A step that closes a sequence was begun while the one before it still computed rows of that sequence. Its
// blocks were free for every stage at once: the other one wrote its rows there, and then they were
// overwritten.
TEST_F(SharedCacheTest, BlocksOfStepsUnderWayAreNotAnotherStages) {
  Hosted& one = Add(1, {0, kLayers});
  Hosted& two = Add(2, {0, kLayers});
  ASSERT_TRUE(one.stage->Activate({1, 1}, 0, 1).ok());
  ASSERT_TRUE(two.stage->Activate({1, 1}, 0, 1).ok());
  one.Accept(Rows(one, 1, 7, 0, 100));
  v1::StepPlan close = one.Plan(2);
  AddClose(&close, 7);
  one.Accept(close);
  one.Begin();
  one.Begin();
  EXPECT_EQ(one.stage->blocks_used(), 0u);
  EXPECT_EQ(one.stage->peak_blocks(), 12u);
  two.Run(Rows(two, 1, 8, 0, 130));
  EXPECT_EQ(one.stage->FinishNext([] { return 0; }).report.error_code(), 0u);
  two.ExpectRows(8, 130);
  // Now they are.
  EXPECT_EQ(one.stage->peak_blocks(), 0u);
  EXPECT_EQ(pool_.used(), 18u);
  const StepOutput out = one.stage->FinishNext([] { return 0; });
  EXPECT_EQ(out.report.cache_bytes(), 0u);
  CheckIntegrity();
}

// The steps of one stage come in order, so it has them itself at once: or it would find fewer than its plans
// count with.
TEST_F(SharedCacheTest, TheirOwnStageHasThemAtOnce) {
  Hosted& one = Add(1, {0, kLayers}, 12);
  ASSERT_TRUE(one.stage->Activate({1, 1}, 0, 1).ok());
  one.Accept(Rows(one, 1, 7, 0, 100));
  v1::StepPlan next = Rows(one, 2, 8, 0, 120);
  AddClose(&next, 7);
  one.Accept(next);
  one.Begin();
  one.Begin();
  EXPECT_EQ(pool_.used(), 12u);
  EXPECT_EQ(one.stage->peak_blocks(), 12u);
  one.stage->FinishNext([] { return 0; });
  one.stage->FinishNext([] { return 0; });
  one.ExpectRows(8, 120);
  // An epoch that ends waits for what is begun, and so nothing is kept any more.
  v1::StepPlan close = one.Plan(3);
  AddClose(&close, 8);
  one.Accept(Rows(one, 3, 8, 120, 1));
  close.set_step_id(4);
  one.Accept(close);
  one.Begin();
  one.Begin();
  EXPECT_EQ(pool_.used(), 12u);
  ASSERT_TRUE(one.stage->Activate({1, 2}, 0, 1).ok());
  EXPECT_EQ(pool_.used(), 0u);
  CheckIntegrity();
}

}  // namespace
}  // namespace strait

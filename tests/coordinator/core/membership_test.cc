// SPDX-License-Identifier: Apache-2.0
//
// Defends: only workers that agree (weights, cache rows, release) share a cluster; who does not is
// refused with a message that names it, both values and the fix.
//
// The bug: workers with other weights, or another --cache-format, joined a pipeline silently, and
// every token came from a mixture of two models.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr uint64_t kMemory = 100'000;

CoreOptions Options(uint32_t num_stages) {
  CoreOptions options;
  options.grant_depth = 1;
  options.num_stages = num_stages;
  return options;
}

TEST(MembershipTest, OtherWeightsAreRefused) {
  Harness h(Options(2), SmallModel());
  const WorkerId first = h.Attach(kMemory);
  v1::Hello other = h.MakeHello(kMemory);
  other.set_weights_fingerprint(0xDEF);
  const WorkerId second = h.Attach(other);
  ASSERT_TRUE(h.workers.at(second).evicted);
  EXPECT_EQ(h.workers.at(second).why.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(h.workers.at(second).why.ToString(),
              AllOf(HasSubstr("w2"), HasSubstr("def"), HasSubstr("abc"), HasSubstr("--model")));
  EXPECT_FALSE(h.workers.at(first).evicted);
  EXPECT_FALSE(h.core.Ready());
  h.Attach(kMemory);
  EXPECT_TRUE(h.core.Ready());
  EXPECT_THAT(h.problems, ElementsAre());
}

TEST(MembershipTest, UntoldIsRefused) {
  Harness h(Options(1), SmallModel());
  v1::Hello weights = h.MakeHello(kMemory);
  weights.clear_weights_fingerprint();
  v1::Hello rows = h.MakeHello(kMemory);
  rows.clear_cache_row_bytes();
  for (const v1::Hello& hello : {weights, rows}) {
    const WorkerId id = h.Attach(hello);
    EXPECT_EQ(h.workers.at(id).why.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(h.workers.at(id).why.ToString(), HasSubstr("does not tell"));
  }
  EXPECT_FALSE(h.core.Ready());
}

TEST(MembershipTest, AnotherCacheFormatIsRefused) {
  Harness h(Options(1), SmallModel());
  v1::Hello hello = h.MakeHello(kMemory);
  hello.set_cache_row_bytes(4);
  const WorkerId id = h.Attach(hello);
  EXPECT_EQ(h.workers.at(id).why.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(h.workers.at(id).why.ToString(),
              AllOf(HasSubstr("w1"), HasSubstr("rows of 4 bytes"), HasSubstr("reckons with 2"),
                    HasSubstr("--cache-format")));
}

TEST(MembershipTest, AnEmptyClusterTakesOtherWeightsAndContinuesNothing) {
  Harness h(Options(1), SmallModel());
  const WorkerId old = h.Attach(kMemory);
  const RequestId begun = h.Submit(OneSequence(10, 5));
  h.Report(old);
  ASSERT_EQ(h.tokens[begun].size(), 1u);
  h.Lose(old);
  const RequestId fresh = h.Submit(OneSequence(10, 5));
  v1::Hello other = h.MakeHello(kMemory);
  other.set_weights_fingerprint(0xDEF);
  h.Attach(other);
  ASSERT_TRUE(h.core.Ready());
  h.Run();
  ASSERT_TRUE(h.ended.contains(begun));
  EXPECT_EQ(h.ended.at(begun).status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(h.tokens[begun].size(), 1u);
  EXPECT_EQ(h.tokens[fresh].size(), 5u);
  EXPECT_THAT(h.problems, ElementsAre());
}

// The bug: the count was checked while the same process's old stream was still counted, so at the
// limit no worker could ever come back.
TEST(MembershipTest, AtTheLimitAWorkerMayStillAttachAgain) {
  Harness h(Options(1), SmallModel());
  for (uint32_t i = 0; i < limits::kMaxWorkers; ++i) h.Attach(kMemory);
  v1::Hello again = h.MakeHello(kMemory);
  again.set_instance(5);
  EXPECT_FALSE(h.workers.at(h.Attach(again)).evicted);
  EXPECT_TRUE(h.workers.at(WorkerId{5}).evicted);
  const WorkerId over = h.Attach(kMemory);
  EXPECT_EQ(h.workers.at(over).why.code(), absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace strait

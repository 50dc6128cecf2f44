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

v1::StageCosts Costs(const ModelShape& model) {
  v1::StageCosts costs;
  for (const uint64_t bytes : model.layer_weight_bytes) costs.add_layer_bytes(bytes + 7);
  costs.set_embedding_bytes(model.embedding_bytes);
  costs.set_head_bytes(model.head_bytes);
  costs.set_block_bytes(model.block_bytes + 4);
  costs.add_workspace_bytes(50);
  costs.add_last_workspace_bytes(60);
  costs.set_layer_workspace_bytes(3);
  costs.set_edge_bytes(1'000'000);  // a stage alone has no edge
  return costs;
}

// The bug: a GPU worker counts its memory otherwise than a CPU worker, and was planned for as one.
TEST(MembershipTest, AWorkersStagesArePlannedAsItCountsThem) {
  const ModelShape model = SmallModel();
  const v1::StageCosts costs = Costs(model);
  uint64_t fixed = costs.embedding_bytes() + costs.head_bytes() + 60;
  for (const uint64_t bytes : costs.layer_bytes()) fixed += bytes + 3;
  const uint64_t column = costs.block_bytes() * model.layer_weight_bytes.size();
  for (const uint64_t short_of : {0u, 1u}) {
    Harness h(Options(1), model);
    v1::Hello hello = h.MakeHello(fixed + 3 * column - short_of);
    *hello.mutable_stage_costs() = costs;
    h.Attach(hello);
    ASSERT_TRUE(h.core.Ready());
    EXPECT_EQ(h.core.Stats().cache_bytes_total,
              (short_of > 0 ? 2 : 3) * model.layer_weight_bytes.size() * model.block_bytes);
  }
}

TEST(MembershipTest, CostsThatAreNoneOfTheModelAreRefused) {
  Harness h(Options(1), SmallModel());
  std::vector<v1::StageCosts> wrong(10, Costs(SmallModel()));
  wrong[0].add_layer_bytes(1);
  wrong[1].set_block_bytes(SmallModel().block_bytes - 1);
  wrong[2].clear_workspace_bytes();
  wrong[3].add_workspace_bytes(49);
  wrong[6].clear_last_workspace_bytes();
  wrong[7].set_layer_workspace_bytes(~uint64_t{0});
  wrong[4].set_layer_bytes(0, ~uint64_t{0});
  wrong[5].set_head_bytes(~uint64_t{0});
  wrong[8].set_edge_bytes(~uint64_t{0});
  wrong[9].set_edge_row_bytes(uint64_t{1} << 50);
  for (const v1::StageCosts& costs : wrong) {
    v1::Hello hello = h.MakeHello(kMemory);
    *hello.mutable_stage_costs() = costs;
    const WorkerId id = h.Attach(hello);
    EXPECT_EQ(h.workers.at(id).why.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(h.workers.at(id).why.ToString(), HasSubstr("costs of its stages"));
  }
  EXPECT_FALSE(h.core.Ready());
}

// The bug: a GPU worker with smaller rows than the coordinator reckons with was told that its costs
// are of another model and to install the same release.
TEST(MembershipTest, SmallerRowsOfAGpuWorkerAreACacheFormatNotAnotherModel) {
  Harness h(Options(1), SmallModel());
  v1::Hello hello = h.MakeHello(kMemory);
  *hello.mutable_stage_costs() = Costs(SmallModel());
  hello.set_cache_row_bytes(1);
  hello.mutable_stage_costs()->set_block_bytes(limits::kBlockTokens + 4);
  const WorkerId id = h.Attach(hello);
  EXPECT_EQ(h.workers.at(id).why.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(h.workers.at(id).why.ToString(),
              AllOf(HasSubstr("rows of 1 bytes"), HasSubstr("reckons with 2"),
                    HasSubstr("--cache-format"), HasSubstr("fp8 is for GPU workers alone")));
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

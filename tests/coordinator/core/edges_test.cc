// SPDX-License-Identifier: Apache-2.0
//
// Defends: an edge is NCCL where both of its workers can, its id goes from the receiver to the
// sender and nobody else, and one whose NCCL fails does without; the status says which and why. An
// edge keeps its id while it need not be opened anew.
#include "coordinator/core/edges.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

constexpr uint64_t kMemory = 100'000;

CoreOptions Options(uint32_t stages) {
  CoreOptions options;
  options.num_stages = stages;
  options.max_step_tokens = 33;
  return options;
}

WorkerId Attach(Harness& h, uint32_t nccl_version, const std::string& problem = "") {
  v1::Hello hello = h.MakeHello(kMemory);
  hello.set_nccl_version(nccl_version);
  hello.set_nccl_problem(problem);
  hello.set_backend("cpu");
  return h.Attach(hello);
}

const v1::ActivateStage& Activation(Harness& h, WorkerId id) { return h.StageOf(id).activate; }

TEST(EdgesTest, IdsGoFromReceiverToSender) {
  Harness h(Options(3), SmallModel());
  std::vector<WorkerId> w;
  for (int i = 0; i < 3; ++i) w.push_back(Attach(h, 22809));
  ASSERT_TRUE(h.core.Ready());
  EXPECT_FALSE(Activation(h, w[0]).edge_over_nccl());
  for (int i = 0; i < 3; ++i) {
    const v1::ActivateStage& activate = Activation(h, w[i]);
    EXPECT_EQ(activate.edge_over_nccl(), i > 0);
    EXPECT_EQ(activate.max_step_tokens(), 33u);
    EXPECT_EQ(activate.next_nccl_id(),
              i < 2 ? Harness::NcclId(Activation(h, w[i + 1]).stage_id()) : "");
  }
  EXPECT_NE(h.core.StatusJson(h.now_us).find("both have NCCL 2.28.9"), std::string::npos);
  h.Submit(OneSequence(5, 3));
  h.Run();
  EXPECT_EQ(h.tokens.begin()->second.size(), 3u);
  EXPECT_TRUE(h.problems.empty());
}

TEST(EdgesTest, EachEdgeForItself) {
  Harness h(Options(4), SmallModel());
  const WorkerId a = Attach(h, 22809);
  const WorkerId b = Attach(h, 22809);
  const WorkerId c = Attach(h, 22703);
  const WorkerId d = Attach(h, 0, "NCCL cannot be loaded");
  ASSERT_TRUE(h.core.Ready());
  EXPECT_TRUE(Activation(h, b).edge_over_nccl());
  EXPECT_FALSE(Activation(h, a).next_nccl_id().empty());
  EXPECT_FALSE(Activation(h, c).edge_over_nccl());
  EXPECT_TRUE(Activation(h, b).next_nccl_id().empty());
  EXPECT_FALSE(Activation(h, d).edge_over_nccl());
  const std::string status = h.core.StatusJson(h.now_us);
  for (const char* why : {"NCCL versions differ: w2 has 2.28.9, w3 has 2.27.3",
                          "w4 offers no NCCL: NCCL cannot be loaded"}) {
    EXPECT_NE(status.find(why), std::string::npos) << why << "\n" << status;
  }
}

TEST(EdgesTest, WorkerThatSaysNothingOfNccl) {
  Harness h(Options(2), SmallModel());
  Attach(h, 22809);
  Attach(h, 0);
  ASSERT_TRUE(h.core.Ready());
  EXPECT_NE(h.core.StatusJson(h.now_us).find("w2 offers no NCCL: backend cpu"), std::string::npos);
}

TEST(EdgesTest, SetUpThatFailsIsDoneByGrpcNext) {
  for (const bool sender_tells : {true, false}) {
    Harness h(Options(3), SmallModel());
    h.answer_activations = false;
    std::vector<WorkerId> w;
    for (int i = 0; i < 3; ++i) w.push_back(Attach(h, 22809));
    ASSERT_TRUE(Activation(h, w[1]).edge_over_nccl());
    h.answer_activations = true;
    v1::FromWorker failed;
    const uint64_t edge_to = h.StageOf(w[1]).load.stage_id();
    if (sender_tells) {
      v1::StageState& state = *failed.mutable_stage_state();
      state.set_stage_id(h.StageOf(w[0]).load.stage_id());
      state.set_state(v1::StageState::FAILED);
      *state.mutable_epoch() = h.StageOf(w[0]).epoch;
      state.set_error_code(static_cast<uint32_t>(absl::StatusCode::kUnavailable));
      state.set_error_message("no route");
      state.set_failed_nccl_edge(edge_to);
      h.core.OnWorkerMessage(w[0], failed, h.now_us);
    } else {
      v1::StageReport& report = *failed.mutable_report();
      report.set_stage_id(edge_to);
      *report.mutable_epoch() = h.StageOf(w[1]).epoch;
      report.set_error_code(static_cast<uint32_t>(absl::StatusCode::kUnavailable));
      report.set_error_message("no route");
      report.set_failed_nccl_edge(edge_to);
      h.core.OnWorkerMessage(w[1], failed, h.now_us);
    }
    h.Tick(1'000'000);
    ASSERT_TRUE(h.core.Ready());
    EXPECT_FALSE(Activation(h, w[1]).edge_over_nccl()) << "the pair that failed";
    EXPECT_TRUE(Activation(h, w[0]).next_nccl_id().empty());
    EXPECT_TRUE(Activation(h, w[2]).edge_over_nccl()) << "the other pair is well";
    const std::string status = h.core.StatusJson(h.now_us);
    EXPECT_NE(status.find("NCCL failed between w1 and w2"), std::string::npos) << status;
    EXPECT_NE(status.find("no route"), std::string::npos) << status;
  }
}

v1::StageReport Error(Harness& h, WorkerId worker, uint64_t step) {
  v1::StageReport report;
  report.set_stage_id(h.StageOf(worker).load.stage_id());
  *report.mutable_epoch() = h.StageOf(worker).epoch;
  report.set_step_id(step);
  report.set_error_code(static_cast<uint32_t>(absl::StatusCode::kInternal));
  return report;
}

// Ids of the edge to the second stage, of that to the third, and of the one back to the first.
std::vector<uint64_t> EdgeIds(Harness& h, const std::vector<WorkerId>& w) {
  const std::vector<uint64_t> ids = {Activation(h, w[1]).edge_id(), Activation(h, w[2]).edge_id(),
                                     Activation(h, w[2]).sampled_edge_id()};
  EXPECT_EQ(Activation(h, w[0]).edge_id(), 0u);
  EXPECT_EQ(Activation(h, w[0]).next_edge_id(), ids[0]);
  EXPECT_EQ(Activation(h, w[1]).next_edge_id(), ids[1]);
  EXPECT_EQ(Activation(h, w[2]).next_edge_id(), 0u);
  EXPECT_EQ(Activation(h, w[0]).sampled_edge_id(), ids[2]);
  EXPECT_EQ(Activation(h, w[1]).sampled_edge_id(), 0u);
  EXPECT_EQ(Activation(h, w[0]).next_edge_nonce(), Activation(h, w[1]).edge_nonce());
  EXPECT_EQ(Activation(h, w[1]).next_edge_nonce(), Activation(h, w[2]).edge_nonce());
  EXPECT_EQ(Activation(h, w[0]).sampled_edge_nonce(), Activation(h, w[2]).sampled_edge_nonce());
  return ids;
}

TEST(EdgesTest, GrpcEdgesOutliveEpochsAsLongAsBothEndsStay) {
  Harness h(Options(3), SmallModel());
  std::vector<WorkerId> w;
  for (int i = 0; i < 3; ++i) w.push_back(Attach(h, 0));
  const std::vector<uint64_t> ids = EdgeIds(h, w);
  const uint64_t nonce = Activation(h, w[1]).edge_nonce();
  EXPECT_EQ(std::set<uint64_t>({0, ids[0], ids[1], ids[2]}).size(), 4u);
  // A step fails: the edges are well.
  const uint64_t epoch = h.StageOf(w[0]).epoch.counter();
  h.Send(w[1], Error(h, w[1], 1));
  h.Tick(1'000'000);
  ASSERT_GT(h.StageOf(w[0]).epoch.counter(), epoch);
  EXPECT_EQ(EdgeIds(h, w), ids);
  EXPECT_EQ(Activation(h, w[1]).edge_nonce(), nonce);
  // Another end: the edges of that stage alone.
  h.Lose(w[2]);
  w[2] = Attach(h, 0);
  const std::vector<uint64_t> after = EdgeIds(h, w);
  EXPECT_EQ(after[0], ids[0]);
  EXPECT_GT(after[1], ids[2]);
  EXPECT_GT(after[2], ids[2]);
  // An edge failed, says one end of it: none is trusted.
  h.Send(w[0], Error(h, w[0], 0));
  h.Tick(1'000'000);
  ASSERT_TRUE(h.core.Ready());
  for (const uint64_t id : EdgeIds(h, w)) EXPECT_GT(id, std::max(after[1], after[2]));
  EXPECT_NE(Activation(h, w[1]).edge_nonce(), nonce);
  EXPECT_TRUE(h.problems.empty());
}

TEST(EdgesTest, AFailedActivationRenewsEdges) {
  Harness h(Options(3), SmallModel());
  std::vector<WorkerId> w;
  h.answer_activations = false;
  for (int i = 0; i < 3; ++i) w.push_back(Attach(h, 0));
  const std::vector<uint64_t> ids = EdgeIds(h, w);
  h.answer_activations = true;
  v1::FromWorker failed;
  failed.mutable_stage_state()->set_stage_id(h.StageOf(w[0]).load.stage_id());
  failed.mutable_stage_state()->set_state(v1::StageState::FAILED);
  *failed.mutable_stage_state()->mutable_epoch() = h.StageOf(w[0]).epoch;
  failed.mutable_stage_state()->set_error_code(14);
  h.core.OnWorkerMessage(w[0], failed, h.now_us);
  h.Tick(1'000'000);
  ASSERT_TRUE(h.core.Ready());
  for (const uint64_t id : EdgeIds(h, w)) EXPECT_GT(id, ids[2]);
}

TEST(EdgesTest, NcclEdgesAreNewInEveryEpoch) {
  Harness h(Options(3), SmallModel());
  std::vector<WorkerId> w = {Attach(h, 22809), Attach(h, 22809), Attach(h, 0)};
  const std::vector<uint64_t> ids = EdgeIds(h, w);
  ASSERT_TRUE(Activation(h, w[1]).edge_over_nccl());
  h.Send(w[2], Error(h, w[2], 1));
  h.Tick(1'000'000);
  ASSERT_TRUE(h.core.Ready());
  const std::vector<uint64_t> after = EdgeIds(h, w);
  EXPECT_GT(after[0], ids[2]);
  EXPECT_EQ(after[1], ids[1]);
  EXPECT_EQ(after[2], ids[2]);
}

TEST(EdgesTest, PairIsTriedAgainLaterAndForgottenWithItsWorker) {
  const NcclSupport nccl{22809, ""};
  const std::string name = "w";
  const EdgeEnd a{WorkerId{1}, &name, &nccl};
  const EdgeEnd b{WorkerId{2}, &name, &nccl};
  EdgeChooser edges;
  EXPECT_TRUE(edges.Choose(a, b, 5).over_nccl);
  edges.Avoid(a.worker, b.worker, "why", 5);
  EXPECT_FALSE(edges.Choose(a, b, 6).over_nccl);
  EXPECT_TRUE(edges.Choose(b, a, 6).over_nccl) << "another edge";
  EXPECT_FALSE(edges.Choose(a, b, 4 + kNcclRetryAfterUs).over_nccl);
  EXPECT_TRUE(edges.Choose(a, b, 5 + kNcclRetryAfterUs).over_nccl);
  edges.Forget(b.worker);
  EXPECT_TRUE(edges.Choose(a, b, 6).over_nccl);
}

// Who waits for another's id was not told to activate, and owes no answer.
TEST(EdgesTest, OnlyWhoOwesTheIdIsEvicted) {
  Harness h(Options(3), SmallModel());
  h.answer_nccl_ids = false;
  std::vector<WorkerId> w;
  for (int i = 0; i < 3; ++i) w.push_back(Attach(h, 22809));
  h.Tick(Options(3).activation_timeout_us + 1'000'000);
  EXPECT_FALSE(h.workers.at(w[0]).evicted);
  EXPECT_FALSE(h.workers.at(w[1]).evicted);
  EXPECT_TRUE(h.workers.at(w[2]).evicted) << "it is active, but made no id";
}

TEST(EdgesTest, IdThatNobodyAskedForEvicts) {
  Harness h(Options(2), SmallModel());
  const WorkerId a = Attach(h, 22809);
  const WorkerId b = Attach(h, 22809);
  v1::FromWorker again;
  v1::EdgeId& id = *again.mutable_edge_id();
  id.set_stage_id(h.StageOf(b).load.stage_id());
  *id.mutable_epoch() = h.StageOf(b).epoch;
  id.set_nccl_id(Harness::NcclId(1));
  v1::FromWorker late = again;
  late.mutable_edge_id()->mutable_epoch()->set_counter(0);
  h.core.OnWorkerMessage(b, late, h.now_us);
  h.Pump();
  EXPECT_FALSE(h.workers.at(b).evicted) << "of an epoch that is over: no fault";
  h.core.OnWorkerMessage(b, again, h.now_us);
  h.Pump();
  EXPECT_TRUE(h.workers.at(b).evicted) << "a second one";
  EXPECT_FALSE(h.workers.at(a).evicted);
}

}  // namespace
}  // namespace strait

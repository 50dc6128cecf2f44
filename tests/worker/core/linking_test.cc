// SPDX-License-Identifier: Apache-2.0
//
// Defends: a stage's edges can be opened before its first epoch, which then goes on with them; what breaks of them
// before costs no more than that they are opened in the epoch, and ends nothing.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/worker/core/many_stages.h"

namespace strait {
namespace {

// Stage 1 serves alone. Stage 2 follows it, in the middle of a pipeline to come: edge 21 from stage 7, edge 22 to stage 8.
struct Linked : ManyStages {
  explicit Linked(bool over_nccl) : over_nccl(over_nccl) {
    Load(1, {0, 6}, 100);
    FinishLoads();
    ActivateAll({1}, 1);
    Load(2, {2, 4}, 50, {1});
    FinishLoads();
    (void)Told();
    Calls();
  }
  v1::ActivateStage Future() const {
    v1::ActivateStage future;
    future.set_stage_id(2);
    future.set_stage_index(1);
    future.set_num_stages(3);
    future.set_previous_stage_id(7);
    future.set_edge_id(21);
    future.set_edge_nonce(5);
    future.set_edge_over_nccl(over_nccl);
    future.set_next_stage_id(8);
    future.set_next_edge_id(22);
    future.set_next_edge_nonce(6);
    future.set_next_data_address("127.0.0.1:9");
    if (over_nccl) future.set_next_nccl_id(std::string(limits::kNcclIdBytes, 'x'));
    future.set_max_step_tokens(100);
    return future;
  }
  void Link(const v1::ActivateStage& future) {
    v1::ToWorker message;
    *message.mutable_link_stage()->mutable_future() = future;
    core.OnMessage(std::move(message), 0);
  }
  void Enter(uint64_t counter, bool made) {
    v1::ToWorker message;
    v1::ActivateStage& activate = *message.mutable_activate_stage();
    activate = Future();
    activate.mutable_epoch()->set_term(1);
    activate.mutable_epoch()->set_counter(counter);
    activate.set_edge_made(made && over_nccl);
    activate.set_next_edge_made(made && over_nccl);
    core.OnMessage(std::move(message), 0);
  }
  Edge In() const {
    return {.id = 21, .from_stage_id = 7, .to_stage_id = 2, .over_nccl = over_nccl};
  }
  Edge Out() const {
    return {.id = 22, .from_stage_id = 2, .to_stage_id = 8, .over_nccl = over_nccl};
  }
  std::string Calls() { return std::exchange(transport.calls, ""); }

  const bool over_nccl;
};

TEST(LinkingTest, TheFirstEpochGoesOnWithTheEdges) {
  for (const bool over_nccl : {false, true}) {
    Linked w(over_nccl);
    w.Link(w.Future());
    EXPECT_EQ(w.Calls(), " expect 21 connect 22");
    EXPECT_TRUE(w.transport.all_ahead);
    EXPECT_EQ(w.Told(), "") << "the next stage has not answered";
    if (over_nccl) {
      w.core.OnNcclId(w.In(), "an id");
      EXPECT_FALSE(w.ports.messages.back().edge_id().epoch().counter() > 0);
      EXPECT_EQ(w.Told(), "edge id");
    }
    w.core.OnEdgeUp(w.Out(), {});
    EXPECT_EQ(w.Told(), "linked");
    // Its predecessor serves all the while.
    w.Send(WithRows(w.Plan(1, 1), 7, 0, 65));
    w.RunAll();
    EXPECT_EQ(w.Told(), "report 0");
    EXPECT_EQ(w.core.StateOf(2), WorkerCore::HostedState::kLoaded);
    w.Calls();
    w.Enter(2, /*made=*/true);
    // What was stage 1's goes; the new edges are only asked whether they are there.
    EXPECT_EQ(w.Calls(), " retire probe");
    EXPECT_EQ(w.Told(), "");
    w.core.OnEdgeUp(w.Out(), {});
    EXPECT_EQ(w.LastHeld(), (std::map<uint64_t, uint32_t>{{7, 65}}));
    EXPECT_EQ(w.Told(), "ACTIVE");
    w.ExpectSound();
  }
}

TEST(LinkingTest, ABrokenEdgeIsToldAndOpenedAnew) {
  for (const bool over_nccl : {false, true}) {
    for (const bool incoming : {false, true}) {
      Linked w(over_nccl);
      w.Link(w.Future());
      w.core.OnEdgeUp(w.Out(), {});
      EXPECT_EQ(w.Told(), "linked");
      w.Calls();
      w.core.OnEdgeDown(incoming ? w.In() : w.Out(), absl::UnavailableError("it broke"));
      const v1::StageLinked& told = w.ports.messages.back().stage_linked();
      EXPECT_EQ(told.failed_link().to_stage_id(), incoming ? 2u : 8u);
      EXPECT_EQ(told.failed_nccl_edge(), !over_nccl ? 0u : incoming ? 2u : 8u);
      EXPECT_EQ(w.Told(), "linked 14");
      // Two over NCCL end together.
      EXPECT_EQ(w.Calls(), over_nccl ? " disconnect forget" : "");
      EXPECT_EQ(w.core.StateOf(2), WorkerCore::HostedState::kLoaded);
      w.Enter(2, /*made=*/false);
      EXPECT_EQ(w.Calls(), over_nccl  ? " retire expect 21 connect 22"
                           : incoming ? " retire expect 21 probe"
                                      : " retire connect 22");
      w.core.OnEdgeUp(w.Out(), {});
      EXPECT_EQ(w.Told(), "ACTIVE");
      w.ExpectSound();
    }
  }
}

// Its other end would wait for it for as long as NCCL is given.
TEST(LinkingTest, AnActivationWithoutTheEdgeThatWasMadeFails) {
  Linked w(/*over_nccl=*/true);
  w.Link(w.Future());
  w.core.OnEdgeUp(w.Out(), {});
  w.core.OnEdgeDown(w.In(), absl::UnavailableError("it broke"));
  (void)w.Told();
  w.Enter(2, /*made=*/true);
  EXPECT_EQ(w.Told(), "FAILED 14");
  EXPECT_EQ(w.core.StateOf(2), WorkerCore::HostedState::kLoaded);
  EXPECT_EQ(w.core.FindStage(1)->epoch(), (PipelineEpoch{1, 1})) << "nothing was taken over";
  w.Enter(3, /*made=*/false);
  w.core.OnEdgeUp(w.Out(), {});
  EXPECT_EQ(w.Told(), "ACTIVE");
}

TEST(LinkingTest, TheLastOfAllHasNothingToWaitFor) {
  Linked w(/*over_nccl=*/false);
  w.Load(3, {4, 6}, 30, {1});
  w.FinishLoads();
  (void)w.Told();
  v1::ActivateStage future = w.Future();
  future.set_stage_id(3);
  future.set_num_stages(2);
  future.clear_next_stage_id();
  future.clear_next_edge_id();
  future.clear_next_edge_nonce();
  future.clear_next_data_address();
  w.Link(future);
  EXPECT_EQ(w.Calls(), " expect 21");
  EXPECT_EQ(w.Told(), "linked");
}

TEST(LinkingTest, WhatCannotBeIsRefusedAndChangesNothing) {
  Linked w(/*over_nccl=*/false);
  v1::ActivateStage future = w.Future();
  future.set_stage_id(9);
  w.Link(future);
  EXPECT_EQ(w.Told(), "linked 9") << "no such stage";
  future = w.Future();
  future.mutable_epoch()->set_counter(2);
  w.Link(future);
  EXPECT_EQ(w.Told(), "linked 3") << "an epoch";
  future = w.Future();
  future.clear_edge_nonce();
  w.Link(future);
  EXPECT_EQ(w.Told(), "linked 3") << "no nonce";
  future = w.Future();
  future.set_stage_id(1);
  w.Link(future);
  EXPECT_EQ(w.Told(), "linked 9") << "a stage that serves";
  EXPECT_EQ(w.Calls(), "");
  w.Link(w.Future());
  w.Calls();
  w.Link(w.Future());
  EXPECT_EQ(w.Told(), "linked 6") << "twice";
  EXPECT_EQ(w.Calls(), "");
  // Given up.
  w.Unload(2);
  EXPECT_EQ(w.Calls(), " disconnect forget");
  EXPECT_EQ(w.Told(), "UNLOADED");
  w.core.OnEdgeUp(w.Out(), {});
  w.core.OnEdgeDown(w.In(), absl::UnavailableError("it broke"));
  EXPECT_EQ(w.Told(), "");
}

TEST(LinkingTest, WithItsCoordinatorTheWaitEnds) {
  Linked w(/*over_nccl=*/false);
  w.Link(w.Future());
  w.core.OnDetached(0);
  w.core.OnEdgeUp(w.Out(), {});
  EXPECT_EQ(w.Told(), "");
}

}  // namespace
}  // namespace strait

// SPDX-License-Identifier: Apache-2.0
//
// Defends: whatever comes to a stage in whatever state, a worker does one thing, and tells of it once. Every
// pair of a state and an event is brought about here, those too that random clusters hardly ever meet
// (tests/sim counts how often they do).
#include "worker/core/worker_core.h"

#include <gtest/gtest.h>

#include <map>
#include <string>
#include <utility>

#include "tests/worker/core/recording.h"
#include "tests/worker/stage/fake_model.h"
#include "tests/worker/stage/plans.h"

namespace strait {
namespace {

constexpr uint64_t kStage = 1;
constexpr uint64_t kIn = 21;   // edge from stage 7
constexpr uint64_t kOut = 22;  // edge to stage 8

using State = WorkerCore::HostedState;

v1::ToWorker LoadMessage() {
  v1::ToWorker message;
  message.mutable_load_stage()->set_stage_id(kStage);
  message.mutable_load_stage()->set_layer_begin(2);
  message.mutable_load_stage()->set_layer_end(4);
  message.mutable_load_stage()->set_cache_bytes(100 * kFakeBlockBytes);
  return message;
}
v1::ToWorker UnloadMessage() {
  v1::ToWorker message;
  message.mutable_unload_stage()->set_stage_id(kStage);
  return message;
}
v1::Welcome WelcomeOf(uint64_t term) {
  v1::Welcome welcome;
  welcome.set_term(term);
  return welcome;
}
Edge In() { return {.id = kIn, .from_stage_id = 7, .to_stage_id = kStage, .over_nccl = true}; }
Edge Out() { return {.id = kOut, .from_stage_id = kStage, .to_stage_id = 8}; }
v1::ToWorker Activation(uint64_t counter) {
  v1::ToWorker message;
  v1::ActivateStage& activate = *message.mutable_activate_stage();
  activate.set_stage_id(kStage);
  activate.mutable_epoch()->set_term(1);
  activate.mutable_epoch()->set_counter(counter);
  activate.set_stage_index(1);
  activate.set_num_stages(3);
  activate.set_previous_stage_id(7);
  activate.set_edge_id(kIn);
  activate.set_edge_nonce(5);
  activate.set_next_stage_id(8);
  activate.set_next_edge_id(kOut);
  activate.set_next_edge_nonce(6);
  activate.set_next_data_address("127.0.0.1:9");
  activate.set_max_step_tokens(100);
  return message;
}
v1::ToWorker PlanMessage(uint64_t counter) {
  v1::ToWorker message;
  v1::StepPlan& plan = *message.mutable_step();
  plan.set_stage_id(kStage);
  plan.mutable_epoch()->set_term(1);
  plan.mutable_epoch()->set_counter(counter);
  plan.set_step_id(1);
  AddOpen(&plan, 9);
  AddRows(&plan, 9, 0, {1, 2, 3});
  return message;
}
uint64_t Clock() { return 0; }

// A worker with the middle one of three stages, in a state of choice.
struct Rig {
  explicit Rig(State state)
      : core({.orphan_timeout_us = 1'000'000},
             {.num_layers = 6,
              .hidden_row_bytes = kFakeHiddenRowBytes,
              .vocab_size = kFakeVocab,
              .max_positions = 1000,
              .block_bytes = kFakeBlockBytes},
             &cache, &transport, &ports) {
    core.OnWelcome(WelcomeOf(1));
    if (state == State::kNone) return;
    core.OnMessage(LoadMessage(), 0);
    if (state == State::kLoading) return;
    Loaded();
    if (state == State::kLoaded) return;
    core.OnMessage(Activation(++epoch), 0);
    if (state == State::kActivating) return;
    core.OnEdgeUp(Out(), {});
    if (state == State::kActive) return;
    core.OnEdgeDown(In(), absl::UnavailableError("it broke"));
  }

  uint64_t counter() const { return std::max<uint64_t>(epoch, 1); }
  void Loaded() {
    core.OnLoaded({.serial = 1, .stage_id = kStage},
                  std::make_unique<FakeModel>(LayerRange{2, 4}, 100, 6, &cache));
  }
  void Plan() { core.OnMessage(PlanMessage(counter()), 0); }
  void Hidden() {
    core.OnHidden(
        kStage, {{1, counter()}, StepId{1}, 3, std::vector<std::byte>(3 * kFakeHiddenRowBytes)}, 0);
  }
  void Sampled() { core.OnSampled(kStage, {{1, counter()}, StepId{1}, {4}}); }
  void Begin() {
    Plan();
    Hidden();
    if (core.NextReady()) core.BeginStep(kStage, &Clock);
  }
  void Finish() {
    Begin();
    bool any = false;
    if (core.NextDone(&any)) core.FinishStep(kStage, &Clock);
  }
  void Orphan() {
    core.OnDetached(0);
    core.OnTick(2'000'000);
  }

  NumberCache cache;
  RecordingTransport transport;
  RecordingPorts ports;
  WorkerCore core;
  uint64_t epoch = 0;
};

// What becomes of the stage, and what is told: 3 InvalidArgument, 5 NotFound, 6 AlreadyExists, 9
// FailedPrecondition, 10 Aborted, 14 Unavailable.
struct Answer {
  State state;
  const char* told;
};
struct Case {
  const char* event;
  void (*bring)(Rig& r);
  Answer answers[6];  // none, loading, loaded, activating, active, stuck
};
constexpr State kStates[] = {State::kNone,       State::kLoading, State::kLoaded,
                             State::kActivating, State::kActive,  State::kStuck};
constexpr State kNone = State::kNone, kLoading = State::kLoading, kLoaded = State::kLoaded,
                kActivating = State::kActivating, kActive = State::kActive, kStuck = State::kStuck;

const Case kCases[] = {
    {"load",
     [](Rig& r) { r.core.OnMessage(LoadMessage(), 0); },
     {{kLoading, ""},
      {kLoading, "FAILED 6"},
      {kLoaded, "FAILED 6"},
      {kActivating, "FAILED 6"},
      {kActive, "FAILED 6"},
      {kStuck, "FAILED 6"}}},
    {"loaded",
     [](Rig& r) { r.Loaded(); },
     {{kNone, ""},
      {kLoaded, "LOADED"},
      {kLoaded, ""},
      {kActivating, ""},
      {kActive, ""},
      {kStuck, ""}}},
    {"unload",
     [](Rig& r) { r.core.OnMessage(UnloadMessage(), 0); },
     {{kNone, "FAILED 5"},
      {kLoading, ""},  // answered when it is loaded
      {kNone, "UNLOADED"},
      {kNone, "UNLOADED"},
      {kNone, "UNLOADED"},
      {kNone, "UNLOADED"}}},
    {"activate",
     [](Rig& r) { r.core.OnMessage(Activation(++r.epoch), 0); },
     {{kNone, "FAILED 9"},
      {kLoading, "FAILED 9"},
      {kActivating, ""},
      {kActivating, "FAILED 10"},  // the activation before it
      {kActivating, ""},           // its edges go on, if the next stage answers
      {kActivating, ""}}},
    {"plan",
     [](Rig& r) { r.Plan(); },
     {{kNone, "report 5"},
      {kLoading, "report 5"},
      {kLoaded, "report 9"},
      {kActivating, ""},
      {kActive, ""},
      {kStuck, ""}}},
    {"edge-up",
     [](Rig& r) { r.core.OnEdgeUp(Out(), {}); },
     {{kNone, ""},
      {kLoading, ""},
      {kLoaded, ""},
      {kActive, "ACTIVE"},
      {kActive, ""},
      {kStuck, ""}}},
    {"edge-down",
     [](Rig& r) { r.core.OnEdgeDown(Out(), absl::UnavailableError("it broke")); },
     {{kNone, ""},
      {kLoading, ""},
      {kLoaded, ""},
      {kStuck, "FAILED 14"},
      {kStuck, "report 14"},
      {kStuck, ""}}},  // told once in an epoch
    {"nccl-id",
     [](Rig& r) { r.core.OnNcclId(In(), "an id"); },
     {{kNone, ""},
      {kLoading, ""},
      {kLoaded, ""},
      {kActivating, "edge id"},
      {kActive, "edge id"},
      {kStuck, "edge id"}}},
    {"hidden",
     [](Rig& r) { r.Hidden(); },
     {{kNone, ""},
      {kLoading, ""},
      {kLoaded, "report 9"},
      {kActivating, ""},
      {kActive, ""},
      {kStuck, ""}}},
    {"sampled",
     [](Rig& r) { r.Sampled(); },  // a middle stage takes none
     {{kNone, ""},
      {kLoading, ""},
      {kLoaded, "report 9"},
      {kStuck, "report 3"},
      {kStuck, "report 3"},
      {kStuck, ""}}},
    {"begin",
     [](Rig& r) { r.Begin(); },
     {{kNone, "report 5"},
      {kLoading, "report 5"},
      {kLoaded, "report 9"},
      {kActivating, ""},
      {kActive, ""},
      {kStuck, ""}}},
    {"finish",
     [](Rig& r) { r.Finish(); },
     {{kNone, "report 5"},
      {kLoading, "report 5"},
      {kLoaded, "report 9"},
      {kActivating, "report 0"},
      {kActive, "report 0"},
      {kStuck, "report 0"}}},
    {"detach",
     [](Rig& r) { r.core.OnDetached(0); },
     {{kNone, ""}, {kNone, ""}, {kLoaded, ""}, {kActivating, ""}, {kActive, ""}, {kStuck, ""}}},
    {"attach",
     [](Rig& r) { r.core.OnWelcome(WelcomeOf(1)); },
     {{kNone, ""}, {kLoading, ""}, {kLoaded, ""}, {kActivating, ""}, {kActive, ""}, {kStuck, ""}}},
    {"orphan",
     [](Rig& r) { r.Orphan(); },
     {{kNone, ""}, {kNone, ""}, {kNone, ""}, {kNone, ""}, {kNone, ""}, {kNone, ""}}},
};

TEST(WorkerCoreTest, EveryEventInEveryState) {
  for (const Case& one : kCases) {
    for (size_t i = 0; i < std::size(kStates); ++i) {
      SCOPED_TRACE(std::string(one.event) + " in state " + std::to_string(i));
      Rig r(kStates[i]);
      ASSERT_EQ(r.core.StateOf(kStage), kStates[i]);
      r.ports.told.clear();
      one.bring(r);
      EXPECT_EQ(r.core.StateOf(kStage), one.answers[i].state);
      EXPECT_EQ(r.ports.told, one.answers[i].told);
      EXPECT_TRUE(r.core.CheckIntegrity().ok()) << r.core.CheckIntegrity();
    }
  }
}

// The bug: the cache became small at once where what was held then fitted, though a plan from before still
// needed more, until a later one closed it.
TEST(WorkerCoreTest, ASmallerCacheWaitsForPlansThatStillNeedMore) {
  Rig r(State::kActive);
  const auto plan = [&](uint64_t step_id, const auto& fill) {
    v1::ToWorker message;
    v1::StepPlan& step = *message.mutable_step();
    step.set_stage_id(kStage);
    step.mutable_epoch()->set_term(1);
    step.mutable_epoch()->set_counter(r.counter());
    step.set_step_id(step_id);
    fill(&step);
    r.core.OnMessage(std::move(message), 0);
  };
  const auto run = [&](uint64_t step_id, uint32_t rows) {
    if (rows > 0) {
      r.core.OnHidden(kStage,
                      {{1, r.counter()},
                       StepId{step_id},
                       rows,
                       std::vector<std::byte>(rows * kFakeHiddenRowBytes)},
                      0);
    }
    ASSERT_TRUE(r.core.NextReady());
    r.core.BeginStep(kStage, &Clock);
    r.core.FinishStep(kStage, &Clock);
  };
  // Two blocks a sequence: 2, 6, 2.
  plan(1, [](v1::StepPlan* p) {
    AddOpen(p, 9);
    AddRows(p, 9, 0, {1, 2, 3});
  });
  plan(2, [](v1::StepPlan* p) {
    AddOpen(p, 10);
    AddOpen(p, 11);
    AddRows(p, 10, 0, {1});
    AddRows(p, 11, 0, {1});
  });
  plan(3, [](v1::StepPlan* p) {
    AddClose(p, 10);
    AddClose(p, 11);
  });
  run(1, 3);
  r.ports.told.clear();
  v1::ToWorker resize;
  resize.mutable_resize_cache()->set_stage_id(kStage);
  resize.mutable_resize_cache()->set_cache_bytes(4 * kFakeBlockBytes);
  r.core.OnMessage(std::move(resize), 0);
  EXPECT_EQ(r.ports.told, "");
  run(2, 2);
  EXPECT_EQ(r.ports.told, "report 0");
  run(3, 0);
  EXPECT_EQ(r.ports.told, "report 0, report 0, resized 4");
  EXPECT_TRUE(r.core.CheckIntegrity().ok()) << r.core.CheckIntegrity();
}

TEST(WorkerCoreTest, AnUnloadThatMeetsALoadIsAnsweredByIt) {
  Rig r(State::kLoading);
  r.core.OnMessage(UnloadMessage(), 0);
  r.Loaded();
  EXPECT_EQ(r.ports.told, "UNLOADED");
  EXPECT_EQ(r.core.StateOf(kStage), State::kNone);
}

TEST(WorkerCoreTest, WhichLinkFailedIsTold) {
  const auto ends = [](const v1::LinkFailure& link) {
    return std::to_string(link.from_stage_id()) + " to " + std::to_string(link.to_stage_id());
  };
  const std::string out =
      std::to_string(Out().from_stage_id) + " to " + std::to_string(Out().to_stage_id);
  {
    Rig r(State::kActivating);
    r.core.OnEdgeDown(Out(), absl::DeadlineExceededError("no answer"));
    EXPECT_EQ(ends(r.ports.messages.back().stage_state().failed_link()), out);
  }
  for (const Edge& edge : {In(), Out()}) {
    Rig r(State::kActive);
    r.core.OnEdgeDown(edge, absl::UnavailableError("it broke"));
    const v1::StageReport& report = r.ports.messages.back().report();
    EXPECT_EQ(ends(report.failed_link()),
              std::to_string(edge.from_stage_id) + " to " + std::to_string(edge.to_stage_id));
    EXPECT_EQ(report.failed_nccl_edge(), 0u);
  }
}

TEST(WorkerCoreTest, EdgesGoOnWhileTheirIdsStay) {
  Rig r(State::kActive);
  EXPECT_EQ(r.transport.calls, " expect 21 connect 22");
  r.transport.calls.clear();
  r.core.OnMessage(Activation(++r.epoch), 0);
  EXPECT_EQ(r.transport.calls, " probe");
  // The bug: that it had worked was taken for a proof that it does.
  EXPECT_EQ(r.core.StateOf(kStage), State::kActivating);
  r.core.OnEdgeUp(Out(), {});
  EXPECT_EQ(r.core.StateOf(kStage), State::kActive);
  r.transport.calls.clear();
  // A newer one takes the place of the one before.
  v1::ToWorker other = Activation(++r.epoch);
  other.mutable_activate_stage()->set_next_edge_id(30);
  r.core.OnMessage(other, 0);
  EXPECT_EQ(r.transport.calls, " connect 30");
  // What the old one says does not matter any more.
  r.ports.told.clear();
  r.core.OnEdgeDown(Out(), absl::UnavailableError("it broke"));
  r.core.OnEdgeUp(Out(), {});
  EXPECT_EQ(r.ports.told, "");
  EXPECT_EQ(r.core.StateOf(kStage), State::kActivating);
  // One that broke is opened anew, whatever its id.
  r.core.OnEdgeDown(In(), absl::UnavailableError("it broke"));
  r.transport.calls.clear();
  r.core.OnMessage(Activation(++r.epoch), 0);
  EXPECT_EQ(r.transport.calls, " expect 21 connect 22");
}

// One that stayed while the other was torn down had a receive posted that never ended, and NCCL's free
// of the other's memory waited for it.
TEST(WorkerCoreTest, NcclEdgesOfAnEpochEndTogetherAndBeforeTheNext) {
  Rig r(State::kLoaded);
  const auto enter = [&r](uint64_t in, uint64_t out, bool out_over_nccl) {
    v1::ToWorker message = Activation(++r.epoch);
    v1::ActivateStage& activate = *message.mutable_activate_stage();
    activate.set_edge_id(in);
    activate.set_edge_over_nccl(true);
    activate.set_next_edge_id(out);
    if (out_over_nccl) activate.set_next_nccl_id(std::string(limits::kNcclIdBytes, 'x'));
    r.transport.calls.clear();
    r.core.OnMessage(message, 0);
    return r.transport.calls;
  };
  const auto broken = [&r](Edge edge, uint64_t id) {
    edge.id = id;
    edge.over_nccl = true;
    r.transport.calls.clear();
    r.ports.told.clear();
    r.core.OnEdgeDown(edge, absl::UnavailableError("it broke"));
    return r.transport.calls;
  };
  EXPECT_EQ(enter(31, 32, true), " expect 31 connect 32");
  EXPECT_EQ(enter(41, 42, true), " disconnect forget expect 41 connect 42");
  EXPECT_EQ(broken(Out(), 42), " disconnect forget");
  EXPECT_EQ(r.ports.told, "FAILED 14");
  EXPECT_EQ(broken(In(), 41), "") << "it is gone";
  EXPECT_EQ(enter(51, 52, true), " expect 51 connect 52");
  EXPECT_EQ(broken(In(), 51), " disconnect forget");
  EXPECT_EQ(r.ports.told, "report 14");
  // An edge over gRPC is not bound to an epoch.
  EXPECT_EQ(enter(61, 62, false), " expect 61 connect 62");
  EXPECT_EQ(enter(71, 62, false), " forget expect 71");
  EXPECT_EQ(broken(In(), 71), " forget");
}

TEST(WorkerCoreTest, HelloTellsOfStagesThatAreLoaded) {
  Rig r(State::kLoading);
  v1::Hello hello;
  r.core.FillHello(&hello);
  EXPECT_EQ(hello.held_stages_size(), 0);
  r.Loaded();
  r.core.OnDetached(0);
  r.core.FillHello(&hello);
  EXPECT_EQ(hello.term(), 1u);
  ASSERT_EQ(hello.held_stages_size(), 1);
  EXPECT_EQ(hello.held_stages(0).stage_id(), kStage);
  EXPECT_EQ(hello.held_stages(0).layer_begin(), 2u);
  EXPECT_EQ(hello.held_stages(0).layer_end(), 4u);
  EXPECT_EQ(hello.held_stages(0).cache_bytes(), 100 * kFakeBlockBytes);
  // Another term's coordinator gets none of them.
  r.core.OnWelcome(WelcomeOf(2));
  EXPECT_EQ(r.core.num_stages(), 0u);
}

TEST(WorkerCoreTest, RowsThatWillComeAreToldWithTheirPlan) {
  Rig r(State::kActive);
  r.Plan();
  EXPECT_EQ(r.ports.rows_due, 3u);
}

}  // namespace
}  // namespace strait

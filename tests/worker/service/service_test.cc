// SPDX-License-Identifier: Apache-2.0
//
// Defends: a worker answers everything that a coordinator asks exactly once, refuses what makes no
// sense without losing its other stages, and attaches again with nothing when its coordinator is
// gone or silent.
#include <array>
#include <atomic>
#include <functional>
#include <mutex>
#include <set>
#include <thread>

#include "proto/wire/version.h"
#include "tests/worker/service/service_fixture.h"

namespace strait {
namespace {

TEST_F(WorkerTest, SaysWhoItIs) {
  const v1::Hello hello = coordinator_.Welcome();
  EXPECT_EQ(hello.wire_version(), kWireVersion);
  EXPECT_EQ(hello.name(), "tested");
  EXPECT_EQ(hello.data_address(), worker_->data_address());
  EXPECT_EQ(hello.memory_bytes(), uint64_t{1} << 24);
  EXPECT_EQ(hello.model_fingerprint(), 42u);
  EXPECT_EQ(hello.weights_fingerprint(), 43u);
  EXPECT_EQ(hello.cache_row_bytes(), 8u);
  EXPECT_EQ(hello.stage_costs().layer_bytes_size(), 3);
  EXPECT_EQ(hello.stage_costs().edge_bytes(), 0u) << "its edges go through host memory";
  EXPECT_EQ(hello.numerics_id(), "hash");
  EXPECT_NE(hello.instance(), 0u);
  for (int i = 0; i < 3000 && coordinator_.beats < 3; ++i) std::this_thread::sleep_for(10ms);
  EXPECT_GE(coordinator_.beats, 3);
}

TEST_F(WorkerTest, LoadsAndUnloads) {
  coordinator_.Welcome();
  Load(1, 0, 3);
  ExpectState(1, v1::StageState::LOADED);
  EXPECT_GT(backend_.used_bytes(), 0u);
  v1::ToWorker unload;
  unload.mutable_unload_stage()->set_stage_id(1);
  coordinator_.Send(unload);
  ExpectState(1, v1::StageState::UNLOADED);
  EXPECT_EQ(backend_.used_bytes(), 0u);
  coordinator_.Send(unload);
  ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kNotFound);
}

TEST_F(WorkerTest, RefusesWhatMakesNoSense) {
  coordinator_.Welcome();
  for (auto [begin, end, blocks] : std::vector<std::array<uint32_t, 3>>{
           {3, 3, 1}, {4, 2, 1}, {0, 7, 1}, {0, 0xffffffff, 1}, {0, 3, 0}}) {
    Load(1, begin, end, blocks);
    ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kInvalidArgument);
  }
  Load(0, 0, 3);
  ExpectState(0, v1::StageState::FAILED, absl::StatusCode::kInvalidArgument);
  Load(1, 0, 3, 0xffffffff);
  ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kResourceExhausted);
  Load(1, 0, 3);
  Load(1, 0, 3);
  // The second is refused while the first loads, or after: both orders are right.
  std::set<int> states;
  for (int i = 0; i < 2; ++i) states.insert(coordinator_.Answer().stage_state().state());
  EXPECT_EQ(states, (std::set<int>{v1::StageState::LOADED, v1::StageState::FAILED}));
  coordinator_.Send(Activation(5, 1, 0, 1));
  ExpectState(5, v1::StageState::FAILED, absl::StatusCode::kFailedPrecondition);
  coordinator_.Send(Activation(1, 1, 3, 2));
  ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kInvalidArgument);
  coordinator_.Send(Activation(1, 1, 0, 2));  // without a next stage
  ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kInvalidArgument);
  v1::ToWorker nowhere = Activation(1, 1, 0, 2);
  nowhere.mutable_activate_stage()->set_next_stage_id(2);
  nowhere.mutable_activate_stage()->set_next_edge_nonce(7);
  nowhere.mutable_activate_stage()->set_next_edge_id(kEdge);
  nowhere.mutable_activate_stage()->set_next_data_address("no address");
  coordinator_.Send(nowhere);
  ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kInvalidArgument);
  v1::ToWorker open = Activation(1, 1, 0, 2);  // an edge that anyone could open
  open.mutable_activate_stage()->set_next_stage_id(2);
  open.mutable_activate_stage()->set_next_edge_id(kEdge);
  open.mutable_activate_stage()->set_next_data_address("127.0.0.1:1");
  coordinator_.Send(open);
  ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kInvalidArgument);
  Load(2, 3, 6);
  ExpectState(2, v1::StageState::LOADED);
  v1::ToWorker last = Activation(2, 1, 1, 2);
  last.mutable_activate_stage()->set_previous_stage_id(1);
  coordinator_.Send(last);
  ExpectState(2, v1::StageState::FAILED, absl::StatusCode::kInvalidArgument);
}

TEST_F(WorkerTest, TheEdgeOfSampledIdsIsToldWholeOrNotAtAll) {
  coordinator_.Welcome();
  Load(1, 0, 3);
  ExpectState(1, v1::StageState::LOADED);
  using Spoil = std::function<void(v1::ActivateStage*)>;
  for (const Spoil& spoil : {
           Spoil([](auto* a) { a->set_sampled_edge_nonce(0); }),  // an edge that anyone could open
           Spoil([](auto* a) { a->set_sampled_edge_id(0); }),
           Spoil([](auto* a) { a->set_last_stage_id(0); }),
           Spoil([](auto* a) { a->set_grants(false); }),
           Spoil([](auto* a) { a->set_first_stage_id(1); }),
           Spoil([](auto* a) { a->set_first_data_address("127.0.0.1:1"); }),
       }) {
    v1::ToWorker message = Activation(1, 1, 0, 2);
    v1::ActivateStage* activate = message.mutable_activate_stage();
    activate->set_next_stage_id(2);
    activate->set_next_data_address("127.0.0.1:1");
    activate->set_next_edge_nonce(7);
    activate->set_next_edge_id(kEdge);
    activate->set_grants(true);
    activate->set_last_stage_id(2);
    activate->set_sampled_edge_nonce(8);
    activate->set_sampled_edge_id(kEdge + 1);
    spoil(activate);
    coordinator_.Send(message);
    ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kInvalidArgument);
  }
}

// Regression: what a worker quoted of a request went back whole, megabytes of it, and one byte that
// is no UTF-8 in an error's text made the whole report unreadable.
TEST_F(WorkerTest, ErrorMessagesAreBounded) {
  coordinator_.Welcome();
  Load(1, 0, 3);
  ExpectState(1, v1::StageState::LOADED);
  v1::ToWorker nowhere = Activation(1, 1, 0, 2);
  nowhere.mutable_activate_stage()->set_next_stage_id(2);
  nowhere.mutable_activate_stage()->set_next_edge_nonce(7);
  nowhere.mutable_activate_stage()->set_next_edge_id(kEdge);
  nowhere.mutable_activate_stage()->set_next_data_address(std::string(1 << 20, '\x1b'));
  coordinator_.Send(nowhere);
  const v1::FromWorker answer = coordinator_.Answer();
  ASSERT_EQ(answer.stage_state().state(), v1::StageState::FAILED) << answer.ShortDebugString();
  EXPECT_LE(answer.stage_state().error_message().size(), limits::kMaxErrorMessageBytes);
  EXPECT_EQ(answer.stage_state().error_message().find('\x1b'), std::string::npos);
}

TEST_F(WorkerTest, ActivationFailsWhenTheNextStageIsNotThere) {
  coordinator_.Welcome();
  Load(1, 0, 3);
  ExpectState(1, v1::StageState::LOADED);
  v1::ToWorker activation = Activation(1, 1, 0, 2);
  activation.mutable_activate_stage()->set_next_stage_id(2);
  activation.mutable_activate_stage()->set_next_edge_nonce(7);
  activation.mutable_activate_stage()->set_next_edge_id(kEdge);
  activation.mutable_activate_stage()->set_next_data_address("127.0.0.1:1");
  coordinator_.Send(activation);
  ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kUnavailable);
}

TEST_F(WorkerTest, RunsStepsThroughTwoStagesAndAnEpochLater) {
  coordinator_.Welcome();
  Load(1, 0, 3);
  Load(2, 3, 6);
  ExpectState(1, v1::StageState::LOADED);
  ExpectState(2, v1::StageState::LOADED);
  RunTwoEpochs([this](uint64_t epoch) { TwoStages(epoch); });
  // A plan of the epoch before is dropped; one that leaves a gap is refused.
  coordinator_.Send(Plan(1, 1, 3, {4}, 5, false));
  coordinator_.Send(Plan(1, 2, 7, {4}, 5, false));
  v1::FromWorker refused = coordinator_.Answer();
  EXPECT_EQ(refused.report().step_id(), 7u);
  EXPECT_EQ(static_cast<absl::StatusCode>(refused.report().error_code()),
            absl::StatusCode::kFailedPrecondition);
  coordinator_.Send(Plan(77, 2, 3, {4}, 5, false));
  refused = coordinator_.Answer();
  EXPECT_EQ(refused.report().stage_id(), 77u);
  EXPECT_EQ(static_cast<absl::StatusCode>(refused.report().error_code()),
            absl::StatusCode::kNotFound);
}

// A backend that computes by itself, like a GPU.
class WorkerAheadTest : public WorkerTest {
 protected:
  static constexpr uint64_t kStage = 1;

  WorkerAheadTest() {
    backend_.rows_ahead = 100;
    backend_.done = false;
    coordinator_.Welcome();
    Load(kStage, 0, 6);
    ExpectState(kStage, v1::StageState::LOADED);
    coordinator_.Send(Activation(kStage, 1, 0, 1));
    ExpectState(kStage, v1::StageState::ACTIVE);
    coordinator_.Send(Plan(kStage, 1, 1, {5, 6, 7, 8}, 0, true));
    v1::ToWorker granted = Plan(kStage, 1, 2, {}, 4, false);
    granted.mutable_step()->mutable_sequences(0)->mutable_sampled()->set_step_id(1);
    granted.mutable_step()->mutable_sequences(0)->mutable_logits(0)->set_offset(0);
    coordinator_.Send(granted);
    // The second is begun while the first computes.
    for (int i = 0; i < 30'000 && backend_.late_ids == 0; ++i) std::this_thread::sleep_for(1ms);
    EXPECT_EQ(backend_.late_ids, 1u);
  }
};

TEST_F(WorkerAheadTest, TheLoopGoesOnWhileAStepComputes) {
  Load(2, 0, 1);
  ExpectState(2, v1::StageState::LOADED);  // and nothing was reported before
  backend_.done = true;
  SequenceSpec spec;
  spec.prompt = {5, 6, 7, 8};
  spec.max_tokens = 2;
  spec.ignore_eos = true;
  spec.seed = 3;
  spec.temperature = 0;
  const sim::Expected expected = sim::Expect(spec, shape_);
  for (const uint64_t step : {1, 2}) {
    const v1::FromWorker message = coordinator_.Answer();
    ASSERT_TRUE(message.has_report()) << message.ShortDebugString();
    EXPECT_EQ(message.report().step_id(), step);
    EXPECT_EQ(message.report().error_code(), 0u) << message.ShortDebugString();
    ASSERT_EQ(message.report().results_size(), 1);
    EXPECT_EQ(message.report().results(0).sampled().token_id(), expected.tokens[step - 1].id);
  }
}

TEST_F(WorkerAheadTest, ANewEpochDropsWhatIsBegun) {
  coordinator_.Send(Activation(kStage, 2, 0, 1));
  ExpectState(kStage, v1::StageState::ACTIVE);  // and nothing was reported before
  backend_.done = true;
  coordinator_.Send(Plan(kStage, 2, 1, {5, 6}, 0, true));
  const v1::FromWorker message = coordinator_.Answer();
  ASSERT_TRUE(message.has_report()) << message.ShortDebugString();
  EXPECT_EQ(message.report().epoch().counter(), 2u);
  EXPECT_EQ(message.report().error_code(), 0u) << message.ShortDebugString();
}

TEST_F(WorkerAheadTest, AStageGoesWithWhatIsBegun) {
  v1::ToWorker unload;
  unload.mutable_unload_stage()->set_stage_id(kStage);
  coordinator_.Send(unload);
  ExpectState(kStage, v1::StageState::UNLOADED);
  EXPECT_EQ(backend_.used_bytes(), 0u);
}

// What was begun when the coordinator was lost ends as it may; the rows of it are not told, as nobody
// knows whether they are right.
TEST_F(WorkerAheadTest, ALostCoordinatorLeavesTheStageAndItsFinishedRows) {
  coordinator_.End(absl::AbortedError("the stream breaks"));
  const v1::Hello hello = coordinator_.Welcome();
  ASSERT_EQ(hello.held_stages_size(), 1);
  EXPECT_EQ(hello.held_stages(0).stage_id(), kStage);
  coordinator_.Send(Activation(kStage, 2, 0, 1));
  v1::FromWorker active = coordinator_.Answer();
  ASSERT_EQ(active.stage_state().state(), v1::StageState::ACTIVE) << active.ShortDebugString();
  ASSERT_EQ(active.stage_state().held_size(), 1);
  EXPECT_EQ(active.stage_state().held(0).sequence_id(), 9u);
  EXPECT_EQ(active.stage_state().held(0).rows(), 0u);
  backend_.done = true;
  coordinator_.Send(Plan(kStage, 2, 1, {5, 6, 7, 8}, 0, true));
  EXPECT_EQ(coordinator_.Answer().report().error_code(), 0u);
  // Again, when it is finished.
  coordinator_.Send(Activation(kStage, 3, 0, 1));
  active = coordinator_.Answer();
  ASSERT_EQ(active.stage_state().held_size(), 1) << active.ShortDebugString();
  EXPECT_EQ(active.stage_state().held(0).rows(), 4u);
}

TEST_F(WorkerTest, BrokenEdgeIsToldOnce) {
  coordinator_.Welcome();
  Load(1, 0, 3);
  Load(2, 3, 6);
  ExpectState(1, v1::StageState::LOADED);
  ExpectState(2, v1::StageState::LOADED);
  TwoStages(1);
  // The second stage goes: its edge ends.
  v1::ToWorker unload;
  unload.mutable_unload_stage()->set_stage_id(2);
  coordinator_.Send(unload);
  ExpectState(2, v1::StageState::UNLOADED);
  const v1::FromWorker told = coordinator_.Answer();
  ASSERT_TRUE(told.has_report()) << told.ShortDebugString();
  EXPECT_EQ(told.report().stage_id(), 1u);
  EXPECT_EQ(told.report().step_id(), 0u);
  EXPECT_NE(told.report().error_code(), 0u);
  coordinator_.Send(Plan(1, 1, 1, {4, 5}, 0, true));
  const v1::FromWorker report = coordinator_.Answer();
  EXPECT_EQ(report.report().step_id(), 1u);
  coordinator_.Send(unload);
  ExpectState(2, v1::StageState::FAILED, absl::StatusCode::kNotFound);
}

TEST_F(WorkerTest, AttachesAgainWithItsStages) {
  const v1::Hello before = coordinator_.Welcome();
  EXPECT_EQ(before.held_stages_size(), 0);
  Load(1, 0, 3, 600);
  ExpectState(1, v1::StageState::LOADED);
  coordinator_.End(absl::AbortedError("the stream breaks"));
  const v1::Hello after = coordinator_.Welcome();
  EXPECT_EQ(after.instance(), before.instance());
  EXPECT_EQ(after.data_address(), before.data_address());
  EXPECT_EQ(after.term(), 1u);
  ASSERT_EQ(after.held_stages_size(), 1);
  EXPECT_EQ(after.held_stages(0).stage_id(), 1u);
  EXPECT_EQ(after.held_stages(0).layer_begin(), 0u);
  EXPECT_EQ(after.held_stages(0).layer_end(), 3u);
  EXPECT_EQ(after.held_stages(0).cache_bytes(), 600 * shape_.block_bytes);
  Load(1, 0, 3);
  ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kAlreadyExists);
  coordinator_.Send(Activation(1, 1, 0, 2));
  ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kInvalidArgument);  // it is there
}

TEST_F(WorkerTest, ACoordinatorOfAnotherTermGetsAnEmptyWorker) {
  coordinator_.Welcome();
  Load(1, 0, 3);
  ExpectState(1, v1::StageState::LOADED);
  coordinator_.End(absl::AbortedError("the coordinator is replaced"));
  coordinator_.term = 2;
  EXPECT_EQ(coordinator_.Welcome().held_stages_size(), 1);
  Load(1, 0, 3);  // the id is free, and so is the memory
  ExpectState(1, v1::StageState::LOADED);
}

TEST_F(WorkerTest, OrphanedStagesGoInTime) {
  coordinator_.Welcome();
  Load(1, 0, 3);
  ExpectState(1, v1::StageState::LOADED);
  coordinator_.End(absl::AbortedError("the stream breaks"));
  EXPECT_TRUE(coordinator_.Next().has_hello());  // it dials, and nobody welcomes it
  for (int i = 0; i < 30'000 && backend_.used_bytes() > 0; ++i) std::this_thread::sleep_for(1ms);
  EXPECT_EQ(backend_.used_bytes(), 0u);
  // That Hello told of a stage which has gone: its Welcome comes too late, and the next one tells of none.
  v1::ToWorker welcome;
  welcome.mutable_welcome()->set_worker_id(1);
  welcome.mutable_welcome()->set_term(1);
  coordinator_.Send(welcome);
  const v1::FromWorker again = coordinator_.Answer();
  ASSERT_TRUE(again.has_hello()) << again.ShortDebugString();
  EXPECT_EQ(again.hello().held_stages_size(), 0);
}

TEST_F(WorkerTest, SilenceOfTheCoordinatorEndsTheSession) {
  coordinator_.Welcome(/*silence_timeout_ms=*/200);
  Load(1, 0, 3);
  ExpectState(1, v1::StageState::LOADED);
  coordinator_.answer_beats = false;
  coordinator_.Welcome();
}

TEST_F(WorkerTest, AnsweredHeartbeatsKeepAnIdleSession) {
  coordinator_.Welcome(/*silence_timeout_ms=*/2000);
  for (int i = 0; i < 3000 && coordinator_.beats < 150; ++i) std::this_thread::sleep_for(10ms);
  Load(1, 0, 3);
  ExpectState(1, v1::StageState::LOADED);  // and no second Hello before it
}

TEST_F(WorkerTest, CoordinatorThatDoesNotBeginWithWelcomeIsLeft) {
  EXPECT_TRUE(coordinator_.Next().has_hello());
  v1::ToWorker shutdown;
  shutdown.mutable_load_stage()->set_stage_id(1);
  coordinator_.Send(shutdown);
  coordinator_.Welcome();
  Load(1, 0, 3);
  ExpectState(1, v1::StageState::LOADED);
}

TEST_F(WorkerTest, ShutdownEndsTheLoop) {
  coordinator_.Welcome();
  v1::ToWorker shutdown;
  shutdown.mutable_shutdown()->set_reason("the test says so");
  coordinator_.Send(shutdown);
  thread_.join();
  thread_ = std::thread([] {});
}

}  // namespace
}  // namespace strait

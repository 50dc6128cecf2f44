// SPDX-License-Identifier: Apache-2.0
//
// Defends: a worker makes the id of an NCCL edge when it is asked to, joins the edge whose id it is
// told, runs steps over it, and names the edge when it fails, so that the next epoch can do without.
#include "tests/worker/service/service_fixture.h"
#include "tests/worker/transport/fake_nccl.h"
#include "worker/transport/nccl_transport.h"

namespace strait {
namespace {

struct Fakes {
  FakeFabric fabric;
  FakeFaults faults;
  std::shared_ptr<FakeNccl> nccl = std::make_shared<FakeNccl>(&fabric, &faults);
  std::shared_ptr<FakeDevice> device = std::make_shared<FakeDevice>(&fabric, &faults);
};

class NcclWorkerTest : private Fakes, public WorkerTest {
 protected:
  NcclWorkerTest() : WorkerTest(NcclOffer{nccl, device}) {}
  ~NcclWorkerTest() override {
    for (const std::string& problem : fabric.Problems()) ADD_FAILURE() << problem;
  }

  FakeFaults& nccl_faults() { return faults; }
  int num_posted() const { return nccl->posted; }

  void LoadBoth() {
    coordinator_.Welcome();
    Load(1, 0, 3);
    Load(2, 3, 6);
    ExpectState(1, v1::StageState::LOADED);
    ExpectState(2, v1::StageState::LOADED);
  }
  // As the coordinator does it: the receiver first, then the sender with the receiver's id.
  void TwoStagesOverNccl(uint64_t counter) {
    v1::ToWorker second = Activation(2, counter, 1, 2);
    v1::ActivateStage& to = *second.mutable_activate_stage();
    to.set_previous_stage_id(1);
    to.set_edge_nonce(70 + counter);
    to.set_edge_id(70 + counter);
    to.set_edge_over_nccl(true);
    to.set_max_step_tokens(16);
    coordinator_.Send(second);
    std::string id;
    std::set<uint64_t> active;
    while ((id.empty() || active.size() < 2) && !HasFailure()) {
      const v1::FromWorker message = coordinator_.Answer();
      if (message.has_edge_id()) {
        EXPECT_EQ(message.edge_id().stage_id(), 2u);
        EXPECT_EQ(message.edge_id().epoch().counter(), counter);
        id = message.edge_id().nccl_id();
        v1::ToWorker first = Activation(1, counter, 0, 2);
        v1::ActivateStage& from = *first.mutable_activate_stage();
        from.set_next_stage_id(2);
        from.set_next_data_address(worker_->data_address());
        from.set_next_edge_nonce(70 + counter);
        from.set_next_edge_id(70 + counter);
        from.set_next_nccl_id(id);
        from.set_max_step_tokens(16);
        coordinator_.Send(first);
        continue;
      }
      // The stage that enters first ends the edge of the epoch before.
      if (message.has_report() && message.report().epoch().counter() < counter) continue;
      ASSERT_TRUE(message.has_stage_state()) << message.ShortDebugString();
      ASSERT_EQ(message.stage_state().state(), v1::StageState::ACTIVE)
          << message.ShortDebugString();
      active.insert(message.stage_state().stage_id());
    }
  }
};

TEST_F(NcclWorkerTest, SaysWhatNcclItHasAndWhatItsEdgesTake) {
  const v1::Hello hello = coordinator_.Welcome();
  EXPECT_EQ(hello.nccl_version(), 22809u);
  EXPECT_EQ(hello.stage_costs().edge_bytes(), kNcclEdgeBytes);
  EXPECT_EQ(hello.stage_costs().edge_row_bytes(), kArenaSteps * backend_.hidden_row_bytes());
}

TEST_F(NcclWorkerTest, RunsStepsOverNcclAndAnEpochLater) {
  LoadBoth();
  RunTwoEpochs([this](uint64_t epoch) { TwoStagesOverNccl(epoch); });
  EXPECT_EQ(num_posted(), 8) << "hidden states went another way";
}

TEST_F(NcclWorkerTest, EdgeThatBreaksIsNamedByBothStages) {
  LoadBoth();
  TwoStagesOverNccl(1);
  nccl_faults().async_error = kNcclRemoteError;
  std::set<uint64_t> told;
  while (told.size() < 2 && !HasFailure()) {
    const v1::FromWorker message = coordinator_.Answer();
    ASSERT_TRUE(message.has_report()) << message.ShortDebugString();
    EXPECT_EQ(message.report().step_id(), 0u);
    EXPECT_EQ(message.report().failed_nccl_edge(), 2u);
    told.insert(message.report().stage_id());
  }
}

TEST_F(NcclWorkerTest, SetUpThatFailsIsNamed) {
  LoadBoth();
  nccl_faults().out_of_memory = true;
  v1::ToWorker first = Activation(1, 1, 0, 2);
  v1::ActivateStage& from = *first.mutable_activate_stage();
  from.set_next_stage_id(2);
  from.set_next_data_address(worker_->data_address());
  from.set_next_edge_nonce(71);
  from.set_next_edge_id(71);
  from.set_next_nccl_id(std::string(limits::kNcclIdBytes, 'x'));
  from.set_max_step_tokens(16);
  coordinator_.Send(first);
  const v1::FromWorker told = coordinator_.Answer();
  EXPECT_EQ(told.stage_state().state(), v1::StageState::FAILED) << told.ShortDebugString();
  EXPECT_EQ(told.stage_state().failed_nccl_edge(), 2u);
  // What makes no sense is refused before anything is dropped.
  from.mutable_epoch()->set_counter(2);
  from.set_next_nccl_id("short");
  coordinator_.Send(first);
  ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kInvalidArgument);
  from.set_next_nccl_id(std::string(limits::kNcclIdBytes, 'x'));
  from.set_max_step_tokens(0);
  coordinator_.Send(first);
  ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kInvalidArgument);
  from.set_max_step_tokens(limits::kMaxStepTokens + 1);
  coordinator_.Send(first);
  ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kInvalidArgument);
}

TEST_F(WorkerTest, WithoutNcclTheEdgeIsNamedAtOnce) {
  EXPECT_EQ(coordinator_.Welcome().nccl_version(), 0u);
  Load(2, 3, 6);
  ExpectState(2, v1::StageState::LOADED);
  v1::ToWorker second = Activation(2, 1, 1, 2);
  second.mutable_activate_stage()->set_previous_stage_id(1);
  second.mutable_activate_stage()->set_edge_nonce(71);
  second.mutable_activate_stage()->set_edge_id(71);
  second.mutable_activate_stage()->set_edge_over_nccl(true);
  second.mutable_activate_stage()->set_max_step_tokens(16);
  coordinator_.Send(second);
  ExpectState(2, v1::StageState::ACTIVE);
  const v1::FromWorker told = coordinator_.Answer();
  EXPECT_EQ(told.report().failed_nccl_edge(), 2u) << told.ShortDebugString();
}

}  // namespace
}  // namespace strait

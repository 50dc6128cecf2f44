// SPDX-License-Identifier: Apache-2.0
//
// Defends: what a worker does about moving rows when stages, coordinators and peers are not as they should be.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/worker/core/moves_fixture.h"

namespace strait {
namespace {

constexpr PlacementEpoch kPlacement = {1, 1};

class MovesTest : public testing::Test {
 protected:
  // Sequence 1 has 300 rows at the first pipeline, released, and blocks for them at the second.
  MovesTest() {
    p_.Grow(&p_.from, 1, &tokens_, 300);
    EXPECT_TRUE(p_.TurnUntil([&] { return p_.AllReported(p_.from); }));
    p_.Serve(1, kPlacement);
    p_.Import(1, kPlacement, 300);
    EXPECT_TRUE(p_.TurnUntil([&] { return p_.AllReported(p_.to); }));
  }
  ~MovesTest() override {
    p_.ExpectNothingUnderWay();
    p_.from.worker.core.DropStages();
    p_.to.worker.core.DropStages();
    p_.Read();
    EXPECT_EQ(p_.from.worker.taken + p_.to.worker.taken, 0);
  }
  absl::StatusCode ErrorOf(uint64_t stage) {
    return static_cast<absl::StatusCode>(p_.told[kPlacement].fetched[stage].error_code());
  }

  std::vector<TokenId> tokens_;
  TwoPipelines p_{1, {{0, 2}, {2, 6}}, {{0, 3}, {3, 6}}};
};

TEST_F(MovesTest, AStageThatIsNotHereIsToldSo) {
  v1::ToWorker message;
  message.mutable_fetch_rows()->set_stage_id(77);
  p_.SetPlacement(message.mutable_fetch_rows(), 1, kPlacement);
  p_.to.worker.core.OnMessage(message, p_.now_us);
  p_.Read();
  EXPECT_EQ(ErrorOf(77), absl::StatusCode::kNotFound);
  message.mutable_serve_rows()->set_stage_id(77);
  p_.from.worker.core.OnMessage(message, p_.now_us);
}

TEST_F(MovesTest, AWorkerWithoutARowTransferMovesNone) {
  ManyStages worker;
  v1::ToWorker message;
  message.mutable_fetch_rows()->set_stage_id(1);
  worker.core.OnMessage(message, 0);
  ASSERT_EQ(worker.ports.messages.size(), 1u);
  EXPECT_EQ(static_cast<absl::StatusCode>(worker.ports.messages[0].rows_fetched().error_code()),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(MovesTest, TheSecretIsAskedFor) {
  v1::ToWorker message;
  v1::ServeRows& serve = *message.mutable_serve_rows();
  p_.SetPlacement(&serve, 1, kPlacement);
  ToWire(p_.from.pipeline_epoch(), serve.mutable_epoch());
  serve.set_secret(TwoPipelines::kSecret + 1);
  for (const uint64_t stage : p_.from.stages) {
    serve.set_stage_id(stage);
    p_.from.worker.core.OnMessage(message, p_.now_us);
  }
  p_.Fetch(1, kPlacement, tokens_, 0, 300, false);
  ASSERT_TRUE(p_.TurnUntil([&] { return p_.told[kPlacement].num_errors == 2; }));
  for (const uint64_t stage : p_.to.stages) {
    EXPECT_EQ(ErrorOf(stage), absl::StatusCode::kPermissionDenied);
  }
}

TEST_F(MovesTest, WithItsCoordinatorTheSourceStopsServing) {
  p_.from.worker.core.OnDetached(p_.now_us);
  p_.Fetch(1, kPlacement, tokens_, 0, 300, false);
  for (int i = 0; i < 200; ++i) p_.Turn();
  EXPECT_FALSE(p_.Fetched(kPlacement, 300));
  EXPECT_EQ(p_.network.num_frames, 0u);
  // It stays as it is; the coordinator closes it.
  p_.to.Send(WithClose(p_.to.Plan(), 1));
  ASSERT_TRUE(p_.TurnUntil([&] { return p_.AllReported(p_.to); }));
  EXPECT_EQ(p_.to.worker.core.BlocksHeld(), 0u);
}

TEST_F(MovesTest, WithItsCoordinatorTheDestinationStopsFetchingAndKeepsItsBlocks) {
  p_.Fetch(1, kPlacement, tokens_, 0, 100, false);
  ASSERT_TRUE(p_.TurnUntil([&] { return p_.Fetched(kPlacement, 100); }));
  p_.Fetch(1, kPlacement, tokens_, 100, 300, false);
  p_.to.worker.core.OnDetached(p_.now_us);
  const uint64_t held = p_.to.worker.core.BlocksHeld();
  p_.told.clear();
  for (int i = 0; i < 200; ++i) p_.Turn();
  EXPECT_TRUE(p_.told.empty());
  EXPECT_EQ(p_.to.worker.core.BlocksHeld(), held);
  EXPECT_FALSE(p_.to.worker.core.CopiesRows());
}

TEST_F(MovesTest, ACacheThatBecomesSmallerStopsCopiesForAsLongAsThatTakes) {
  for (const auto& [id, model] : p_.to.worker.models) model->copy_faults.delay_polls = 2;
  p_.Fetch(1, kPlacement, tokens_, 0, 300, false);
  ASSERT_TRUE(p_.TurnUntil([&] { return p_.to.worker.core.MovesRows(); }));
  p_.to.worker.ResizeBlocks(p_.to.stages[0], 20 * 3);
  p_.to.worker.ResizeBlocks(p_.to.stages[1], 20 * 3);
  ASSERT_TRUE(p_.TurnUntil([&] { return p_.to.worker.cache.num_blocks() == 120; }));
  ASSERT_TRUE(p_.TurnUntil([&] { return p_.Fetched(kPlacement, 300); }));
  EXPECT_EQ(p_.told[kPlacement].num_errors, 0);
  p_.to.ExpectRows(1, tokens_);
}

TEST_F(MovesTest, AStageThatIsUnloadedAnswersWhoAsked) {
  for (const auto& [id, model] : p_.from.worker.models) model->copy_faults.delay_polls = 3;
  p_.Fetch(1, kPlacement, tokens_, 0, 300, false);
  ASSERT_TRUE(p_.TurnUntil([&] { return p_.from.worker.core.MovesRows(); }));
  for (const uint64_t stage : p_.from.stages) p_.from.worker.Unload(stage);
  ASSERT_TRUE(p_.TurnUntil([&] { return p_.told[kPlacement].num_errors > 0; }));
  EXPECT_EQ(ErrorOf(p_.to.stages[0]) == absl::StatusCode::kOk ? ErrorOf(p_.to.stages[1])
                                                              : ErrorOf(p_.to.stages[0]),
            absl::StatusCode::kAborted);
  // Whom it was not under way to waits for its coordinator.
  p_.to.Send(WithClose(p_.to.Plan(), 1));
}

}  // namespace
}  // namespace strait

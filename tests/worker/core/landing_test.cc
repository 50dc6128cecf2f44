// SPDX-License-Identifier: Apache-2.0
//
// Defends: rows come to a stage that is in no epoch yet, a landing, while those that have them serve; what came is
// there in the first epoch of the stage or of the one that follows it, bit for bit; what contradicts is refused by name.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/worker/core/moves_fixture.h"

namespace strait {
namespace {

constexpr PlacementEpoch kPlacement = {1, 1};
constexpr uint32_t kBlock = limits::kBlockTokens;

std::vector<ContentKey> Keys(uint64_t first, size_t count) {
  std::vector<ContentKey> keys;
  for (size_t i = 0; i < count; ++i) keys.push_back({first + i, 7});
  return keys;
}

class LandingTest : public testing::Test {
 protected:
  ~LandingTest() override {
    p_.ExpectNothingUnderWay();
    p_.from.worker.core.DropStages();
    p_.to.worker.core.DropStages();
    p_.Read();
    EXPECT_EQ(p_.from.worker.taken + p_.to.worker.taken, 0);
  }
  // Sequence `id` gets so many rows at the first pipeline, which serves them.
  void Grow(uint64_t id, uint32_t rows) {
    p_.Grow(&p_.from, id, &tokens_[id], rows);
    EXPECT_TRUE(p_.TurnUntil([&] { return p_.AllReported(p_.from); }));
    p_.Serve(id, kPlacement);
  }
  // Sequence `id` begins with two blocks of the other one's tokens, and gets so many rows more.
  void GrowLike(uint64_t other, uint64_t id, uint32_t rows) {
    tokens_[id] = {tokens_[other].begin(), tokens_[other].begin() + 2 * kBlock};
    v1::StepPlan plan = p_.from.Plan();
    AddOpen(&plan, id);
    AddRows(&plan, id, 0, tokens_[id]);
    p_.from.Send(plan);
    ASSERT_TRUE(p_.TurnUntil([&] { return p_.AllReported(p_.from); }));
    Grow(id, rows);
  }
  // A stage of the second worker that is never told to be active by itself.
  void Load(uint64_t stage, LayerRange layers, uint32_t blocks, std::vector<uint64_t> before = {}) {
    layers_[stage] = layers;
    p_.to.worker.Load(stage, layers, blocks, std::move(before));
    p_.to.worker.FinishLoads();
  }
  void Fetch(uint64_t stage, uint64_t id, uint32_t begin, uint32_t end,
             const std::vector<ContentKey>& keys = {}, PlacementEpoch placement = kPlacement) {
    v1::ToWorker message;
    v1::FetchRows& fetch = *message.mutable_fetch_rows();
    fetch.set_stage_id(stage);
    p_.SetPlacement(&fetch, id, placement);
    fetch.set_begin_row(begin);
    fetch.set_end_row(end);
    const std::vector<TokenId>& tokens = tokens_[id];
    fetch.mutable_tokens()->mutable_ids()->Add(tokens.begin() + begin, tokens.begin() + end);
    *fetch.mutable_prefix_keys() = Pack(keys);
    for (size_t s = 0; s < p_.from.stages.size(); ++s) {
      const LayerRange both = Intersection(p_.from.layers[s], layers_.at(stage));
      if (both.size() == 0) continue;
      v1::RowsSource* source = fetch.add_sources();
      source->set_layer_begin(both.begin);
      source->set_layer_end(both.end);
      source->set_stage_id(p_.from.stages[s]);
      ToWire(p_.from.pipeline_epoch(), source->mutable_epoch());
      source->set_data_address(p_.from.address);
      source->set_secret(TwoPipelines::kSecret);
    }
    p_.to.worker.core.OnMessage(std::move(message), p_.now_us);
  }
  void Drop(uint64_t stage, uint64_t id) {
    v1::ToWorker message;
    message.mutable_drop_landed()->set_stage_id(stage);
    message.mutable_drop_landed()->set_sequence_id(id);
    p_.to.worker.core.OnMessage(message, p_.now_us);
  }
  const v1::RowsFetched& Told(uint64_t stage, uint64_t id) {
    for (const v1::FromWorker& message : p_.to.worker.ports.messages) {
      if (message.has_rows_fetched() && message.rows_fetched().stage_id() == stage &&
          message.rows_fetched().sequence_id() == id) {
        told_[{stage, id}] = message.rows_fetched();
      }
    }
    return told_[{stage, id}];
  }
  // Reads for itself: TwoPipelines tells rows by placement alone.
  void Land(uint64_t stage, uint64_t id, uint32_t rows) {
    for (int i = 0; i < 100'000 && Told(stage, id).rows() < rows; ++i) {
      ASSERT_EQ(Told(stage, id).error_code(), 0u) << Told(stage, id).error_message();
      p_.now_us += 500;
      p_.to.worker.core.PollCopies(p_.now_us);
      if (p_.from.worker.core.CopiesRows()) p_.from.worker.core.PollCopies(p_.now_us);
      p_.network.Deliver(p_.now_us);
    }
    ASSERT_EQ(Told(stage, id).rows(), rows);
    p_.to.worker.ExpectSound();
  }
  void ExpectRefused(uint64_t stage, uint64_t id, absl::StatusCode code, const std::string& what) {
    p_.to.worker.core.PollCopies(p_.now_us);
    EXPECT_EQ(static_cast<absl::StatusCode>(Told(stage, id).error_code()), code);
    EXPECT_THAT(Told(stage, id).error_message(), testing::HasSubstr(what));
    told_.erase({stage, id});
    p_.to.worker.Told();
    p_.to.worker.ExpectSound();
  }
  void ExpectRows(uint64_t stage, uint64_t id) {
    const LatentCache& cache = p_.to.worker.core.FindStage(stage)->cache();
    const std::vector<TokenId>& tokens = tokens_[id];
    ASSERT_TRUE(cache.resident(SequenceId{id}));
    ASSERT_EQ(cache.length(SequenceId{id}), tokens.size());
    const LayerRange layers = layers_.at(stage);
    const auto tables = cache.PageTables(SequenceId{id});
    for (LayerIndex layer = layers.begin; layer < layers.end; ++layer) {
      for (uint32_t p = 0; p < tokens.size(); ++p) {
        ASSERT_EQ(p_.to.worker.cache.Peek(tables[layer - layers.begin][p / kBlock], p % kBlock),
                  FakeRow(layer, tokens[p], p))
            << "layer " << layer << ", position " << p;
      }
    }
  }
  // What the last ACTIVE told of it: rows, prefix blocks.
  std::pair<uint32_t, uint32_t> Held(uint64_t id) {
    for (const auto& held : p_.to.worker.ports.messages.back().stage_state().held()) {
      if (held.sequence_id() == id) return {held.rows(), held.prefix_blocks()};
    }
    return {0, 0};
  }
  uint32_t BlocksOf(uint64_t stage) { return p_.to.worker.core.FindStage(stage)->blocks_used(); }

  using Rows = std::pair<uint32_t, uint32_t>;
  TwoPipelines p_{1, {{0, 2}, {2, 6}}, {{0, 2}, {2, 6}}};
  std::map<uint64_t, std::vector<TokenId>> tokens_;
  std::map<uint64_t, LayerRange> layers_;
  std::map<std::pair<uint64_t, uint64_t>, v1::RowsFetched> told_;
};

TEST_F(LandingTest, WhatCameInRoundsIsHeldInTheFirstEpoch) {
  Grow(1, 150);
  Load(31, {0, 3}, 100);
  Load(32, {3, 6}, 100);
  for (const uint64_t stage : {31u, 32u}) Fetch(stage, 1, 0, 150, Keys(1, 1));
  for (const uint64_t stage : {31u, 32u}) Land(stage, 1, 150);
  Grow(1, 60);
  // The second block is a prefix block by now, the third one was not told to be.
  for (const uint64_t stage : {31u, 32u}) Fetch(stage, 1, 150, 210, Keys(1, 2));
  for (const uint64_t stage : {31u, 32u}) Land(stage, 1, 210);
  p_.to.worker.Activate({31, 32}, 1, 9);
  EXPECT_EQ(Held(1), (Rows{210, 2}));
  p_.to.worker.Activate({31, 32}, 0, 9);
  EXPECT_EQ(Held(1), (Rows{210, 2}));
  for (const uint64_t stage : {31u, 32u}) ExpectRows(stage, 1);
  p_.to.worker.ExpectSound();
}

TEST_F(LandingTest, KeysMayComeWithoutRows) {
  Grow(1, 130);
  Load(31, {0, 3}, 100);
  Fetch(31, 1, 0, 130);
  Land(31, 1, 130);
  Fetch(31, 1, 130, 130, Keys(1, 2));
  p_.to.worker.Activate({31, 32}, 0, 9);
  EXPECT_EQ(Held(1), (Rows{130, 2}));
  ExpectRows(31, 1);
}

TEST_F(LandingTest, AStageFollowsAnotherOneAndALanding) {
  Grow(1, 130);
  // The second worker has the same sequence's first two layers.
  v1::StepPlan plan = p_.to.Plan();
  AddOpen(&plan, 1);
  AddRows(&plan, 1, 0, tokens_[1]);
  p_.to.Send(plan);
  ASSERT_TRUE(p_.TurnUntil([&] { return p_.AllReported(p_.to); }));
  Load(31, {2, 4}, 2 * 40);
  Load(41, {0, 4}, 4 * 40, {21, 31});
  Fetch(31, 1, 0, 130);
  Land(31, 1, 130);
  p_.to.worker.Activate({41, 42}, 0, 9);
  EXPECT_EQ(Held(1), (Rows{130, 0}));
  ExpectRows(41, 1);
  EXPECT_EQ(BlocksOf(31), 0u);
  p_.to.worker.ExpectSound();
}

TEST_F(LandingTest, BlocksThatAnotherSequenceHasComeOnce) {
  Grow(1, 150);
  GrowLike(1, 2, 30);
  Load(31, {0, 3}, 100);
  Fetch(31, 1, 0, 150, Keys(1, 2));
  Land(31, 1, 150);
  EXPECT_EQ(BlocksOf(31), 3u * 3);
  Fetch(31, 2, 0, 158, Keys(1, 2));
  Land(31, 2, 158);
  EXPECT_EQ(BlocksOf(31), (3u + 1) * 3);
  EXPECT_EQ(Told(31, 2).fetched_bytes(), 30u * 3 * kHashRowBytes);
  // What nobody else has goes, what the other one has stays.
  Drop(31, 1);
  EXPECT_EQ(BlocksOf(31), 3u * 3);
  p_.to.worker.Activate({31, 32}, 0, 9);
  EXPECT_EQ(Held(1), (Rows{0, 0}));
  EXPECT_EQ(Held(2), (Rows{158, 2}));
  ExpectRows(31, 2);
}

// The bug: of two sequences whose rows came at once only one's blocks became prefix blocks, and the other one lost its rows
// when the stage that followed took them with those of old stages.
TEST_F(LandingTest, BlocksThatCameTwiceAreOne) {
  Grow(1, 150);
  GrowLike(1, 2, 30);
  Load(31, {0, 3}, 100);
  Fetch(31, 1, 0, 150, Keys(1, 2));
  Fetch(31, 2, 0, 158, Keys(1, 2));
  EXPECT_EQ(BlocksOf(31), 6u * 3);
  Land(31, 1, 150);
  Land(31, 2, 158);
  EXPECT_EQ(BlocksOf(31), (3u + 1) * 3);
  p_.to.worker.Activate({31, 32}, 0, 9);
  EXPECT_EQ(Held(1), (Rows{150, 2}));
  EXPECT_EQ(Held(2), (Rows{158, 2}));
  ExpectRows(31, 1);
  ExpectRows(31, 2);
}

TEST_F(LandingTest, AllOfASequenceMayBeThere) {
  Grow(1, 128);
  Load(31, {0, 3}, 100);
  Fetch(31, 1, 0, 128, Keys(1, 2));
  Land(31, 1, 128);
  tokens_[2] = tokens_[1];
  Fetch(31, 2, 0, 128, Keys(1, 2));
  Land(31, 2, 128);
  EXPECT_EQ(Told(31, 2).fetched_bytes(), 0u);
  EXPECT_EQ(BlocksOf(31), 2u * 3);
}

TEST_F(LandingTest, WhatContradictsIsRefusedByName) {
  Grow(1, 200);
  Load(31, {0, 3}, 3 * 3);
  Fetch(31, 1, 10, 20);
  ExpectRefused(31, 1, absl::StatusCode::kInvalidArgument, "nothing of it came");
  Fetch(31, 1, 0, 200, Keys(1, 4));
  ExpectRefused(31, 1, absl::StatusCode::kInvalidArgument, "4 blocks have keys");
  Fetch(31, 1, 0, 200);
  ExpectRefused(31, 1, absl::StatusCode::kResourceExhausted, "of 9 are taken");
  Fetch(31, 1, 0, 150, Keys(1, 2));
  Land(31, 1, 150);
  Fetch(31, 1, 150, 160, Keys(5, 2));
  ExpectRefused(31, 1, absl::StatusCode::kInvalidArgument, "other keys before");
  Drop(31, 1);
  EXPECT_EQ(BlocksOf(31), 0u);
  Fetch(31, 1, 0, 150, {}, {1, 2});
  Fetch(31, 1, 100, 140, {}, {1, 2});
  ExpectRefused(31, 1, absl::StatusCode::kInvalidArgument, "150 were asked for before");
  Drop(31, 1);
  Fetch(31, 1, 0, 150, {}, {1, 2});
  Fetch(31, 1, 150, 160, {}, {1, 3});
  ExpectRefused(31, 1, absl::StatusCode::kFailedPrecondition, "drop those first");
  Drop(31, 1);
  Load(51, {0, 2}, 2 * 40, {21});
  Fetch(51, 1, 0, 10);
  ExpectRefused(51, 1, absl::StatusCode::kFailedPrecondition, "is no landing");
  EXPECT_EQ(p_.to.worker.core.BlocksHeld(), 0u);
}

TEST_F(LandingTest, ItsEndWhileRowsComeLeavesNothing) {
  Grow(1, 150);
  Load(31, {0, 3}, 100);
  Load(41, {0, 3}, 100, {31});
  Fetch(31, 1, 0, 150);
  p_.network.Deliver(p_.now_us);
  p_.from.worker.core.PollCopies(p_.now_us);
  p_.network.Deliver(p_.now_us);
  // Some have come, or none: what is told is there.
  p_.to.worker.Activate({41, 42}, 0, 9);
  EXPECT_EQ(Held(1).first, 0u);
  p_.to.worker.Unload(31);
  p_.to.worker.ExpectSound();
  EXPECT_EQ(p_.to.worker.core.BlocksHeld(), 0u);
}

}  // namespace
}  // namespace strait

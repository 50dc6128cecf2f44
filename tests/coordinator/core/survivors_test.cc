// SPDX-License-Identifier: Apache-2.0
//
// Defends: what stages keep over an epoch is used to the last row that the journal confirms, and no
// further; a replay costs what the lost stage makes necessary and nothing at the stages behind it;
// whatever was told is kept or closed by the first plan.
#include "coordinator/core/survivors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <random>

#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr uint64_t kMemory = 100'000;

CoreOptions Options(uint32_t num_stages, uint32_t grant_depth = 1) {
  CoreOptions options;
  options.grant_depth = grant_depth;
  options.num_stages = num_stages;
  options.max_step_tokens = 64;
  options.prefill_chunk = 32;
  options.max_running = 64;
  return options;
}

// That went through its layers again, for the sake of a later stage.
uint64_t UnstoredRows(const Harness::FakeStage& stage) {
  return stage.rows_computed - stage.rows_stored;
}

TEST(SurvivorsTest, LayerPassesOfAReplayAreThoseThatTheLostStageNeeds) {
  for (const uint32_t depth : {1, 2}) {
    for (uint32_t killed = 0; killed < 3; ++killed) {
      SCOPED_TRACE(testing::Message() << "grant depth " << depth << ", stage " << killed);
      Harness h(Options(3, depth), SmallModel(6));
      std::vector<WorkerId> w = AttachAll(h, 3);
      constexpr uint64_t kResidents = 40;
      for (uint64_t i = 0; i < kResidents; ++i) h.Submit(OneSequence(20 + 7 * i % 50, 60));
      Rounds(h, w, 120);
      std::vector<uint64_t> computed, stored, told;
      std::vector<std::map<SequenceId, uint32_t>> had;
      for (const WorkerId id : w) {
        had.push_back(h.StageOf(id).lengths);
        ASSERT_EQ(had.back().size(), kResidents);
        computed.push_back(h.StageOf(id).rows_computed);
        stored.push_back(h.StageOf(id).rows_stored);
        EXPECT_EQ(computed.back(), stored.back()) << "nothing was lost yet";
      }
      // By the journal: all tokens but the last.
      std::vector<uint64_t> kept(3, 0);
      for (uint64_t i = 1; i <= kResidents; ++i) {
        const uint64_t tokens = 20 + 7 * (i - 1) % 50 + h.tokens[RequestId{i}].size();
        for (uint32_t s = 0; s < 3; ++s) {
          kept[s] += std::min<uint64_t>(had[s].at(SequenceId{i}), tokens - 1);
        }
      }
      const uint64_t kept_before = h.core.Stats().kept_rows;
      h.Lose(w[killed]);
      w[killed] = h.Attach(kMemory);
      ASSERT_TRUE(h.core.Ready());
      kept[killed] = computed[killed] = stored[killed] = 0;
      const uint64_t all_kept = kept[0] + kept[1] + kept[2];
      EXPECT_EQ(h.core.Stats().kept_rows - kept_before, all_kept);
      const uint64_t recomputed = h.core.Stats().recomputed_rows;
      h.Run();
      EXPECT_GT(h.core.Stats().recomputed_rows, recomputed);
      for (uint64_t i = 1; i <= kResidents; ++i) EXPECT_EQ(h.tokens[RequestId{i}].size(), 60u);
      const std::vector<bool> passes = {true, killed > 0, killed > 1};  // L,0,0  L,L,0  L,L,L
      for (uint32_t s = 0; s < 3; ++s) {
        SCOPED_TRACE(testing::Message() << "seen at stage " << s);
        const Harness::FakeStage& stage = h.StageOf(w[s]);
        const uint64_t unstored = UnstoredRows(stage);
        EXPECT_EQ(stage.rows_kept, kept[s]);
        EXPECT_EQ(unstored, s != killed && passes[s] ? kept[s] : 0);
      }
      // Each stage has had every row once, and stored none twice but those that were cut.
      const auto total = [&](uint32_t s) {
        return h.StageOf(w[s]).rows_stored - stored[s] + kept[s];
      };
      EXPECT_EQ(total(0), total(1));
      EXPECT_EQ(total(1), total(2));
      EXPECT_EQ(h.core.Stats().cache_bytes_used, 0u);
      EXPECT_THAT(h.problems, IsEmpty());
    }
  }
}

TEST(SurvivorsTest, StatusTellsRowsComputedAndStoredByStage) {
  Harness h(Options(2), SmallModel());
  std::vector<WorkerId> w = AttachAll(h, 2);
  h.Submit(OneSequence(30, 60));
  Rounds(h, w, 12);
  const uint64_t kept = h.StageOf(w[0]).lengths.at(SequenceId{1});
  h.Lose(w[1]);
  w[1] = h.Attach(kMemory);
  h.Run();
  EXPECT_EQ(UnstoredRows(h.StageOf(w[0])), kept);
  for (const WorkerId id : w) {
    EXPECT_THAT(h.core.StatusJson(h.now_us),
                AllOf(HasSubstr("\"rows_computed\":" + std::to_string(h.StageOf(id).rows_computed)),
                      HasSubstr("\"rows_stored\":" + std::to_string(h.StageOf(id).rows_stored))));
  }
}

// A new epoch alone costs the last token's row.
TEST(SurvivorsTest, WhereNobodyIsLostNothingIsReplayed) {
  Harness h(Options(3), SmallModel());
  const std::vector<WorkerId> w = AttachAll(h, 3);
  const RequestId id = h.Submit(OneSequence(50, 30));
  Rounds(h, w, 8);
  const size_t tokens = 50 + h.tokens[id].size();
  ASSERT_GT(tokens, 52u);
  v1::StageReport error;
  error.set_stage_id(h.StageOf(w[1]).load.stage_id());
  *error.mutable_epoch() = h.StageOf(w[1]).epoch;
  error.set_error_code(13);
  h.Send(w[1], error);
  h.Tick(1'000'000);
  ASSERT_TRUE(h.core.Ready());
  const v1::StepPlan& plan = h.StageOf(w[0]).plans.front();
  ASSERT_EQ(plan.cache_ops_size(), 1);
  EXPECT_THAT(plan.cache_ops(0).open().kept_rows(),
              ElementsAre(tokens - 1, tokens - 1, tokens - 1));
  ASSERT_EQ(plan.sequences_size(), 1);
  EXPECT_EQ(plan.sequences(0).first_position(), tokens - 1);
  EXPECT_EQ(plan.sequences(0).replay_stages(), 0u);
  h.Run();
  EXPECT_EQ(h.tokens[id].size(), 30u);
  EXPECT_EQ(h.core.Stats().recomputed_rows, 3u) << "of the one row that samples anew";
  EXPECT_THAT(h.problems, IsEmpty());
}

// A granted row that was computed, and whose id came to the coordinator no more.
TEST(SurvivorsTest, RowsOfIdsThatTheJournalNeverHadAreCut) {
  Harness h(Options(2, 3), SmallModel());
  std::vector<WorkerId> w = AttachAll(h, 2);
  const RequestId id = h.Submit(OneSequence(10, 40));
  Rounds(h, w, 3);
  const size_t tokens = 10 + h.tokens[id].size();
  // The last stage samples and hands over, its reports are lost; the first one feeds what came.
  while (h.StageOf(w[1]).plans.size() > 0) h.MakeReport(w[1]);
  while (h.StageOf(w[0]).plans.size() > 0) h.Report(w[0]);
  const uint32_t finished = h.StageOf(w[0]).lengths.at(SequenceId{1});
  ASSERT_GT(finished, tokens) << "beyond what the journal knows";
  h.Lose(w[1]);
  w[1] = h.Attach(kMemory);
  const v1::OpenSequence& open = h.StageOf(w[0]).plans.front().cache_ops(0).open();
  EXPECT_THAT(open.kept_rows(), ElementsAre(tokens - 1, 0));
  h.next_token = 61;  // another id than the one that was fed
  h.last_sampled.clear();
  h.Run();
  EXPECT_EQ(h.tokens[id].size(), 40u);
  EXPECT_THAT(h.problems, IsEmpty());
}

// The same, when the sequence has gone on elsewhere in between: the journal is longer then, but what
// it has at those positions need not be what was fed here.
TEST(SurvivorsTest, RowsAreConfirmedByWhatTheJournalHadWhenTheyWereLost) {
  CoreOptions options = Options(1, 4);
  options.num_pipelines = 2;
  options.max_running = 1;
  Harness h(options, SmallModel());
  const WorkerId a = h.Attach(kMemory);
  const RequestId id = h.Submit(OneSequence(10, 200));
  h.Report(a);
  h.Report(a);
  const size_t tokens = 10 + h.tokens[id].size();
  while (!h.StageOf(a).plans.empty()) h.MakeReport(a);
  ASSERT_GT(h.StageOf(a).lengths.at(SequenceId{1}), tokens);
  h.answer_activations = false;
  v1::StageReport error;
  error.set_stage_id(h.StageOf(a).load.stage_id());
  *error.mutable_epoch() = h.StageOf(a).epoch;
  error.set_error_code(14);
  h.Send(a, error);
  h.Tick(1'000'000);
  h.answer_activations = true;
  h.next_token = 61;
  h.last_sampled.clear();
  const WorkerId b = h.Attach(kMemory);
  for (int i = 0; i < 20; ++i) h.Report(b);
  ASSERT_GT(h.tokens[id].size(), 20u);
  // Now the other pipeline goes, and the first is back: it may use rows below `tokens`, no other.
  h.Lose(b);
  v1::StageState active;
  v1::FromWorker message;
  message.mutable_stage_state()->set_stage_id(h.StageOf(a).load.stage_id());
  message.mutable_stage_state()->set_state(v1::StageState::ACTIVE);
  *message.mutable_stage_state()->mutable_epoch() = h.StageOf(a).epoch;
  Harness::AddHeld(h.StageOf(a), message.mutable_stage_state());
  h.core.OnWorkerMessage(a, message, h.now_us);
  h.Pump();
  ASSERT_FALSE(h.workers.at(a).evicted) << h.workers.at(a).why;
  EXPECT_THAT(h.StageOf(a).plans.front().cache_ops(0).open().kept_rows(), ElementsAre(tokens));
  h.Run();
  EXPECT_EQ(h.tokens[id].size(), 200u);
  EXPECT_THAT(h.problems, IsEmpty());
}

TEST(SurvivorsTest, WhoEndedMeanwhileIsClosedByTheFirstPlan) {
  Harness h(Options(2), SmallModel());
  std::vector<WorkerId> w = AttachAll(h, 2);
  const RequestId gone = h.Submit(OneSequence(10, 40));
  const RequestId stays = h.Submit(OneSequence(10, 40));
  Rounds(h, w, 6);
  h.Lose(w[1]);
  h.core.OnCancel(gone, std::nullopt, h.now_us);
  w[1] = h.Attach(kMemory);
  const v1::StepPlan& plan = h.StageOf(w[0]).plans.front();
  ASSERT_EQ(plan.cache_ops_size(), 2);
  EXPECT_EQ(plan.cache_ops(0).close().sequence_id(), 1u);
  EXPECT_TRUE(plan.cache_ops(0).close().ended());
  EXPECT_EQ(plan.cache_ops(1).open().sequence_id(), 2u);
  h.Run();
  EXPECT_EQ(h.tokens[stays].size(), 40u);
  EXPECT_EQ(h.core.Stats().cache_bytes_used, 0u);
  EXPECT_THAT(h.problems, IsEmpty());
}

// Without anything to run: the first plan only closes.
TEST(SurvivorsTest, TheFirstPlanComesEvenIfAllHaveEnded) {
  Harness h(Options(2), SmallModel());
  std::vector<WorkerId> w = AttachAll(h, 2);
  const RequestId gone = h.Submit(OneSequence(10, 40));
  Rounds(h, w, 6);
  h.Lose(w[0]);
  h.core.OnCancel(gone, std::nullopt, h.now_us);
  w[0] = h.Attach(kMemory);
  ASSERT_EQ(h.StageOf(w[1]).plans.size(), 1u);
  h.Run();
  EXPECT_THAT(h.StageOf(w[1]).lengths, IsEmpty());
  // Where nothing was told there is no first plan.
  h.Lose(w[0]);
  h.Attach(kMemory);
  EXPECT_THAT(h.StageOf(w[1]).plans, IsEmpty());
  EXPECT_THAT(h.problems, IsEmpty());
}

TEST(SurvivorsTest, WhoWasPlacedElsewhereIsClosedHere) {
  CoreOptions options = Options(2);
  options.num_pipelines = 2;
  Harness h(options, SmallModel());
  std::vector<WorkerId> w = AttachAll(h, 4);
  const RequestId id = h.Submit(OneSequence(10, 40));
  Rounds(h, {w[0], w[1]}, 6);
  ASSERT_GT(h.tokens[id].size(), 2u);
  h.Lose(w[1]);  // the other pipeline takes over at once
  ASSERT_FALSE(h.StageOf(w[2]).plans.empty());
  w[1] = h.Attach(kMemory);
  ASSERT_EQ(h.StageOf(w[0]).plans.size(), 1u);
  const v1::CloseSequence& close = h.StageOf(w[0]).plans.front().cache_ops(0).close();
  EXPECT_EQ(close.sequence_id(), 1u);
  EXPECT_FALSE(close.ended()) << "its client waits";
  h.Run();
  EXPECT_EQ(h.tokens[id].size(), 40u);
  EXPECT_THAT(h.problems, IsEmpty());
}

TEST(SurvivorsTest, ScoresNotGivenAreComputedAndGivenOnesAreNot) {
  for (const uint32_t max_tokens : {0u, 2u}) {
    SCOPED_TRACE(max_tokens);
    Harness h(Options(2), SmallModel());
    std::vector<WorkerId> w = AttachAll(h, 2);
    RequestSpec spec = OneSequence(150, max_tokens);
    spec.sequences[0].score_prompt = true;
    const RequestId id = h.Submit(spec);
    Rounds(h, w, 2);
    ASSERT_EQ(h.scores[id].size(), 64u);
    while (!h.StageOf(w[0]).plans.empty()) h.Report(w[0]);
    ASSERT_EQ(h.StageOf(w[0]).lengths.at(SequenceId{1}), 150u - (max_tokens == 0));
    h.Lose(w[1]);
    w[1] = h.Attach(kMemory);
    // Row 64 is the first whose score nobody has.
    const v1::StepPlan& plan = h.StageOf(w[0]).plans.front();
    EXPECT_THAT(plan.cache_ops(0).open().kept_rows(), ElementsAre(64u, 0u));
    EXPECT_EQ(plan.sequences(0).replay_stages(), 2u);
    EXPECT_EQ(plan.sequences(0).logits_size(), 0);
    h.Run();
    ASSERT_EQ(h.scores[id].size(), 149u);
    for (uint32_t i = 0; i < 149; ++i) EXPECT_EQ(h.scores[id][i].position, i + 1);
    EXPECT_EQ(h.tokens[id].size(), max_tokens);
    EXPECT_THAT(h.problems, IsEmpty());
  }
}

// Stages that stopped at different rows: chunks are cut where one of them begins to lack.
TEST(SurvivorsTest, ChunksAreCutWhereEachStageBeginsToLackRows) {
  Harness h(Options(4), SmallModel(4));
  std::vector<WorkerId> w = AttachAll(h, 4);
  const RequestId id = h.Submit(OneSequence(120, 5));
  ASSERT_EQ(h.StageOf(w[0]).plans.size(), 4u);  // 32, 32, 32 and 24 rows
  for (int i = 0; i < 3; ++i) h.Report(w[0]);
  for (int i = 0; i < 2; ++i) h.Report(w[1]);
  h.Report(w[3]);
  h.Lose(w[2]);
  h.answer_loads = true;
  w[2] = h.Attach(kMemory);
  std::vector<std::array<uint32_t, 3>> chunks;  // position, rows, replay_stages
  EXPECT_THAT(h.StageOf(w[0]).plans.front().cache_ops(0).open().kept_rows(),
              ElementsAre(96u, 64u, 0u, 32u));
  while (h.tokens[id].empty()) {
    const v1::SequenceStep step = h.StageOf(w[0]).plans.front().sequences(0);
    chunks.push_back({step.first_position(), static_cast<uint32_t>(step.literals().ids_size()),
                      step.replay_stages()});
    for (const WorkerId worker : w) h.Report(worker);
  }
  using C = std::array<uint32_t, 3>;
  EXPECT_THAT(chunks, ElementsAre(C{0, 32, 3}, C{32, 32, 4}, C{64, 32, 4}, C{96, 24, 0}));
  h.Run();
  EXPECT_EQ(h.tokens[id].size(), 5u);
  EXPECT_THAT(h.problems, IsEmpty());
}

TEST(SurvivorsTest, AReplacementWithLessMemoryKeepsWhoFitsOldestFirst) {
  // Two layers a stage, 256 bytes a block in both; weights 2500, workspace 50.
  Harness h(Options(2), SmallModel());
  std::vector<WorkerId> w = AttachAll(h, 2, 2550 + 10 * 256);
  for (int i = 0; i < 3; ++i) h.Submit(OneSequence(120, 60));  // two blocks a layer, then three
  Rounds(h, w, 20);
  ASSERT_EQ(h.StageOf(w[0]).lengths.size(), 3u);
  h.Lose(w[1]);
  w[1] = h.Attach(2550 + 5 * 256);
  ASSERT_TRUE(h.core.Ready());
  const v1::StepPlan& plan = h.StageOf(w[0]).plans.front();
  ASSERT_EQ(plan.cache_ops_size(), 3);
  EXPECT_EQ(plan.cache_ops(0).open().sequence_id(), 1u);
  EXPECT_GT(plan.cache_ops(0).open().kept_rows(0), 120u);
  EXPECT_FALSE(plan.cache_ops(2).has_open()) << "the youngest has no room";
  EXPECT_THAT(h.core.StatusJson(h.now_us), HasSubstr("\"cache_bytes_total\":1280"));
  h.Run();
  for (uint64_t id = 1; id <= 3; ++id) EXPECT_EQ(h.tokens[RequestId{id}].size(), 60u);
  EXPECT_THAT(h.problems, IsEmpty());
}

// In a full cache nobody has room to grow; who was resident is all the same.
TEST(SurvivorsTest, AFullCacheIsKept) {
  Harness h(Options(1), SmallModel());
  const WorkerId worker = h.Attach(5050 + 4 * 4 * 128);  // four blocks a layer
  for (int i = 0; i < 2; ++i) h.Submit(OneSequence(60, 40));
  while (h.tokens[RequestId{2}].size() < 12) h.Report(worker);
  ASSERT_EQ(h.core.Stats().cache_bytes_used, h.core.Stats().cache_bytes_total);
  v1::StageReport error;
  error.set_stage_id(h.StageOf(worker).load.stage_id());
  *error.mutable_epoch() = h.StageOf(worker).epoch;
  error.set_error_code(13);
  h.Send(worker, error);
  h.Tick(1'000'000);
  ASSERT_TRUE(h.core.Ready());
  const v1::StepPlan& plan = h.StageOf(worker).plans.front();
  ASSERT_EQ(plan.cache_ops_size(), 2);
  for (const v1::CacheOp& op : plan.cache_ops()) EXPECT_GE(op.open().kept_rows(0), 69u);
  h.Run();
  for (uint64_t id = 1; id <= 2; ++id) EXPECT_EQ(h.tokens[RequestId{id}].size(), 40u);
  EXPECT_EQ(h.core.Stats().preemptions, 0u);
  EXPECT_THAT(h.problems, IsEmpty());
}

// The epoch fails again before any stage has done the first plan: both what was told and what was
// planned since may be there.
TEST(SurvivorsTest, AnEpochMayFailAtAnyPointOfAReplay) {
  for (const uint32_t depth : {1, 3}) {
    for (int reports = 0; reports < 60; ++reports) {
      SCOPED_TRACE(testing::Message() << "depth " << depth << ", " << reports << " reports");
      const uint32_t seed = 1000 * depth + reports;
      std::mt19937 random(seed);
      Harness h(Options(3, depth), SmallModel());
      std::vector<WorkerId> w = AttachAll(h, 3);
      for (int i = 0; i < 5; ++i) h.Submit(OneSequence(15 + 30 * i, 30));
      const auto some = [&](int count) {
        for (int i = 0; i < count; ++i) {
          const WorkerId id = w[random() % 3];
          // A stage is never ahead of the one before it.
          const auto ahead = [&](WorkerId x) { return h.StageOf(x).plans.size(); };
          const auto place = std::find(w.begin(), w.end(), id) - w.begin();
          if (ahead(id) == 0 || (place > 0 && ahead(w[place - 1]) >= ahead(id))) continue;
          h.Report(id);
        }
      };
      some(60);
      for (const int fault : {0, 1, 2, 3}) {
        const size_t victim = random() % 3;
        if (fault % 2 == 0) {
          h.Lose(w[victim]);
          w[victim] = h.Attach(kMemory);
        } else {
          h.Lose(w[victim]);
          w[victim] = h.ComeBack(w[victim]);
        }
        std::sort(w.begin(), w.end(), [&](WorkerId a, WorkerId b) {
          return h.StageOf(a).load.layer_begin() < h.StageOf(b).load.layer_begin();
        });
        if (fault == 1) h.core.OnCancel(RequestId{2}, std::nullopt, h.now_us);
        some(reports);
      }
      h.Run();
      for (uint64_t id = 1; id <= 5; ++id) {
        EXPECT_TRUE(id == 2 || h.tokens[RequestId{id}].size() == 30u);
      }
      EXPECT_EQ(h.core.Stats().cache_bytes_used, 0u);
      for (const WorkerId id : w) {
        EXPECT_FALSE(h.workers.at(id).evicted) << h.workers.at(id).why;
        EXPECT_THAT(h.StageOf(id).lengths, IsEmpty());
      }
      ASSERT_THAT(h.problems, IsEmpty());
    }
  }
}

TEST(SurvivorsTest, PreemptionGoesByTheStageThatLacksBytes) {
  // The second of two stages has room for five blocks a layer, the first for eight.
  CoreOptions options = Options(2);
  Harness h(options, SmallModel());
  std::vector<WorkerId> w = AttachAll(h, 2, 2550 + 8 * 256);
  h.Lose(w[1]);
  w[1] = h.Attach(2550 + 5 * 256);
  const RequestId old = h.Submit(OneSequence(120, 100));
  const RequestId young = h.Submit(OneSequence(120, 100));
  h.Run();
  EXPECT_GE(h.core.Stats().preemptions, 1u);
  for (const RequestId id : {old, young}) EXPECT_EQ(h.tokens[id].size(), 100u);
  EXPECT_THAT(h.problems, IsEmpty());
}

}  // namespace
}  // namespace strait

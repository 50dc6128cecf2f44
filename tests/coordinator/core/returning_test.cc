// SPDX-License-Identifier: Apache-2.0
//
// Defends: a worker whose stream broke gets its place and its rows again if it comes back before
// somebody else has the place; if not, or if it was evicted for what it did, its stage is unloaded;
// and nobody gets a place by naming another's stage.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "coordinator/core/cluster.h"
#include "coordinator/core/departed.h"
#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr uint64_t kMemory = 100'000;

CoreOptions Options(uint32_t num_stages, uint32_t num_pipelines = 1) {
  CoreOptions options;
  options.num_stages = num_stages;
  options.num_pipelines = num_pipelines;
  options.max_step_tokens = 64;
  options.prefill_chunk = 32;
  return options;
}

uint64_t StageId(Harness& h, WorkerId id) { return h.StageOf(id).load.stage_id(); }

TEST(ReturningTest, InTimeItHasItsPlaceAndItsRowsAgain) {
  Harness h(Options(3), SmallModel());
  std::vector<WorkerId> w;
  for (int i = 0; i < 3; ++i) w.push_back(h.Attach(kMemory));
  const RequestId id = h.Submit(OneSequence(50, 30));
  Rounds(h, w, 10);
  const size_t tokens = 50 + h.tokens[id].size();
  const uint64_t stage = StageId(h, w[1]);
  h.Lose(w[1]);
  EXPECT_FALSE(h.core.Ready()) << "a new epoch at once, and nobody to take the place";
  h.Tick(3'000'000);
  w[1] = h.ComeBack(w[1]);
  ASSERT_TRUE(h.core.Ready()) << h.core.StatusJson(h.now_us);
  EXPECT_EQ(h.workers.at(w[1]).stages.size(), 1u);
  EXPECT_EQ(StageId(h, w[1]), stage) << "not loaded anew";
  EXPECT_EQ(h.StageOf(w[1]).activate.stage_index(), 1u);
  EXPECT_THAT(h.StageOf(w[0]).plans.front().cache_ops(0).open().kept_rows(),
              ElementsAre(tokens - 1, tokens - 1, tokens - 1));
  EXPECT_THAT(h.core.StatusJson(h.now_us), HasSubstr("\"weight_bytes\":7"));
  h.Run();
  EXPECT_EQ(h.tokens[id].size(), 30u);
  EXPECT_THAT(h.problems, IsEmpty());
}

// Its new stream may be here before anybody noticed that the old one is over.
TEST(ReturningTest, ItMayBeBackBeforeItWasMissed) {
  Harness h(Options(2), SmallModel());
  const WorkerId first = h.Attach(kMemory);
  const WorkerId old = h.Attach(kMemory);
  const WorkerId spare = h.Attach(kMemory);
  const RequestId id = h.Submit(OneSequence(50, 30));
  Rounds(h, {first, old}, 6);
  const uint64_t stage = StageId(h, old);
  h.lost[old] = h.workers.at(old);
  const WorkerId again = h.ComeBack(old);
  EXPECT_TRUE(h.workers.at(old).evicted);
  ASSERT_TRUE(h.core.Ready());
  EXPECT_EQ(StageId(h, again), stage);
  EXPECT_THAT(h.workers.at(spare).stages, IsEmpty());
  h.Run();
  EXPECT_EQ(h.tokens[id].size(), 30u);
  EXPECT_THAT(h.problems, IsEmpty());
}

TEST(ReturningTest, AWorkerThatWasSilentMayComeBack) {
  Harness h(Options(1), SmallModel());
  const WorkerId old = h.Attach(kMemory);
  const RequestId id = h.Submit(OneSequence(50, 30));
  Rounds(h, {old}, 6);
  const uint64_t stage = StageId(h, old);
  h.lost[old] = h.workers.at(old);
  h.TickInSilence(6'000'000);
  ASSERT_TRUE(h.workers.at(old).evicted);
  const WorkerId again = h.ComeBack(old);
  ASSERT_TRUE(h.core.Ready());
  EXPECT_EQ(StageId(h, again), stage);
  h.Run();
  EXPECT_EQ(h.tokens[id].size(), 30u);
  EXPECT_LT(h.core.Stats().recomputed_rows, 5u);
}

TEST(ReturningTest, TooLateItUnloadsAndIsASpare) {
  Harness h(Options(2), SmallModel());
  const WorkerId first = h.Attach(kMemory);
  const WorkerId old = h.Attach(kMemory);
  h.Lose(old);
  h.Attach(kMemory);
  ASSERT_TRUE(h.core.Ready());
  const WorkerId again = h.ComeBack(old);
  EXPECT_FALSE(h.workers.at(again).evicted) << h.workers.at(again).why;
  EXPECT_THAT(h.workers.at(again).stages, IsEmpty());
  EXPECT_THAT(h.core.StatusJson(h.now_us), HasSubstr("\"idle\""));
  h.Lose(first);
  EXPECT_TRUE(h.core.Ready()) << "it takes the next place";
  EXPECT_THAT(h.problems, IsEmpty());
}

// Somebody had the place in between, and is gone, too: its rows are as good as they were.
TEST(ReturningTest, ThePlaceMayBeVacantAgain) {
  Harness h(Options(2), SmallModel());
  std::vector<WorkerId> w = {h.Attach(kMemory), h.Attach(kMemory), h.Attach(kMemory)};
  const RequestId id = h.Submit(OneSequence(50, 40));
  Rounds(h, {w[0], w[1]}, 8);
  const uint64_t stage = StageId(h, w[1]);
  const uint32_t kept = static_cast<uint32_t>(49 + h.tokens[id].size());
  h.Lose(w[1]);
  Rounds(h, {w[0], w[2]}, 12);
  ASSERT_GT(h.StageOf(w[0]).lengths.at(SequenceId{1}), kept + 1);
  h.Lose(w[2]);
  w[1] = h.ComeBack(w[1]);
  ASSERT_TRUE(h.core.Ready());
  EXPECT_EQ(StageId(h, w[1]), stage);
  const auto& rows = h.StageOf(w[0]).plans.front().cache_ops(0).open().kept_rows();
  EXPECT_GT(rows.at(0), kept + 1);
  EXPECT_THAT(rows.at(1), testing::AnyOf(kept, kept + 1));
  EXPECT_THAT(h.workers.at(h.ComeBack(w[2])).stages, IsEmpty());
  h.Run();
  EXPECT_EQ(h.tokens[id].size(), 40u);
  EXPECT_THAT(h.problems, IsEmpty());
}

// A spare takes the place at once.
TEST(ReturningTest, ASpareIsNotKeptWaiting) {
  Harness h(Options(2), SmallModel());
  h.Attach(kMemory);
  const WorkerId old = h.Attach(kMemory);
  const WorkerId spare = h.Attach(kMemory);
  h.Lose(old);
  EXPECT_TRUE(h.core.Ready());
  EXPECT_EQ(h.workers.at(spare).stages.size(), 1u);
  EXPECT_THAT(h.workers.at(h.ComeBack(old)).stages, IsEmpty());
}

TEST(ReturningTest, WhoHasItLoadedIsReadyBeforeWhoStillLoads) {
  Harness h(Options(2), SmallModel());
  h.Attach(kMemory);
  const WorkerId old = h.Attach(kMemory);
  const WorkerId spare = h.Attach(kMemory);
  const uint64_t stage = StageId(h, old);
  h.answer_loads = false;
  h.Lose(old);
  ASSERT_EQ(h.workers.at(spare).stages.size(), 1u) << "it is told to load at once";
  EXPECT_FALSE(h.core.Ready());
  const WorkerId again = h.ComeBack(old);
  ASSERT_TRUE(h.core.Ready());
  EXPECT_EQ(StageId(h, again), stage);
  EXPECT_THAT(h.workers.at(spare).stages, IsEmpty()) << "unloaded, a spare again";
  EXPECT_THAT(h.problems, IsEmpty());
}

// The bug: of two pipelines whose workers were all out of reach for longer than 10 s, the younger one was
// dissolved though it had no worker to give, and whoever came back with its stages had to load them anew.
TEST(ReturningTest, APipelineWithoutWorkersWaitsForThem) {
  Harness h(Options(2, 2), SmallModel());
  std::vector<WorkerId> w;
  std::map<WorkerId, uint64_t> stages;
  for (int i = 0; i < 4; ++i) w.push_back(h.Attach(kMemory));
  for (const WorkerId id : w) stages[id] = StageId(h, id);
  for (const WorkerId id : w) h.Lose(id);
  h.Tick(3 * kConsolidateAfterUs);
  for (const WorkerId id : w) EXPECT_EQ(StageId(h, h.ComeBack(id)), stages[id]);
  EXPECT_EQ(h.core.Stats().pipelines_active, 2u);
  EXPECT_THAT(h.problems, IsEmpty());
}

TEST(ReturningTest, OfADissolvedPipelineNothingIsTakenBack) {
  Harness h(Options(2), SmallModel(8));
  h.Attach(20'000);
  const WorkerId old = h.Attach(20'000);
  h.Lose(old);
  h.Attach(3'500);  // other layer ranges
  ASSERT_TRUE(h.core.Ready());
  const WorkerId again = h.ComeBack(old);
  EXPECT_FALSE(h.workers.at(again).evicted);
  EXPECT_THAT(h.workers.at(again).stages, IsEmpty());
}

TEST(ReturningTest, AnotherTermsStagesAreNobodysBusiness) {
  CoreOptions options = Options(1);
  options.term = 5;
  Harness h(options, SmallModel());
  v1::Hello hello = h.MakeHello(kMemory);
  hello.set_term(4);
  for (const uint64_t id : {3, 70}) {
    hello.add_held_stages()->set_stage_id(id);
    hello.mutable_held_stages()->rbegin()->set_layer_end(4);
  }
  const WorkerId worker = h.Attach(hello);
  EXPECT_FALSE(h.workers.at(worker).evicted) << h.workers.at(worker).why;
  ASSERT_TRUE(h.core.Ready());
  EXPECT_EQ(StageId(h, worker), 1u);
}

TEST(ReturningTest, WhoWasEvictedForALieIsLoadedAnew) {
  Harness h(Options(1), SmallModel());
  const WorkerId old = h.Attach(kMemory);
  const RequestId id = h.Submit(OneSequence(50, 30));
  Rounds(h, {old}, 6);
  const uint64_t stage = StageId(h, old);
  h.lost[old] = h.workers.at(old);
  v1::StageReport report = h.MakeReport(old);
  report.set_cache_bytes(1);
  h.Send(old, report);
  ASSERT_TRUE(h.workers.at(old).evicted);
  const WorkerId again = h.ComeBack(old);
  ASSERT_TRUE(h.core.Ready());
  EXPECT_GT(StageId(h, again), stage);
  EXPECT_EQ(h.workers.at(again).stages.size(), 1u) << "the old one is unloaded";
  h.Run();
  EXPECT_EQ(h.tokens[id].size(), 30u);
  EXPECT_THAT(h.problems, IsEmpty());
}

TEST(ReturningTest, EdgesOfWhoComesBackAreNewOthersAreNot) {
  Harness h(Options(3), SmallModel());
  std::vector<WorkerId> w;
  for (int i = 0; i < 3; ++i) w.push_back(h.Attach(kMemory));
  const uint64_t first_edge = h.StageOf(w[1]).activate.edge_id();
  const uint64_t last_edge = h.StageOf(w[2]).activate.edge_id();
  const uint64_t sampled_edge = h.StageOf(w[0]).activate.sampled_edge_id();
  h.Lose(w[2]);
  w[2] = h.ComeBack(w[2]);
  ASSERT_TRUE(h.core.Ready());
  EXPECT_EQ(h.StageOf(w[1]).activate.edge_id(), first_edge);
  EXPECT_GT(h.StageOf(w[2]).activate.edge_id(), last_edge);
  EXPECT_GT(h.StageOf(w[0]).activate.sampled_edge_id(), sampled_edge);
  // One in the middle has two.
  const uint64_t newest = h.StageOf(w[0]).activate.sampled_edge_id();
  h.Lose(w[1]);
  w[1] = h.ComeBack(w[1]);
  ASSERT_TRUE(h.core.Ready());
  EXPECT_GT(h.StageOf(w[1]).activate.edge_id(), newest);
  EXPECT_GT(h.StageOf(w[2]).activate.edge_id(), newest);
  EXPECT_EQ(h.StageOf(w[0]).activate.sampled_edge_id(), newest);
}

// ---------------------------------------------------------------- claims that cannot be

struct Claim {
  std::string what;
  std::function<void(v1::Hello*)> change;
  absl::StatusCode code = absl::StatusCode::kFailedPrecondition;
};

TEST(ReturningTest, WhoClaimsWhatCannotBeIsEvictedByNameAndNobodyElse) {
  const auto held = [](v1::Hello* h) { return h->mutable_held_stages(0); };
  const std::vector<Claim> claims = {
      {"stage 2, which was given to another process, w2",
       [](v1::Hello* h) { h->set_instance(77); }},
      {"stage 3, which was given to another process, w3",
       [&](v1::Hello* h) { held(h)->set_stage_id(3); }},
      {"stage 9, which there never was: the last one is 4",
       [&](v1::Hello* h) { held(h)->set_stage_id(9); }},
      {"stage 0, which there never was", [&](v1::Hello* h) { held(h)->set_stage_id(0); }},
      {"stage 2, with layers [1, 4) and", [&](v1::Hello* h) { held(h)->set_layer_begin(1); }},
      {"it was loaded with layers [2, 4) and", [&](v1::Hello* h) { held(h)->set_layer_end(5); }},
      {"stage 2, with layers [2, 4) and 128 bytes of latent blocks, it was loaded with",
       [&](v1::Hello* h) { held(h)->set_cache_bytes(128); }},
      {"stage 2, twice", [&](v1::Hello* h) { *h->add_held_stages() = h->held_stages(0); },
       absl::StatusCode::kInvalidArgument},
      {"says that it kept 65 stages, at most 64",
       [&](v1::Hello* h) {
         for (int i = 0; i < 64; ++i) h->add_held_stages();
       },
       absl::StatusCode::kInvalidArgument},
  };
  for (const Claim& claim : claims) {
    SCOPED_TRACE(claim.what);
    Harness h(Options(2, 2), SmallModel());
    std::vector<WorkerId> w;
    for (int i = 0; i < 4; ++i) w.push_back(h.Attach(kMemory));
    std::vector<RequestId> ids;
    for (int i = 0; i < 4; ++i) ids.push_back(h.Submit(OneSequence(32, 20)));
    h.Report(w[0]);
    h.Lose(w[1]);
    v1::Hello hello = h.HelloAgain(w[1]);
    claim.change(&hello);
    const WorkerId liar = h.Attach(hello);
    ASSERT_TRUE(h.workers.at(liar).evicted);
    EXPECT_EQ(h.workers.at(liar).why.code(), claim.code);
    EXPECT_THAT(std::string(h.workers.at(liar).why.message()),
                AllOf(HasSubstr("worker w2 says that it kept "), HasSubstr(claim.what)));
    const uint64_t epoch = h.StageOf(w[2]).epoch.counter();
    for (const WorkerId id : {w[0], w[2], w[3]}) EXPECT_FALSE(h.workers.at(id).evicted);
    const size_t tokens = h.tokens[ids[1]].size();
    Rounds(h, {w[2], w[3]}, 4);
    EXPECT_EQ(h.StageOf(w[2]).epoch.counter(), epoch);
    EXPECT_GT(h.tokens[ids[1]].size(), tokens) << "another pipeline's streams go on";
    // Who the stage belongs to may still come.
    h.ComeBack(w[1]);
    h.Run();
    for (const RequestId id : ids) EXPECT_EQ(h.tokens[id].size(), 20u);
    EXPECT_THAT(h.problems, IsEmpty());
  }
}

TEST(ReturningTest, WhatIsForgottenIsUnloadedNotBlamed) {
  DepartedStages stages;
  for (uint64_t id = 1; id <= kMaxDepartedStages + 1; ++id) stages.Add(id, {.instance = id});
  EXPECT_EQ(stages.Find(1), nullptr);
  ASSERT_NE(stages.Find(2), nullptr);
  EXPECT_EQ(stages.Take(2).instance, 2u);
  EXPECT_EQ(stages.Find(2), nullptr);
}

}  // namespace
}  // namespace strait

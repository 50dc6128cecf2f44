// SPDX-License-Identifier: Apache-2.0
//
// Defends: in every chunk each stage has all rows or none, a chunk goes through no stage behind the
// last that lacks it, and after a replay all stages have the same rows; and that bytes by stage follow
// from those rows alone.
#include "coordinator/core/replay.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "coordinator/core/cache_books.h"
#include "coordinator/core/scheduler.h"
#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

TEST(ReplayTest, ThreeStagesOneLost) {
  struct Case {
    std::vector<uint32_t> kept;
    uint32_t replay_stages;
  };
  for (const Case& c : {Case{{0, 9, 9}, 1}, Case{{9, 0, 9}, 2}, Case{{9, 9, 0}, 3}}) {
    StageRows rows(c.kept);
    EXPECT_EQ(rows.next(), 0u);
    const StageRows::Chunk chunk = rows.Cut(100);
    EXPECT_EQ(chunk.num_rows, 9u);
    EXPECT_EQ(chunk.replay_stages, c.replay_stages);
    rows.Advance(9);
    EXPECT_TRUE(rows.even());
    EXPECT_EQ(rows.Cut(100).num_rows, 100u);
    EXPECT_EQ(rows.Cut(100).replay_stages, 0u);
  }
}

TEST(ReplayTest, NobodyLostBeginsBehindWhatIsKept) {
  const StageRows rows({7, 7, 7});
  EXPECT_TRUE(rows.even());
  EXPECT_EQ(rows.next(), 7u);
  EXPECT_EQ(StageRows().next(), 0u);
}

TEST(ReplayTest, EveryChunkIsWholeAtEveryStage) {
  constexpr uint32_t kSeed = 5;
  std::mt19937 random(kSeed);
  const CachePolicy policy{100};
  for (int i = 0; i < 2000; ++i) {
    SCOPED_TRACE(testing::Message() << "seed " << kSeed << " case " << i);
    const uint32_t num_stages = 1 + random() % 5;
    std::vector<uint32_t> kept;
    std::vector<StageCache> stages;
    for (uint32_t s = 0; s < num_stages; ++s) {
      kept.push_back(random() % 3 == 0 ? 0 : random() % 300);
      stages.push_back({{10 * s, 10 * s + 1 + s}, 1 << 20});
    }
    std::vector<uint32_t> length = kept;
    StageRows rows(kept);
    CacheBooks books;
    books.Start(policy, stages);
    books.Reserve(0, 400);
    books.Hold(rows, {});
    while (rows.next() < 400) {
      const StageRows::Chunk chunk =
          rows.Cut(std::min<uint32_t>(1 + random() % 90, 400 - rows.next()));
      const uint32_t begin = rows.next(), end = begin + chunk.num_rows;
      uint32_t lacking = 0, last = 0;
      for (uint32_t s = 0; s < num_stages; ++s) {
        ASSERT_TRUE(length[s] == begin || length[s] >= end);
        ASSERT_EQ(rows.Stores(s), length[s] == begin);
        if (length[s] != begin) continue;
        ++lacking;
        last = s;
      }
      ASSERT_EQ(chunk.replay_stages, lacking == num_stages ? 0 : last + 1);
      books.Grow(rows, chunk.num_rows);
      rows.Advance(chunk.num_rows);
      for (uint32_t s = 0; s < num_stages; ++s) {
        if (length[s] == begin) length[s] = end;
        ASSERT_EQ(rows.at(s), length[s]);
        ASSERT_EQ(books.stages()[s].held_bytes, HeldBytes(policy, length[s], stages[s].layers));
      }
      ASSERT_GT(lacking, 0u) << "a chunk that nobody lacks";
    }
    EXPECT_TRUE(rows.even());
    books.Free(rows, {});
    books.Leave(400, {});
    EXPECT_TRUE(books.CheckEqual(books.Empty()).ok());
  }
}

TEST(SurvivorsTest, WhoMayHaveEitherIsBelievedTheLess) {
  Holdings holdings;
  AddHolding(SequenceId{1}, {.planned = 9, .confirmed = 5}, &holdings);
  AddHolding(SequenceId{1}, {.planned = 7, .confirmed = 7}, &holdings);
  EXPECT_EQ(holdings.at(SequenceId{1}).planned, 9u);
  EXPECT_EQ(holdings.at(SequenceId{1}).confirmed, 5u);
}

// A step that ends in the middle of the pipeline shows nothing of the links behind.
TEST(ReplayTest, RowsThatDoNotReachTheLastStageProveNoLink) {
  CoreOptions options;
  options.num_stages = 2;
  options.grant_depth = 1;
  Context context{options, SmallModel(), {}, {}};
  Journal journal(&context);
  Scheduler scheduler(&context, &journal);
  journal.Admit(RequestId{1}, OneSequence(40, 5), 1'000'000);
  const Holdings last = {{SequenceId{1}, {30, 30}}};
  scheduler.Start({{{0, 2}, 10'000}, {{2, 4}, 10'000}}, Survivors({{}, last}));
  for (const uint32_t replay_stages : {1u, 0u}) {
    const std::optional<v1::StepPlan> plan = scheduler.Form(1);
    ASSERT_TRUE(plan);
    EXPECT_EQ(plan->sequences(0).replay_stages(), replay_stages);
    for (uint32_t s = 0; s < 2; ++s) {
      const StageStep& due = scheduler.ledger().records().front().stages[s];
      v1::StageReport report;
      report.set_step_id(plan->step_id());
      report.set_cache_bytes(due.cache_bytes);
      report.set_tables_digest(due.tables_digest);
      report.set_rows_computed(due.rows_computed);
      report.set_rows_stored(due.rows_stored);
      if (s == 1 && replay_stages == 0) {
        report.add_results()->set_sequence_id(1);
        report.mutable_results(0)->mutable_sampled()->set_token_id(7);
      }
      EXPECT_FALSE(scheduler.links_proven());
      const absl::StatusOr<StageStep> done = scheduler.OnReport(s, report, 1);
      ASSERT_TRUE(done.ok()) << done.status();
      EXPECT_EQ(done->rows_computed, replay_stages == 0 ? 10u : s == 0 ? 30u : 0u);
    }
    EXPECT_EQ(scheduler.links_proven(), replay_stages == 0);
  }
  EXPECT_TRUE(scheduler.CheckIntegrity().ok());
  (void)scheduler.Stop();
}

TEST(CacheBooksTest, TheStageWithTheFewestBytesDecides) {
  const CachePolicy policy{100};
  CacheBooks books;
  books.Start(policy, {{{0, 2}, 1000}, {{2, 3}, 300}});  // five blocks a layer, and three
  EXPECT_TRUE(books.CanEverHold(192));
  EXPECT_FALSE(books.CanEverHold(193));
  EXPECT_EQ(books.free_rows(0), 192u);
  books.Reserve(0, 65);
  EXPECT_EQ(books.stages()[0].reserved_bytes, 400u);
  EXPECT_EQ(books.stages()[1].reserved_bytes, 200u);
  EXPECT_TRUE(books.HasRoom(64, {}, 0, 0));
  EXPECT_FALSE(books.HasRoom(64, {}, 0, 1)) << "a resident may grow by a block";
  EXPECT_FALSE(books.HasRoom(65, {}, 0, 0));
  EXPECT_TRUE(books.CanReserve(65, 192));
  EXPECT_FALSE(books.CanReserve(65, 193));
  EXPECT_FALSE(books.CheckEqual(books.Empty()).ok());
}

// Where rows become old, a sequence gives bytes back while it grows; what is reserved for it does not.
TEST(CacheBooksTest, TiersAreHeldAndReservedByLength) {
  CacheTiers::Spec spec;
  spec.rope = 16;
  spec.young = {RowFormat::kFp8, 128};
  spec.old = {{RowFormat::kInt4, 64}, {RowFormat::kFp8, 0}, {RowFormat::kFp8, 128}};
  spec.sink_rows = 64;
  spec.young_rows = 128;
  spec.interval_rows = 256;
  const CacheTiers tiers = CacheTiers::Create(spec).value();
  const CachePolicy policy{.tiers = &tiers};
  CacheBooks books;
  books.Start(policy, {{{0, 2}, 1 << 20}, {{2, 3}, 1 << 20}});
  const auto most = static_cast<uint32_t>(books.free_rows(0));
  EXPECT_TRUE(books.CanEverHold(most));
  EXPECT_FALSE(books.CanEverHold(most + 1));
  StageRows rows;
  books.Hold(rows, {});
  uint32_t reserved = 0;
  bool gave_back = false;
  while (rows.next() < 2000) {
    const uint32_t end = rows.next() + 40 - rows.next() % 40;
    ASSERT_TRUE(books.CanReserve(reserved, end));
    books.Reserve(reserved, end);
    reserved = end;
    const uint64_t before = books.stages()[0].held_bytes;
    books.Grow(rows, end - rows.next());
    rows.Advance(end - rows.next());
    for (const StageCache& stage : books.stages()) {
      ASSERT_EQ(stage.held_bytes, HeldBytes(policy, end, stage.layers));
      ASSERT_EQ(stage.reserved_bytes, ReservedBytes(policy, end, stage.layers));
      ASSERT_LE(stage.held_bytes, stage.reserved_bytes);
    }
    gave_back |= books.stages()[0].held_bytes < before;
  }
  EXPECT_TRUE(gave_back);
  books.Free(rows, {});
  books.Leave(reserved, {});
  EXPECT_TRUE(books.CheckEqual(books.Empty()).ok());
}

}  // namespace
}  // namespace strait

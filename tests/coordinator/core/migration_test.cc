// SPDX-License-Identifier: Apache-2.0
//
// A running sequence goes to another pipeline with its rows: no token is lost, doubled or changed, none of its
// rows is computed again, nobody else gives way for it, and whatever fails on the way leaves it in exactly one
// place. The harness' workers object to what an honest worker would refuse.
#include "coordinator/core/edges.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::IsEmpty;

// One layer has 1,000 bytes, embedding and head 500, a workspace 50, a block of all layers 512.
constexpr uint64_t kRoomy = 100'000;

class MigrationTest : public testing::Test {
 protected:
  // Two pipelines; the first has `first_stages` stages, the second what the others make.
  void Start(uint32_t num_stages, uint64_t memory = kRoomy) {
    CoreOptions options;
    options.num_stages = num_stages;
    options.num_pipelines = 2;
    options.max_step_tokens = 64;
    options.prefill_chunk = 32;
    Start(options, 2 * num_stages, memory);
  }
  void Start(const CoreOptions& options, uint32_t num_workers, uint64_t memory) {
    h_ = std::make_unique<Harness>(options, SmallModel());
    h_->token_at = [](uint64_t sequence, uint32_t position) {
      return static_cast<uint32_t>(10 + (sequence * 31 + position * 7) % 83);
    };
    for (uint32_t i = 0; i < num_workers; ++i) h_->Attach(memory);
    ASSERT_EQ(h_->core.Stats().pipelines_active, 2u);
  }
  void TearDown() override {
    ASSERT_NE(h_, nullptr);
    EXPECT_THAT(h_->problems, IsEmpty());
  }
  // Every stage reports what it has, so many times.
  void Rounds(int rounds) { h_->Rounds(rounds); }
  // Which pipeline the stages that have rows of it belong to; 0: none or several.
  uint64_t WhereIs(uint64_t sequence) {
    uint64_t found = 0;
    for (const auto& [id, worker] : h_->workers) {
      for (const auto& [stage_id, stage] : worker.stages) {
        if (!stage.lengths.contains(SequenceId{sequence})) continue;
        const uint64_t pipeline = stage.activate.pipeline_id();
        if (found != 0 && found != pipeline) return 0;
        found = pipeline;
      }
    }
    return found;
  }
  uint64_t Other(uint64_t pipeline) {
    for (const auto& [id, worker] : h_->workers) {
      for (const auto& [stage_id, stage] : worker.stages) {
        if (stage.activate.pipeline_id() != pipeline) return stage.activate.pipeline_id();
      }
    }
    return 0;
  }
  std::vector<WorkerId> WorkersOf(uint64_t pipeline) {
    std::vector<WorkerId> workers;
    for (const auto& [id, worker] : h_->workers) {
      for (const auto& [stage_id, stage] : worker.stages) {
        if (stage.activate.pipeline_id() == pipeline) workers.push_back(id);
      }
    }
    return workers;
  }
  // All tokens came, each once and the right one.
  void ExpectWhole(RequestId request, uint64_t sequence, uint32_t prompt, uint32_t max_tokens) {
    ASSERT_TRUE(h_->ended.contains(request));
    EXPECT_TRUE(h_->ended.at(request).status.ok()) << h_->ended.at(request).status;
    const std::vector<TokenInfo>& tokens = h_->tokens[request];
    ASSERT_EQ(tokens.size(), max_tokens);
    for (uint32_t i = 0; i < max_tokens; ++i) {
      EXPECT_EQ(tokens[i].position, prompt + i);
      EXPECT_EQ(tokens[i].id, h_->token_at(sequence, prompt + i));
    }
  }
  void ExpectEmpty() {
    EXPECT_EQ(h_->core.Stats().cache_bytes_used, 0u);
    for (const auto& [id, worker] : h_->workers) {
      for (const auto& [stage_id, stage] : worker.stages) EXPECT_THAT(stage.lengths, IsEmpty());
    }
  }

  std::unique_ptr<Harness> h_;
};

TEST_F(MigrationTest, ADecodingSequenceGoesWithAllItsRows) {
  Start(2);
  const RequestId request = h_->Submit(OneSequence(100, 40));
  Rounds(12);
  const uint64_t from = WhereIs(1);
  ASSERT_NE(from, 0u);
  const size_t tokens_before = h_->tokens[request].size();
  ASSERT_GT(tokens_before, 0u);
  const VerbId verb = h_->Migrate(1, PipelineId{Other(from)});
  Rounds(14);
  ASSERT_TRUE(h_->verbs.contains(verb));
  EXPECT_TRUE(h_->verbs.at(verb).ok()) << h_->verbs.at(verb);
  EXPECT_EQ(WhereIs(1), Other(from));
  EXPECT_LT(h_->tokens[request].size(), 40u) << "it went while it ran";
  const MoveReport report = h_->moves.at(verb).back();
  EXPECT_EQ(report.phase, "done");
  EXPECT_EQ(report.from.value, from);
  EXPECT_GE(report.rows, 100u);
  EXPECT_EQ(report.recomputed_rows, 0u);
  h_->Run();
  ExpectWhole(request, 1, 100, 40);
  EXPECT_EQ(h_->core.Stats().recomputed_rows, 0u);
  EXPECT_EQ(h_->core.Stats().migrations, 1u);
  ExpectEmpty();
}

TEST_F(MigrationTest, ThereAndBackAgain) {
  Start(1);
  const RequestId request = h_->Submit(OneSequence(70, 200));
  Rounds(6);
  for (int i = 0; i < 6; ++i) {
    const uint64_t from = WhereIs(1);
    ASSERT_NE(from, 0u);
    const VerbId verb = h_->Migrate(1, PipelineId{Other(from)});
    Rounds(10);
    ASSERT_TRUE(h_->verbs.contains(verb));
    EXPECT_TRUE(h_->verbs.at(verb).ok()) << h_->verbs.at(verb);
  }
  h_->Run();
  ExpectWhole(request, 1, 70, 200);
  EXPECT_EQ(h_->core.Stats().migrations, 6u);
  EXPECT_EQ(h_->core.Stats().recomputed_rows, 0u);
  ExpectEmpty();
}

TEST_F(MigrationTest, APromptGoesBetweenItsChunks) {
  Start(2);
  const RequestId request = h_->Submit(OneSequence(600, 10));
  Rounds(4);
  const uint64_t from = WhereIs(1);
  ASSERT_THAT(h_->tokens[request], IsEmpty());
  const VerbId verb = h_->Migrate(1, PipelineId{Other(from)});
  for (int i = 0; i < 100 && !h_->verbs.contains(verb); ++i) Rounds(1);
  ASSERT_TRUE(h_->verbs.contains(verb));
  EXPECT_TRUE(h_->verbs.at(verb).ok()) << h_->verbs.at(verb);
  EXPECT_THAT(h_->tokens[request], IsEmpty()) << "it went before its prompt was done";
  h_->Run();
  ExpectWhole(request, 1, 600, 10);
  EXPECT_EQ(h_->core.Stats().recomputed_rows, 0u);
  ExpectEmpty();
}

TEST_F(MigrationTest, WhatNoStageHasOpenYetIsServedOnceItIs) {
  Start(2);
  const RequestId request = h_->Submit(OneSequence(600, 10));
  for (const uint64_t to : {1, 2}) {  // its plan is out; of these one is where it is
    h_->Migrate(1, PipelineId{to});
  }
  for (int i = 0; i < 100 && h_->core.Stats().migrations == 0; ++i) Rounds(1);
  EXPECT_EQ(h_->core.Stats().migrations, 1u);
  EXPECT_THAT(h_->tokens[request], IsEmpty());
  h_->Run();
  ExpectWhole(request, 1, 600, 10);
  EXPECT_EQ(h_->core.Stats().recomputed_rows, 0u);
  ExpectEmpty();
}

TEST_F(MigrationTest, ScoresOfAPromptComeOnceAndInOrder) {
  Start(2);
  RequestSpec spec = OneSequence(300, 5);
  spec.sequences[0].score_prompt = true;
  const RequestId request = h_->Submit(std::move(spec));
  Rounds(4);
  const VerbId verb = h_->Migrate(1, PipelineId{Other(WhereIs(1))});
  h_->Run();
  EXPECT_TRUE(h_->verbs.at(verb).ok()) << h_->verbs.at(verb);
  ExpectWhole(request, 1, 300, 5);
  ASSERT_EQ(h_->scores[request].size(), 299u);
  for (uint32_t i = 0; i < 299; ++i) EXPECT_EQ(h_->scores[request][i].position, i + 1);
  ExpectEmpty();
}

TEST_F(MigrationTest, WhatCannotBeIsRefusedAndSaysWhy) {
  Start(1, 7'800);  // 5,050 without cache: room for 5 blocks
  h_->Submit(OneSequence(100, 100));
  h_->Submit(OneSequence(100, 100));
  Rounds(8);
  const auto refused = [&](const MigrateSpec& spec) {
    const VerbId verb = h_->Migrate(spec);
    EXPECT_TRUE(h_->verbs.contains(verb));
    return h_->verbs[verb];
  };
  MigrateSpec spec;
  spec.sequence = "77";
  spec.to = PipelineId{1};
  EXPECT_EQ(refused(spec).code(), absl::StatusCode::kNotFound);
  spec.sequence = "1";
  spec.to = PipelineId{9};
  EXPECT_EQ(refused(spec).code(), absl::StatusCode::kNotFound);
  spec.to = PipelineId{WhereIs(1)};
  EXPECT_EQ(refused(spec).code(), absl::StatusCode::kInvalidArgument);
  // The other sequence fills the other pipeline.
  spec.to = PipelineId{Other(WhereIs(1))};
  const absl::Status full = refused(spec);
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted) << full;
  spec.dry_run = true;
  EXPECT_EQ(refused(spec).code(), absl::StatusCode::kResourceExhausted);
  h_->Run();
  EXPECT_EQ(h_->core.Stats().preemptions, 0u);
  ExpectEmpty();
}

TEST_F(MigrationTest, AWrongDigestLeavesItWhereItIs) {
  Start(2);
  const RequestId request = h_->Submit(OneSequence(100, 60));
  Rounds(12);
  const uint64_t from = WhereIs(1);
  h_->spoil_digest = 1;
  const VerbId verb = h_->Migrate(1, PipelineId{Other(from)});
  Rounds(14);
  ASSERT_TRUE(h_->verbs.contains(verb));
  EXPECT_EQ(h_->verbs.at(verb).code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(WhereIs(1), from);
  h_->Run();
  ExpectWhole(request, 1, 100, 60);
  EXPECT_EQ(h_->core.Stats().recomputed_rows, 0u);
  ExpectEmpty();
}

// Who knows an edge's nonce knows no secret of a move.
TEST_F(MigrationTest, SecretsDoNotFollowFromNoncesOfEdges) {
  Start(2);
  h_->Submit(OneSequence(100, 60));
  Rounds(12);
  h_->answer_fetches = false;
  h_->Migrate(1, PipelineId{Other(WhereIs(1))});
  std::vector<uint64_t> nonces;
  for (const auto& [id, worker] : h_->workers) {
    for (const auto& [stage_id, stage] : worker.stages) {
      for (const uint64_t nonce : {stage.activate.edge_nonce(), stage.activate.next_edge_nonce(),
                                   stage.activate.sampled_edge_nonce()}) {
        if (nonce != 0) nonces.push_back(nonce);
      }
    }
  }
  int secrets = 0;
  for (const auto& [id, worker] : h_->workers) {
    for (const auto& [stage_id, stage] : worker.stages) {
      for (const auto& [sequence, serve] : stage.moves.serves) {
        ++secrets;
        for (const uint64_t nonce : nonces) EXPECT_NE(serve.secret, EdgeNonce(nonce, stage_id));
      }
    }
  }
  EXPECT_EQ(secrets, 2);
  EXPECT_THAT(nonces, testing::Not(IsEmpty()));
  h_->answer_fetches = true;
  h_->Run();
}

// Rows that never come hold up nothing: the move is given up by its deadlines.
TEST_F(MigrationTest, ALinkThatStandsStillCostsTheMoveAlone) {
  Start(1);
  const RequestId request = h_->Submit(OneSequence(100, 60));
  Rounds(8);
  const uint64_t from = WhereIs(1);
  h_->answer_fetches = false;
  const VerbId verb = h_->Migrate(1, PipelineId{Other(from)});
  Rounds(6);
  EXPECT_FALSE(h_->verbs.contains(verb));
  EXPECT_GT(h_->tokens[request].size(), 8u) << "it decodes meanwhile";
  h_->Tick(11'000'000);
  ASSERT_TRUE(h_->verbs.contains(verb));
  EXPECT_EQ(h_->verbs.at(verb).code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(h_->verbs.at(verb).message()), HasSubstr("--migrate-stall"));
  h_->Run();
  ExpectWhole(request, 1, 100, 60);
  ExpectEmpty();
}

// What a worker says may come behind its eviction, and be of a move that was not given up yet.
TEST_F(MigrationTest, LastWordsOfWhoWasEvictedAreNothing) {
  Start(1);
  const RequestId request = h_->Submit(OneSequence(100, 60));
  Rounds(8);
  const uint64_t from = WhereIs(1);
  h_->answer_fetches = false;
  h_->Migrate(1, PipelineId{Other(from)});
  Rounds(3);
  const WorkerId worker = WorkersOf(Other(from)).front();
  const Harness::FakeStage& stage = h_->StageOf(worker);
  ASSERT_FALSE(stage.moves.fetches.empty());
  v1::FromWorker lie;
  lie.mutable_rows_fetched()->set_stage_id(stage.load.stage_id());
  *lie.mutable_rows_fetched()->mutable_epoch() = stage.epoch;
  lie.mutable_rows_fetched()->set_sequence_id(1);
  *lie.mutable_rows_fetched()->mutable_placement() = stage.moves.fetches.front().placement();
  lie.mutable_rows_fetched()->set_rows(100'000);
  h_->core.OnWorkerMessage(worker, v1::FromWorker(), h_->now_us);
  h_->core.OnWorkerMessage(worker, lie, h_->now_us);
  h_->Pump();
  EXPECT_TRUE(h_->workers.at(worker).evicted);
  h_->Run();
  ExpectWhole(request, 1, 100, 60);
}

// The move is done but for the destination's word: an error of what was fetched before is none any more.
TEST_F(MigrationTest, AnErrorAfterTheCommitIsTooLate) {
  Start(1);
  const RequestId request = h_->Submit(OneSequence(100, 60));
  Rounds(8);
  const uint64_t from = WhereIs(1);
  const VerbId verb = h_->Migrate(1, PipelineId{Other(from)});
  const WorkerId worker = WorkersOf(Other(from)).front();
  const Harness::FakeStage& stage = h_->StageOf(worker);
  v1::FromWorker error;
  bool is_told = false;
  for (int i = 0; i < 40 && !h_->verbs.contains(verb); ++i) {
    if (const auto it = stage.moves.imports.find(SequenceId{1}); it != stage.moves.imports.end()) {
      v1::RowsFetched* told = error.mutable_rows_fetched();
      told->set_stage_id(stage.load.stage_id());
      *told->mutable_epoch() = stage.epoch;
      told->set_sequence_id(1);
      told->mutable_placement()->set_term(it->second.placement.term);
      told->mutable_placement()->set_counter(it->second.placement.counter);
      told->set_error_code(10);
    }
    const WorkerId next = i % 2 == 0 ? WorkersOf(from).front() : worker;
    if (!h_->StageOf(next).plans.empty()) h_->Report(next);
    const std::string status = h_->core.StatusJson(h_->now_us);
    if (is_told || status.find("\"phase\":\"adopt\"") == std::string::npos) continue;
    h_->core.OnWorkerMessage(worker, error, h_->now_us);
    h_->Pump();
    is_told = true;
  }
  EXPECT_TRUE(is_told);
  ASSERT_TRUE(h_->verbs.contains(verb));
  EXPECT_TRUE(h_->verbs.at(verb).ok()) << h_->verbs.at(verb);
  h_->Run();
  ExpectWhole(request, 1, 100, 60);
  ExpectEmpty();
}

// A death of any worker at any moment of a move: the sequence is in one place, and its client notices nothing.
class MigrationDeathTest : public MigrationTest,
                           public testing::WithParamInterface<std::tuple<int, int>> {};

TEST_P(MigrationDeathTest, AnyWorkerAtAnyMoment) {
  const auto [moment, victim] = GetParam();
  CoreOptions options;
  options.num_stages = 2;
  options.num_pipelines = 2;
  Start(options, 6, kRoomy);
  const RequestId request = h_->Submit(OneSequence(150, 60));
  const RequestId other = h_->Submit(OneSequence(60, 60));
  Rounds(10);
  const uint64_t from = WhereIs(1);
  std::vector<WorkerId> workers = WorkersOf(from);
  for (const WorkerId worker : WorkersOf(Other(from))) workers.push_back(worker);
  h_->answer_fetches = false;
  const VerbId verb = h_->Migrate(1, PipelineId{Other(from)});
  // One small thing at a time.
  int moments = 0;
  const auto pass = [&] {
    if (moments++ == moment) h_->Lose(workers[victim]);
  };
  for (int i = 0; i < 12 && !h_->verbs.contains(verb); ++i) {
    for (const WorkerId worker : workers) {
      pass();
      if (!h_->workers.contains(worker) || h_->workers.at(worker).stages.empty()) continue;
      Harness::FakeStage& stage = h_->StageOf(worker);
      if (!stage.plans.empty()) h_->Report(worker, stage);
      pass();
      if (!h_->workers.contains(worker) || h_->workers.at(worker).stages.empty()) continue;
      h_->AnswerFetches(worker, h_->StageOf(worker));
      h_->AnswerServe(worker, h_->StageOf(worker));
    }
  }
  h_->answer_fetches = true;
  for (auto& [id, worker] : h_->workers) {
    for (auto& [stage_id, stage] : worker.stages) {
      h_->AnswerFetches(id, stage);
      h_->AnswerServe(id, stage);
    }
  }
  h_->Run();
  EXPECT_TRUE(h_->verbs.contains(verb));
  ExpectWhole(request, 1, 150, 60);
  ExpectWhole(other, 2, 60, 60);
  ExpectEmpty();
}

INSTANTIATE_TEST_SUITE_P(Moments, MigrationDeathTest,
                         testing::Combine(testing::Range(0, 64), testing::Range(0, 4)));

}  // namespace
}  // namespace strait

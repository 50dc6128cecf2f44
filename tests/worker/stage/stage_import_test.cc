// SPDX-License-Identifier: Apache-2.0
//
// Defends: an import's blocks count from its plan on, whatever has come of its rows; it is opened with exactly the
// rows that were fetched, and goes on as if it had been computed here; what contradicts that is refused with a
// sentence, and no block is anybody's while a copy writes it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "proto/wire/epoch_wire.h"
#include "proto/wire/tables_digest.h"
#include "tests/worker/stage/fake_model.h"
#include "tests/worker/transfer/scripted_transfer.h"

namespace strait {
namespace {

using testing::HasSubstr;

constexpr uint32_t kLayers = 2;
constexpr uint32_t kBlocks = 12;
constexpr PlacementEpoch kPlacement = {1, 7};

class StageImportTest : public testing::Test {
 protected:
  StageImportTest() {
    f_.transfer.transfer = &transfer_;
    EXPECT_TRUE(f_.stage->Activate({1, 1}, 0, 1, false, 2).ok());
  }
  ~StageImportTest() override {
    f_.stage.reset();
    EXPECT_EQ(f_.transfer.asked_bytes, 0u);
    EXPECT_EQ(f_.transfer.made_bytes, 0u);
    EXPECT_TRUE(f_.transfer.asks.empty());
    EXPECT_EQ(f_.pool.used(), 0u);
  }

  static std::vector<TokenId> Tokens(uint32_t count) {
    std::vector<TokenId> tokens(count);
    for (uint32_t i = 0; i < count; ++i) tokens[i] = i * 7 % kFakeVocab;
    return tokens;
  }
  static void AddImport(v1::StepPlan* plan, uint64_t id, uint32_t rows,
                        PlacementEpoch placement = kPlacement) {
    v1::ImportSequence* import = plan->add_cache_ops()->mutable_import();
    import->set_sequence_id(id);
    import->mutable_placement()->set_term(placement.term);
    import->mutable_placement()->set_counter(placement.counter);
    import->set_rows(rows);
  }
  static void AddOpenImported(v1::StepPlan* plan, uint64_t id, uint32_t rows) {
    AddOpen(plan, id);
    plan->mutable_cache_ops(plan->cache_ops_size() - 1)->mutable_open()->set_imported_rows(rows);
  }
  v1::FetchRows Fetch(uint64_t id, uint32_t begin, uint32_t end) const {
    v1::FetchRows fetch;
    fetch.set_stage_id(FakeStage::kStageId);
    ToWire(f_.stage->epoch(), fetch.mutable_epoch());
    fetch.set_sequence_id(id);
    fetch.mutable_placement()->set_term(kPlacement.term);
    fetch.mutable_placement()->set_counter(kPlacement.counter);
    fetch.set_begin_row(begin);
    fetch.set_end_row(end);
    const std::vector<TokenId> tokens = Tokens(end);
    fetch.mutable_tokens()->mutable_ids()->Add(tokens.begin() + begin, tokens.end());
    v1::RowsSource* source = fetch.add_sources();
    source->set_layer_end(kLayers);
    source->set_stage_id(3);
    source->set_data_address("a:1");
    source->set_secret(99);
    return fetch;
  }
  void Accept(const v1::StepPlan& plan) {
    const absl::Status status = f_.stage->AcceptPlan(plan, 0);
    ASSERT_TRUE(status.ok()) << status;
  }
  void ExpectRefused(const v1::StepPlan& plan, absl::StatusCode code, const std::string& what) {
    const absl::Status status = f_.stage->AcceptPlan(plan, 0);
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_THAT(status.message(), HasSubstr(what));
  }
  RowMoves Poll() {
    HostMoves moves;
    RowMoves rows;
    f_.stage->PollCopies(now_us_ += 1'000, &moves, &rows);
    f_.stage->AskRows(true, now_us_);
    f_.stage->AskRows(false, now_us_);
    const absl::Status sound = f_.stage->CheckIntegrity();
    EXPECT_TRUE(sound.ok()) << sound;
    return rows;
  }
  void AnswerAll() {
    while (!transfer_.asks.empty()) {
      const ScriptedTransfer::Asked asked = transfer_.Take();
      f_.transfer.asks.at(asked.id)->OnRows(asked.id, Rows(asked.ask), now_us_);
    }
  }
  static RowsFrame Rows(const RowsAsk& ask) {
    return FrameOf(ask, [](LayerIndex layer, uint32_t position) {
      return FakeRow(layer, Tokens(position + 1).back(), position);
    });
  }
  // Imports sequence 7 by step `step`, with all of its rows.
  void Import(uint64_t step, uint32_t rows) {
    v1::StepPlan plan = f_.Plan(step);
    AddImport(&plan, 7, rows);
    Accept(plan);
    f_.Run();
    f_.stage->FetchRows(Fetch(7, 0, rows), now_us_);
    Poll();
    AnswerAll();
    while (f_.stage->CopiesRows()) Poll();
  }

  ScriptedTransfer transfer_;
  FakeStage f_{{0, kLayers}, kLayers, kBlocks};
  uint64_t now_us_ = 0;
};

TEST_F(StageImportTest, ItGoesOnAsIfItHadBeenComputedHere) {
  v1::StepPlan plan = f_.Plan(1);
  AddImport(&plan, 7, 130);
  Accept(plan);
  EXPECT_EQ(f_.stage->blocks_used(), 6u);  // at once, before its step
  v1::StageReport report = f_.Run().report;
  EXPECT_EQ(BlocksHeld(report), 6u);
  TablesDigest digest;
  digest.Add(SequenceId{7}, 130);
  EXPECT_EQ(report.tables_digest(), digest.Value());

  f_.stage->FetchRows(Fetch(7, 0, 100), now_us_);
  EXPECT_TRUE(f_.stage->CopiesRows());
  EXPECT_TRUE(Poll().fetched.empty());
  ASSERT_EQ(transfer_.asks.size(), 1u);
  EXPECT_EQ(transfer_.asks[0].address, "a:1");
  EXPECT_EQ(transfer_.asks[0].ask.num_rows, 100u);
  EXPECT_EQ(transfer_.asks[0].ask.layers, (LayerRange{0, kLayers}));
  AnswerAll();
  std::vector<Importer::Fetched> fetched = Poll().fetched;
  ASSERT_EQ(fetched.size(), 1u);
  EXPECT_EQ(fetched[0].rows, 100u);
  EXPECT_EQ(fetched[0].bytes, 200 * kHashRowBytes);
  EXPECT_TRUE(fetched[0].status.ok());

  // Rows that are not all that was asked for, or that never were.
  plan = f_.Plan(2);
  AddOpenImported(&plan, 7, 99);
  ExpectRefused(plan, absl::StatusCode::kFailedPrecondition, "imported rows are not all");
  f_.stage->FetchRows(Fetch(7, 100, 120), now_us_);
  plan = f_.Plan(2);
  AddOpenImported(&plan, 7, 120);
  ExpectRefused(plan, absl::StatusCode::kFailedPrecondition, "imported rows are not all");
  Poll();
  AnswerAll();
  EXPECT_EQ(Poll().fetched.at(0).rows, 120u);

  AddRows(&plan, 7, 120, {Tokens(121).back()});
  WantScore(plan.mutable_sequences(0), 0, 3);
  Accept(plan);
  report = f_.Run().report;
  ASSERT_EQ(report.error_code(), 0u) << report.error_message();
  EXPECT_EQ(BlocksHeld(report), 4u);  // those beyond its rows are free
  EXPECT_EQ(report.results(0).scored(0).logprob(),
            -static_cast<float>(FakeHash({0, kLayers}, Tokens(121)) % 4096));
  EXPECT_EQ(f_.model->last_tokens, Tokens(121));
  // It outlives the epoch as any other.
  ASSERT_TRUE(f_.stage->Activate({1, 2}, 0, 1).ok());
  ASSERT_EQ(f_.stage->held().size(), 1u);
  EXPECT_EQ(f_.stage->held()[0].rows, 121u);
}

TEST_F(StageImportTest, PlansThatContradictAnImportAreRefused) {
  v1::StepPlan plan = f_.Plan(1);
  AddOpen(&plan, 8);
  AddRows(&plan, 8, 0, Tokens(64));
  AddImport(&plan, 7, 64);
  Accept(plan);
  f_.Run();
  const auto expect_refused = [&](const std::function<void(v1::StepPlan*)>& what,
                                  absl::StatusCode code, const std::string& says) {
    v1::StepPlan wrong = f_.Plan(2);
    what(&wrong);
    ExpectRefused(wrong, code, says);
  };
  using absl::StatusCode;
  expect_refused([](auto* p) { AddImport(p, 8, 64); }, StatusCode::kFailedPrecondition,
                 "it is resident");
  expect_refused([](auto* p) { AddImport(p, 7, 64); }, StatusCode::kInvalidArgument,
                 "it has blocks for 64 already");
  expect_refused(
      [](auto* p) {
        AddImport(p, 7, 65, {1, 8});
      },
      StatusCode::kFailedPrecondition, "it is imported for 1.7");
  expect_refused([](auto* p) { AddImport(p, 9, 0); }, StatusCode::kInvalidArgument, "rows is 0");
  expect_refused([](auto* p) { AddImport(p, 9, FakeStage::kMaxPositions + 1); },
                 StatusCode::kInvalidArgument, "rows is 2001");
  expect_refused([](auto* p) { AddImport(p, 9, 64 * 5); }, StatusCode::kResourceExhausted,
                 "14 latent blocks");
  // What a plan gives back later does not make room.
  expect_refused(
      [](auto* p) {
        AddImport(p, 9, 64 * 5);
        AddClose(p, 8);
      },
      StatusCode::kResourceExhausted, "14 latent blocks");
  expect_refused([](auto* p) { AddRows(p, 7, 0, {1}); }, StatusCode::kFailedPrecondition,
                 "it is not resident");
  expect_refused([](auto* p) { AddOpen(p, 7); }, StatusCode::kFailedPrecondition,
                 "imported_rows is 0");
  expect_refused([](auto* p) { AddOpenImported(p, 7, 65); }, StatusCode::kFailedPrecondition,
                 "imported_rows is 65");
  expect_refused([](auto* p) { AddOpenImported(p, 9, 65); }, StatusCode::kFailedPrecondition,
                 "is not imported");
  expect_refused(
      [](auto* p) {
        AddOpenImported(p, 7, 64);
        p->mutable_cache_ops(0)->mutable_open()->add_kept_rows(64);
      },
      StatusCode::kInvalidArgument, "imported rows are all that it begins with");
  expect_refused([](auto* p) { AddOpenImported(p, 7, 64); }, StatusCode::kFailedPrecondition,
                 "not all that was fetched");
  // Nothing of it was changed.
  plan = f_.Plan(2);
  AddImport(&plan, 7, 200);
  Accept(plan);
  EXPECT_EQ(BlocksHeld(f_.Run().report), 10u);
}

TEST_F(StageImportTest, FetchesThatContradictThePlansEndTheImport) {
  const auto error_of = [&](const v1::FetchRows& fetch) {
    f_.stage->FetchRows(fetch, now_us_);
    const std::vector<Importer::Fetched> fetched = Poll().fetched;
    EXPECT_EQ(fetched.size(), 1u);
    return fetched.empty() ? absl::OkStatus() : fetched[0].status;
  };
  EXPECT_THAT(error_of(Fetch(7, 0, 64)).message(), HasSubstr("no plan that came before"));
  const std::vector<std::function<void(v1::FetchRows*)>> wrongs = {
      [](auto* f) { f->set_begin_row(1); },
      [](auto* f) { f->set_end_row(0); },
      [](auto* f) { f->set_end_row(65); },
      [](auto* f) { f->mutable_tokens()->add_ids(1); },
      [](auto* f) { f->mutable_tokens()->set_ids(3, kFakeVocab); },
      [](auto* f) { f->clear_sources(); },
      [](auto* f) { f->mutable_sources(0)->set_layer_end(1); },
      [](auto* f) { f->mutable_sources(0)->set_layer_end(3); },
      [](auto* f) { f->mutable_sources(0)->set_layer_begin(1); },
      [](auto* f) { f->mutable_sources(0)->set_secret(0); },
      [](auto* f) { f->mutable_sources(0)->clear_data_address(); },
  };
  uint64_t step = 0;
  for (const auto& wrong : wrongs) {
    v1::StepPlan plan = f_.Plan(++step);
    if (step > 1) AddClose(&plan, 7);
    AddImport(&plan, 7, 64);
    Accept(plan);
    f_.Run();
    v1::FetchRows fetch = Fetch(7, 0, 64);
    wrong(&fetch);
    // The first one makes no import known: the right one after it is taken.
    const absl::Status status = error_of(fetch);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status << ", step " << step;
    EXPECT_EQ(error_of(Fetch(7, 0, 64)), status);
    EXPECT_TRUE(transfer_.asks.empty());
  }
  // Of another placement, or of another epoch: not this import's.
  v1::StepPlan plan = f_.Plan(++step);
  AddClose(&plan, 7);
  AddImport(&plan, 7, 64);
  Accept(plan);
  v1::FetchRows other = Fetch(7, 0, 64);
  other.mutable_placement()->set_counter(8);
  EXPECT_THAT(error_of(other).message(), HasSubstr("no plan that came before"));
  other = Fetch(7, 0, 64);
  other.mutable_epoch()->set_counter(0);
  f_.stage->FetchRows(other, now_us_);
  EXPECT_TRUE(Poll().fetched.empty());
  f_.stage->FetchRows(Fetch(7, 0, 64), now_us_);
  Poll();
  EXPECT_EQ(transfer_.asks.size(), 1u);
}

TEST_F(StageImportTest, AFetchWaitsForItsPlanAndForItsBlocks) {
  f_.model->done = false;  // step 1 stays begun
  v1::StepPlan plan = f_.Plan(1);
  AddOpen(&plan, 8);
  AddRows(&plan, 8, 0, Tokens(64 * 3));
  Accept(plan);
  f_.Begin();
  plan = f_.Plan(2);  // rows, so the import of step 3 is not next
  AddRows(&plan, 8, 64 * 3, {5});
  Accept(plan);
  plan = f_.Plan(3);
  AddImport(&plan, 7, 64);
  Accept(plan);
  f_.stage->FetchRows(Fetch(7, 0, 64), now_us_);
  Poll();
  EXPECT_TRUE(transfer_.asks.empty());
  f_.Begin();  // of step 2: step 3 is next
  Poll();
  EXPECT_EQ(transfer_.asks.size(), 1u);
  f_.Finish();
  f_.Finish();
}

TEST_F(StageImportTest, BlocksOfAClosedImportAreNobodysUntilTheCopyHasEnded) {
  v1::StepPlan plan = f_.Plan(1);
  AddImport(&plan, 7, 64 * 6);  // all blocks
  Accept(plan);
  f_.Run();
  f_.stage->FetchRows(Fetch(7, 0, 64 * 5), now_us_);
  Poll();
  f_.model->copy_faults.delay_polls = 3;
  AnswerAll();
  plan = f_.Plan(2);
  AddClose(&plan, 7);
  AddOpen(&plan, 8);
  AddRows(&plan, 8, 0, Tokens(64 * 2));
  Accept(plan);
  // What takes their place must fit beside the copy, and does not.
  EXPECT_EQ(f_.stage->cache().num_pinned(), 10u);
  EXPECT_EQ(f_.stage->blocks_used(), 0u);
  while (!f_.stage->IsQuiet()) {
    EXPECT_FALSE(f_.stage->Ready());
    Poll();
  }
  EXPECT_EQ(f_.stage->cache().num_pinned(), 0u);
  ASSERT_TRUE(f_.stage->Ready());
  EXPECT_EQ(BlocksHeld(f_.Run().report), 4u);
}

TEST_F(StageImportTest, AnImportEndsWithItsEpoch) {
  Import(1, 100);
  f_.stage->FetchRows(Fetch(7, 100, 100), now_us_);  // wrong: it ends
  v1::StepPlan plan = f_.Plan(2);
  AddImport(&plan, 7, 200);
  AddImport(&plan, 9, 64);
  Accept(plan);
  f_.stage->FetchRows(Fetch(9, 0, 64), now_us_);
  Poll();
  f_.model->copy_faults.delay_polls = 5;
  AnswerAll();
  ASSERT_TRUE(f_.stage->Activate({1, 2}, 0, 1).ok());
  EXPECT_EQ(f_.stage->blocks_used(), 0u);
  EXPECT_TRUE(f_.stage->held().empty());
  EXPECT_TRUE(f_.stage->IsQuiet());
  EXPECT_EQ(f_.transfer.asked_bytes, 0u);
  plan = f_.Plan(1);
  AddRows(&plan, 7, 100, {1});
  ExpectRefused(plan, absl::StatusCode::kFailedPrecondition, "it is not resident");
}

TEST_F(StageImportTest, WhatIsLeftFromBeforeIsClosedBeforeItIsImported) {
  v1::StepPlan plan = f_.Plan(1);
  AddOpen(&plan, 7);
  AddRows(&plan, 7, 0, Tokens(70));
  Accept(plan);
  f_.Run();
  ASSERT_TRUE(f_.stage->Activate({1, 2}, 0, 1).ok());
  plan = f_.Plan(1);
  AddImport(&plan, 7, 64);
  ExpectRefused(plan, absl::StatusCode::kFailedPrecondition, "left from an earlier epoch");
  plan = f_.Plan(1);
  AddClose(&plan, 7);
  AddImport(&plan, 7, 64);
  Accept(plan);
  EXPECT_EQ(BlocksHeld(f_.Run().report), 2u);
}

}  // namespace
}  // namespace strait

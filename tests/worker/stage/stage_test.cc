// SPDX-License-Identifier: Apache-2.0
//
// Defends: a stage runs exactly the plans that agree with its state, in order, and refuses every
// other one without changing; what it reports is what it holds.
#include "worker/stage/stage.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "proto/model/reservation.h"
#include "proto/wire/tables_digest.h"
#include "tests/worker/stage/fake_model.h"

namespace strait {
namespace {

using testing::HasSubstr;

constexpr PipelineEpoch kEpoch{1, 1};

// The only stage of a pipeline: embeds and samples.
FakeStage OneStage(uint32_t pool_blocks = 64) {
  FakeStage f({0, 2}, 2, pool_blocks);
  EXPECT_TRUE(f.stage->Activate(kEpoch, 0, 1).ok());
  return f;
}
// The last of two.
FakeStage LastStage() {
  FakeStage f({2, 4}, 4, 64);
  EXPECT_TRUE(f.stage->Activate(kEpoch, 1, 2).ok());
  return f;
}

// Layers in the middle: takes hidden states and gives some.
FakeStage MiddleStage() {
  FakeStage f({1, 3}, 5, 20);
  EXPECT_TRUE(f.stage->Activate({1, 1}, 1, 3).ok());
  return f;
}

std::vector<TokenId> Tokens(uint32_t count, TokenId first = 10) {
  std::vector<TokenId> tokens;
  for (uint32_t i = 0; i < count; ++i) tokens.push_back((first + i * 7) % kFakeVocab);
  return tokens;
}

// Regression: one sequence whose logits were NaN brought down the stage, and with it all the others.
TEST(StageTest, LogitsThatAreNoNumbersEndTheirSequenceAlone) {
  FakeStage f = OneStage();
  f.model->bad_sequence = SequenceId{4};
  const auto tokens = Tokens(3);
  v1::StepPlan plan = f.Plan(1);
  for (const uint64_t id : {3, 4, 5}) {
    AddOpen(&plan, id, 3);
    v1::SequenceStep* rows = AddRows(&plan, id, 0, tokens);
    WantScore(rows, 0, tokens[1]);
    WantSample(rows, 2);
  }
  ASSERT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
  StepOutput out = f.Run();
  EXPECT_EQ(out.report.error_code(), 0u) << out.report.error_message();
  ASSERT_EQ(out.report.results_size(), 3);
  for (const int well : {0, 2}) {
    const v1::SequenceResult& result = out.report.results(well);
    EXPECT_EQ(result.error_code(), 0u);
    EXPECT_EQ(result.scored_size(), 1);
    EXPECT_EQ(result.sampled().token_id(), FakeHash({0, 2}, tokens) % kFakeVocab);
  }
  const v1::SequenceResult& bad = out.report.results(1);
  EXPECT_EQ(bad.sequence_id(), 4u);
  EXPECT_EQ(static_cast<absl::StatusCode>(bad.error_code()), absl::StatusCode::kDataLoss);
  EXPECT_EQ(bad.error_message(), "no numbers");
  EXPECT_EQ(bad.scored_size(), 0);
  EXPECT_FALSE(bad.has_sampled());
  // It is closed, the others go on.
  plan = f.Plan(2);
  AddClose(&plan, 4);
  WantSample(AddRows(&plan, 3, 3, {1}), 0);
  ASSERT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
  out = f.Run();
  EXPECT_EQ(out.report.error_code(), 0u) << out.report.error_message();
  EXPECT_TRUE(f.stage->CheckIntegrity().ok());
}

TEST(StageTest, RunsAPromptAndDecodesReportingWhatItHolds) {
  FakeStage f = OneStage();
  auto tokens = Tokens(70);
  v1::StepPlan plan = f.Plan(1);
  AddOpen(&plan, 3, 70);
  v1::SequenceStep* rows = AddRows(&plan, 3, 0, tokens);
  WantScore(rows, 4, tokens[5]);
  WantSample(rows, 69, 2);
  ASSERT_TRUE(f.stage->AcceptPlan(plan, 100).ok());
  ASSERT_TRUE(f.stage->Ready());
  EXPECT_EQ(f.stage->blocks_used(), 0u);
  StepOutput out = f.Run();
  EXPECT_FALSE(out.hidden.has_value());
  EXPECT_EQ(out.report.error_code(), 0u);
  EXPECT_EQ(out.report.stage_id(), FakeStage::kStageId);
  EXPECT_EQ(out.report.step_id(), 1u);
  EXPECT_EQ(out.report.epoch().counter(), 1u);
  EXPECT_EQ(BlocksHeld(out.report), BlocksOfSequence(70, 2));
  EXPECT_EQ(out.report.compute_us(), 10u);
  TablesDigest digest;
  digest.Add({3}, 70);
  EXPECT_EQ(out.report.tables_digest(), digest.Value());
  ASSERT_EQ(out.report.results_size(), 1);
  const v1::SequenceResult& result = out.report.results(0);
  EXPECT_EQ(result.sequence_id(), 3u);
  ASSERT_EQ(result.scored_size(), 1);
  EXPECT_EQ(result.scored(0).token_id(), tokens[5]);
  EXPECT_EQ(result.sampled().token_id(), FakeHash({0, 2}, tokens) % kFakeVocab);
  EXPECT_EQ(result.sampled().top_ids_size(), 2);
  EXPECT_EQ(result.sampled().top_logprobs_size(), 2);

  for (uint64_t step = 2; step < 200; ++step) {
    tokens.push_back(static_cast<TokenId>(FakeHash({0, 2}, tokens) % kFakeVocab));
    plan = f.Plan(step);
    WantSample(AddRows(&plan, 3, static_cast<uint32_t>(tokens.size()) - 1, {tokens.back()}), 0);
    ASSERT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
    out = f.Run();
    ASSERT_EQ(out.report.results(0).sampled().token_id(), FakeHash({0, 2}, tokens) % kFakeVocab);
    ASSERT_EQ(BlocksHeld(out.report), BlocksOfSequence(static_cast<uint32_t>(tokens.size()), 2));
    ASSERT_TRUE(f.stage->CheckIntegrity().ok()) << f.stage->CheckIntegrity();
  }
  plan = f.Plan(200);
  AddClose(&plan, 3);
  ASSERT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
  out = f.Run();
  EXPECT_EQ(BlocksHeld(out.report), 0u);
  EXPECT_EQ(out.report.tables_digest(), TablesDigest().Value());
}

TEST(StageTest, ChecksPlansAgainstThePlansThatWait) {
  FakeStage f = OneStage();
  v1::StepPlan first = f.Plan(1);
  AddOpen(&first, 1);
  AddRows(&first, 1, 0, Tokens(5));
  ASSERT_TRUE(f.stage->AcceptPlan(first, 0).ok());
  // Not one of these steps has run.
  v1::StepPlan second = f.Plan(2);
  AddRows(&second, 1, 5, Tokens(60));
  ASSERT_TRUE(f.stage->AcceptPlan(second, 0).ok());
  v1::StepPlan third = f.Plan(3);
  AddClose(&third, 1);
  AddOpen(&third, 2);
  AddRows(&third, 2, 0, Tokens(3));
  ASSERT_TRUE(f.stage->AcceptPlan(third, 0).ok());
  v1::StepPlan fourth = f.Plan(4);
  AddRows(&fourth, 1, 65, Tokens(1));
  EXPECT_EQ(f.stage->AcceptPlan(fourth, 0).code(), absl::StatusCode::kFailedPrecondition);
  for (uint64_t step = 1; step <= 3; ++step) EXPECT_EQ(f.Run().report.step_id(), step);
  EXPECT_FALSE(f.stage->Ready());
  EXPECT_EQ(f.stage->blocks_used(), BlocksOfSequence(3, 2));
  EXPECT_TRUE(f.stage->CheckIntegrity().ok());
}

struct Refusal {
  const char* says;
  absl::StatusCode code;
  std::function<void(v1::StepPlan*)> spoil;
};

// Step 2 on a stage where sequence 1 has five tokens, the last one sampled after.
TEST(StageTest, RefusesWhatContradictsItselfOrTheState) {
  const auto invalid = absl::StatusCode::kInvalidArgument;
  const auto contrary = absl::StatusCode::kFailedPrecondition;
  const auto exhausted = absl::StatusCode::kResourceExhausted;
  const std::vector<Refusal> refusals = {
      {"for stage 6", invalid, [](auto* p) { p->set_stage_id(6); }},
      {"of epoch 1.0", absl::StatusCode::kAborted,
       [](auto* p) { p->mutable_epoch()->set_counter(0); }},
      {"of epoch 0.0", absl::StatusCode::kAborted, [](auto* p) { p->clear_epoch(); }},
      {"activate it first", contrary, [](auto* p) { p->mutable_epoch()->set_term(2); }},
      {"step 2 is the next", contrary, [](auto* p) { p->set_step_id(3); }},
      {"step 2 is the next", contrary, [](auto* p) { p->set_step_id(1); }},
      {"step 2 is the next", contrary, [](auto* p) { p->set_step_id(0); }},
      {"a kind that", invalid, [](auto* p) { p->add_cache_ops(); }},
      {"resident already", contrary, [](auto* p) { AddOpen(p, 1); }},
      {"resident already", contrary, [](auto* p) { AddOpen(p, 2), AddOpen(p, 2); }},
      {"prompt_tokens is 0", invalid, [](auto* p) { AddOpen(p, 2, 0); }},
      {"prompt_tokens is 2001", invalid, [](auto* p) { AddOpen(p, 2, 2001); }},
      {"top_p", invalid,
       [](auto* p) {
         AddOpen(p, 2), p->mutable_cache_ops(0)->mutable_open()->mutable_sampling()->set_top_p(2);
       }},
      {"close of sequence 2", contrary, [](auto* p) { AddClose(p, 2); }},
      {"close of sequence 1", contrary, [](auto* p) { AddClose(p, 1), AddClose(p, 1); }},
      {"cache operations", exhausted,
       [](auto* p) {
         for (uint32_t i = 0; i <= limits::kMaxCacheOps; ++i) AddOpen(p, 10 + i);
       }},
      {"sequences, at most", exhausted,
       [](auto* p) {
         for (uint32_t i = 0; i <= limits::kMaxStepSequences; ++i) AddRows(p, i, 0, {1});
       }},
      {"sequence 2: it is not resident", contrary, [](auto* p) { AddRows(p, 2, 0, {1}); }},
      {"sequence 1: it is not resident", contrary,
       [](auto* p) { AddClose(p, 1), AddRows(p, 1, 5, {1}); }},
      {"twice in one plan", invalid, [](auto* p) { AddRows(p, 1, 5, {1}), AddRows(p, 1, 6, {1}); }},
      {"first_position 4 does not follow its length 5", contrary,
       [](auto* p) { AddRows(p, 1, 4, {1}); }},
      {"first_position 6", contrary, [](auto* p) { AddRows(p, 1, 6, {1}); }},
      {"no token source", invalid, [](auto* p) { AddRows(p, 1, 5, {}); }},
      {"no tokens", invalid, [](auto* p) { AddRows(p, 1, 5, {})->mutable_literals(); }},
      {"token id 1000", invalid,
       [](auto* p) {
         AddRows(p, 1, 5, {999, 1000});
       }},
      {"context of 2000", invalid, [](auto* p) { AddRows(p, 1, 5, Tokens(1996)); }},
      {"tokens in one step", exhausted,
       [](auto* p) { AddRows(p, 1, 5, Tokens(limits::kMaxStepTokens + 1)); }},
      {"latent blocks, the stage has 64", exhausted,
       [](auto* p) {
         AddOpen(p, 2), AddRows(p, 1, 5, Tokens(1900)), AddRows(p, 2, 0, Tokens(200));
       }},
      {"step 2 samples no token", contrary, [](auto* p) { AddGrant(p, 1, 5, 2); }},
      {"step 0 samples no token", contrary, [](auto* p) { AddGrant(p, 1, 5, 0); }},
      {"offsets must rise", invalid, [](auto* p) { WantSample(AddRows(p, 1, 5, {1}), 1); }},
      {"offsets must rise", invalid,
       [](auto* p) {
         auto* rows = AddRows(p, 1, 5, {1, 2});
         WantScore(rows, 1, 2), WantScore(rows, 0, 2);
       }},
      {"offsets must rise", invalid,
       [](auto* p) {
         auto* rows = AddRows(p, 1, 5, {1, 2});
         WantScore(rows, 1, 2), WantSample(rows, 1);
       }},
      {"only the last of the 2", invalid,
       [](auto* p) {
         WantSample(AddRows(p, 1, 5, {1, 2}), 0);
       }},
      {"token id 1000", invalid, [](auto* p) { WantScore(AddRows(p, 1, 5, {1}), 0, 1000); }},
      {"num_top is 21", exhausted, [](auto* p) { WantSample(AddRows(p, 1, 5, {1}), 0, 21); }},
      {"sample is false", invalid,
       [](auto* p) { AddRows(p, 1, 5, {1})->add_logits()->set_sample(false); }},
      {"neither a score nor", invalid, [](auto* p) { AddRows(p, 1, 5, {1})->add_logits(); }},
  };
  FakeStage f = OneStage();
  v1::StepPlan plan = f.Plan(1);
  AddOpen(&plan, 1);
  WantSample(AddRows(&plan, 1, 0, Tokens(5)), 4);
  ASSERT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
  f.Run();
  for (size_t i = 0; i < refusals.size(); ++i) {
    plan = f.Plan(2);
    refusals[i].spoil(&plan);
    const absl::Status status = f.stage->AcceptPlan(plan, 0);
    EXPECT_EQ(status.code(), refusals[i].code) << i << " " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(refusals[i].says)) << i;
    EXPECT_FALSE(f.stage->Ready()) << i;
  }
  // None of them left a trace.
  plan = f.Plan(2);
  WantSample(AddGrant(&plan, 1, 5, 1), 0);
  ASSERT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
  auto tokens = Tokens(5);
  tokens.push_back(static_cast<TokenId>(FakeHash({0, 2}, tokens) % kFakeVocab));
  EXPECT_EQ(f.Run().report.results(0).sampled().token_id(), FakeHash({0, 2}, tokens) % kFakeVocab);
}

TEST(StageTest, FollowsGrantsSeveralStepsAheadWhereItSamplesAndEmbeds) {
  FakeStage f = OneStage();
  auto tokens = Tokens(3);
  v1::StepPlan plan = f.Plan(1);
  AddOpen(&plan, 1);
  WantSample(AddRows(&plan, 1, 0, tokens), 2);
  ASSERT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
  for (uint64_t step = 2; step <= 6; ++step) {
    plan = f.Plan(step);
    WantSample(AddGrant(&plan, 1, static_cast<uint32_t>(step) + 1, step - 1), 0);
    ASSERT_TRUE(f.stage->AcceptPlan(plan, 0).ok()) << step;
  }
  // A literal may overrule what was sampled; after it the old grant is void.
  plan = f.Plan(7);
  AddRows(&plan, 1, 8, {1});
  ASSERT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
  plan = f.Plan(8);
  AddGrant(&plan, 1, 9, 6);
  EXPECT_EQ(f.stage->AcceptPlan(plan, 0).code(), absl::StatusCode::kFailedPrecondition);
  for (uint64_t step = 1; step <= 6; ++step) {
    const TokenId expected = static_cast<TokenId>(FakeHash({0, 2}, tokens) % kFakeVocab);
    ASSERT_EQ(f.Run().report.results(0).sampled().token_id(), expected) << step;
    tokens.push_back(expected);
  }
}

TEST(StageTest, RefusesGrantsInAPipelineOfSeveralStages) {
  FakeStage f = LastStage();
  v1::StepPlan plan = f.Plan(1);
  AddOpen(&plan, 1);
  WantSample(AddRows(&plan, 1, 0, {1}), 0);
  ASSERT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
  plan = f.Plan(2);
  AddGrant(&plan, 1, 1, 1);
  const absl::Status status = f.stage->AcceptPlan(plan, 0);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("no path for grants"));
}

TEST(StageTest, EntersEpochsOnlyForwardAndWhereItsLayersFit) {
  FakeStage f({0, 2}, 4, 64);
  EXPECT_EQ(f.stage->Activate({0, 0}, 0, 2).code(), absl::StatusCode::kAborted);
  EXPECT_EQ(f.stage->Activate({1, 1}, 0, 0).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(f.stage->Activate({1, 1}, 2, 2).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(f.stage->Activate({1, 1}, 1, 3).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(f.stage->Activate({1, 1}, 0, 1).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(f.stage->Activate({1, 1}, 0, 257).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(f.stage->epoch(), (PipelineEpoch{0, 0}));
  ASSERT_TRUE(f.stage->Activate({1, 5}, 0, 2).ok());
  EXPECT_EQ(f.stage->Activate({1, 5}, 0, 2).code(), absl::StatusCode::kAborted);
  EXPECT_EQ(f.stage->Activate({1, 4}, 0, 2).code(), absl::StatusCode::kAborted);
  v1::StepPlan plan = f.Plan(1);
  AddOpen(&plan, 1);
  AddRows(&plan, 1, 0, Tokens(100));
  ASSERT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
  const StepOutput out = f.Run();
  ASSERT_TRUE(out.hidden.has_value());
  EXPECT_EQ(out.hidden->num_tokens, 100u);
  EXPECT_EQ(out.hidden->data.size(), 100 * kFakeHiddenRowBytes);
  EXPECT_EQ(out.report.results_size(), 0);
  ASSERT_TRUE(f.stage->AcceptPlan(f.Plan(2), 0).ok());
  // A newer epoch starts at step 1, with the rows of finished steps.
  ASSERT_TRUE(f.stage->Activate({2, 0}, 0, 2).ok());
  EXPECT_FALSE(f.stage->Ready());
  EXPECT_EQ(f.stage->blocks_used(), BlocksOfSequence(100, 2));
  plan.mutable_epoch()->set_term(2);
  plan.mutable_epoch()->set_counter(0);
  EXPECT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
  EXPECT_EQ(BlocksHeld(f.Run().report), BlocksOfSequence(100, 2));
}

TEST(StageTest, WaitsForHiddenStatesInWhateverOrderTheyCome) {
  FakeStage f = LastStage();
  v1::StepPlan opens = f.Plan(1);
  AddOpen(&opens, 1);
  v1::StepPlan rows = f.Plan(2);
  AddRows(&rows, 1, 0, Tokens(3));
  v1::StepPlan more = f.Plan(3);
  WantSample(AddRows(&more, 1, 3, Tokens(2)), 1);

  ASSERT_TRUE(f.stage->AcceptHidden(f.Hidden(2, 3), 50).ok());  // before its plan
  ASSERT_TRUE(f.stage->AcceptPlan(opens, 60).ok());
  ASSERT_TRUE(f.stage->Ready());  // no rows: needs no hidden states
  StepOutput out = f.Run();
  EXPECT_EQ(out.report.step_id(), 1u);
  EXPECT_EQ(f.model->num_steps, 0);
  EXPECT_FALSE(f.stage->Ready());
  ASSERT_TRUE(f.stage->AcceptPlan(rows, 70).ok());
  ASSERT_TRUE(f.stage->AcceptPlan(more, 80).ok());
  out = f.Run();
  EXPECT_EQ(out.report.wait_us(), 0u);
  EXPECT_FALSE(out.hidden.has_value());
  EXPECT_FALSE(f.stage->Ready());
  ASSERT_TRUE(f.stage->AcceptHidden(f.Hidden(3, 2), 95).ok());  // after its plan
  ASSERT_TRUE(f.stage->Ready());
  out = f.Run();
  EXPECT_EQ(out.report.wait_us(), 15u);
  EXPECT_EQ(out.report.results_size(), 1);
}

// A place on the device is taken from where the caller says, and goes back as soon as it was read.
TEST(StageTest, HiddenStatesInTheEdgesMemory) {
  FakeStage f = MiddleStage();
  std::vector<std::byte> device(2 * 3 * kFakeHiddenRowBytes);
  int given_back = 0;
  const auto place = [&](size_t offset, size_t bytes) {
    return HiddenBuffer(device.data() + offset, bytes, [&] { ++given_back; });
  };
  v1::StepPlan plan = f.Plan(1);
  AddOpen(&plan, 1);
  AddRows(&plan, 1, 0, Tokens(3));
  ASSERT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
  const size_t bytes = 3 * kFakeHiddenRowBytes;
  ASSERT_TRUE(f.stage->AcceptHidden({f.stage->epoch(), StepId{1}, 3, place(0, bytes)}, 0).ok());
  f.Begin([&](size_t wanted) { return place(bytes, wanted); });
  StepOutput out = f.Finish();
  EXPECT_EQ(given_back, 1);
  ASSERT_TRUE(out.hidden.has_value());
  EXPECT_TRUE(out.hidden->data.on_device());
  EXPECT_EQ(out.hidden->data.data(), device.data() + bytes);
  EXPECT_EQ(device[bytes], std::byte{1}) << "the fake writes ones";
  HiddenBuffer moved = std::move(out.hidden->data);
  out = {};
  EXPECT_EQ(given_back, 1);
  moved = {};
  EXPECT_EQ(given_back, 2);
}

TEST(StageTest, RefusesHiddenStatesThatDoNotFitThePlans) {
  FakeStage first = OneStage();
  EXPECT_EQ(first.stage->AcceptHidden(first.Hidden(1, 1), 0).code(),
            absl::StatusCode::kInvalidArgument);

  FakeStage f = LastStage();
  const auto code = [&](HiddenStep hidden) {
    return f.stage->AcceptHidden(std::move(hidden), 0).code();
  };
  v1::StepPlan plan = f.Plan(1);
  AddOpen(&plan, 1);
  AddRows(&plan, 1, 0, Tokens(3));
  ASSERT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
  HiddenStep hidden = f.Hidden(1, 3);
  hidden.epoch = {1, 0};
  EXPECT_EQ(code(std::move(hidden)), absl::StatusCode::kAborted);
  hidden = f.Hidden(1, 3);
  hidden.epoch = {1, 2};
  EXPECT_EQ(code(std::move(hidden)), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(code(f.Hidden(1, 0)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(f.Hidden(1, limits::kMaxStepTokens + 1)), absl::StatusCode::kInvalidArgument);
  hidden = f.Hidden(1, 3);
  hidden.data.host().pop_back();
  EXPECT_EQ(code(std::move(hidden)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(f.Hidden(1, 2)), absl::StatusCode::kFailedPrecondition);  // other rows
  EXPECT_EQ(code(f.Hidden(2, 3)), absl::StatusCode::kFailedPrecondition);  // step 1 is due
  EXPECT_EQ(code(f.Hidden(0, 3)), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(code(f.Hidden(1, 3)), absl::StatusCode::kOk);
  EXPECT_EQ(code(f.Hidden(1, 3)), absl::StatusCode::kFailedPrecondition);  // a second time

  // Hidden states first, then a plan that does not fit them.
  EXPECT_EQ(code(f.Hidden(4, 2)), absl::StatusCode::kOk);
  EXPECT_EQ(code(f.Hidden(3, 2)), absl::StatusCode::kFailedPrecondition);
  plan = f.Plan(2);
  ASSERT_TRUE(f.stage->AcceptPlan(plan, 0).ok());  // no rows: may lie between
  plan = f.Plan(3);
  AddRows(&plan, 1, 3, Tokens(2));
  EXPECT_EQ(f.stage->AcceptPlan(plan, 0).code(), absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(f.stage->AcceptPlan(f.Plan(3), 0).ok());
  EXPECT_EQ(f.stage->AcceptPlan(f.Plan(4), 0).code(), absl::StatusCode::kFailedPrecondition);
  plan = f.Plan(4);
  AddRows(&plan, 1, 3, Tokens(2));
  EXPECT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
  for (uint64_t step = 1; step <= 4; ++step) EXPECT_EQ(f.Run().report.step_id(), step);
}

TEST(StageTest, BoundsWhatWaits) {
  FakeStage f = LastStage();
  for (uint64_t step = 1; step <= limits::kMaxStepsInFlight; ++step) {
    v1::StepPlan plan = f.Plan(step);
    if (step == 1) AddOpen(&plan, 1);
    AddRows(&plan, 1, static_cast<uint32_t>(step) - 1, {1});
    ASSERT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
    ASSERT_TRUE(f.stage->AcceptHidden(f.Hidden(step, 1), 0).ok());
  }
  EXPECT_EQ(f.stage->AcceptPlan(f.Plan(limits::kMaxStepsInFlight + 1), 0).code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(f.stage->AcceptHidden(f.Hidden(limits::kMaxStepsInFlight + 1, 1), 0).code(),
            absl::StatusCode::kResourceExhausted);
  f.Run();
  EXPECT_TRUE(f.stage->AcceptPlan(f.Plan(limits::kMaxStepsInFlight + 1), 0).ok());
}

TEST(StageTest, BlocksMayBeUsedToTheLastOne) {
  FakeStage f = OneStage(/*pool_blocks=*/4);
  v1::StepPlan plan = f.Plan(1);
  AddOpen(&plan, 1);
  AddRows(&plan, 1, 0, Tokens(128));
  ASSERT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
  plan = f.Plan(2);
  AddRows(&plan, 1, 128, {1});
  EXPECT_EQ(f.stage->AcceptPlan(plan, 0).code(), absl::StatusCode::kResourceExhausted);
  // What a step frees, the same step may use.
  plan = f.Plan(2);
  AddClose(&plan, 1);
  AddOpen(&plan, 2);
  AddRows(&plan, 2, 0, Tokens(65));
  ASSERT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
  EXPECT_EQ(BlocksHeld(f.Run().report), 4u);
  EXPECT_EQ(BlocksHeld(f.Run().report), 4u);
}

TEST(StageTest, AFailedStepStopsTheEpoch) {
  FakeStage f = OneStage();
  v1::StepPlan plan = f.Plan(1);
  AddOpen(&plan, 1);
  AddRows(&plan, 1, 0, Tokens(3));
  ASSERT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
  ASSERT_TRUE(f.stage->AcceptPlan(f.Plan(2), 0).ok());
  f.model->fail_next = true;
  const StepOutput out = f.Run();
  EXPECT_EQ(out.report.error_code(), static_cast<uint32_t>(absl::StatusCode::kDataLoss));
  EXPECT_THAT(out.report.error_message(), HasSubstr("told to fail"));
  EXPECT_FALSE(f.stage->Ready());
  EXPECT_TRUE(f.stage->CheckIntegrity().ok());
  EXPECT_EQ(f.stage->AcceptPlan(f.Plan(3), 0).code(), absl::StatusCode::kAborted);
  f.model->fail_next = false;
  ASSERT_TRUE(f.stage->Activate({1, 2}, 0, 1).ok());
  EXPECT_EQ(f.stage->blocks_used(), 0u);
  plan.mutable_epoch()->set_counter(2);
  ASSERT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
  EXPECT_EQ(f.Run().report.error_code(), 0u);
}

}  // namespace
}  // namespace strait

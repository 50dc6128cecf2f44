// SPDX-License-Identifier: Apache-2.0
//
// Defends: the shape of steps (micro-batches, chunks that follow each other without waiting,
// decode before prefill), preemption of the youngest, blocks given back within one step, and the
// numbers in refusals.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

CoreOptions Options(uint32_t num_stages) {
  CoreOptions options;
  options.grant_depth = 1;
  options.num_stages = num_stages;
  options.max_step_tokens = 64;
  options.prefill_chunk = 32;
  options.max_running = 16;
  return options;
}

uint32_t Rows(const v1::StepPlan& plan) {
  uint32_t rows = 0;
  for (const v1::SequenceStep& step : plan.sequences()) rows += step.literals().ids_size();
  return rows;
}

TEST(SchedulerTest, ChunksOfOnePromptFollowEachOtherWithoutWaiting) {
  Harness h(Options(2), SmallModel());
  const WorkerId first = h.Attach(100'000);
  const WorkerId last = h.Attach(100'000);
  ASSERT_TRUE(h.core.Ready());
  h.Submit(OneSequence(100, 4));
  // Three steps in flight (stages + 1), one chunk each, nothing reported.
  const auto& plans = h.StageOf(first).plans;
  ASSERT_EQ(plans.size(), 3u);
  EXPECT_EQ(plans[0].cache_ops_size(), 1);
  for (uint32_t i = 0; i < 3; ++i) {
    EXPECT_EQ(plans[i].step_id(), i + 1);
    EXPECT_EQ(plans[i].sequences(0).first_position(), 32 * i);
    EXPECT_EQ(Rows(plans[i]), 32u);
    EXPECT_EQ(plans[i].sequences(0).logits_size(), 0);
  }
  EXPECT_EQ(h.StageOf(last).plans.size(), 3u);
  // The first stage's report alone frees no place: the step is still under way.
  h.Report(first);
  EXPECT_EQ(h.StageOf(first).plans.size(), 2u);
  h.Report(last);
  ASSERT_EQ(h.StageOf(first).plans.size(), 3u);
  const v1::SequenceStep& tail = h.StageOf(first).plans.back().sequences(0);
  EXPECT_EQ(tail.first_position(), 96u);
  ASSERT_EQ(tail.logits_size(), 1);
  EXPECT_TRUE(tail.logits(0).sample());
  EXPECT_EQ(tail.logits(0).offset(), 3u);
  h.Run();
  EXPECT_EQ(h.tokens[RequestId{1}].size(), 4u);
  EXPECT_EQ(h.ended.at(RequestId{1}).reason, FinishReason::kLength);
  EXPECT_THAT(h.problems, ElementsAre());
}

TEST(SchedulerTest, DecodesAreCutIntoOneMicroBatchForEachStage) {
  Harness h(Options(2), SmallModel());
  const WorkerId first = h.Attach(1'000'000);
  const WorkerId last = h.Attach(1'000'000);
  for (int i = 0; i < 8; ++i) h.Submit(OneSequence(4, 50));
  // Until all are decoding.
  for (int i = 0; i < 12; ++i) {
    for (const WorkerId id : {first, last}) {
      if (!h.StageOf(id).plans.empty()) h.Report(id);
    }
  }
  std::set<uint64_t> in_flight;
  for (const v1::StepPlan& plan : h.StageOf(last).plans) {
    EXPECT_LE(plan.sequences_size(), 4);
    for (const v1::SequenceStep& step : plan.sequences()) {
      EXPECT_TRUE(in_flight.insert(step.sequence_id()).second)
          << "two sampling steps of one sequence in flight";
    }
  }
  EXPECT_EQ(in_flight.size(), 8u);
  EXPECT_EQ(h.StageOf(last).plans.size(), 2u);
  EXPECT_THAT(h.problems, ElementsAre());
}

TEST(SchedulerTest, DecodeComesBeforePrefill) {
  CoreOptions options = Options(1);
  options.max_step_tokens = 10;
  options.steps_in_flight = 1;
  Harness h(options, SmallModel());
  const WorkerId worker = h.Attach(1'000'000);
  h.Submit(OneSequence(4, 50));
  h.Report(worker);  // its first token is there
  h.Submit(OneSequence(60, 4));
  h.Report(worker);
  const v1::StepPlan& plan = h.StageOf(worker).plans.front();
  ASSERT_EQ(plan.sequences_size(), 2);
  EXPECT_EQ(plan.sequences(0).sequence_id(), 1u);
  EXPECT_EQ(plan.sequences(0).literals().ids_size(), 1);
  EXPECT_EQ(plan.sequences(1).sequence_id(), 2u);
  EXPECT_EQ(plan.sequences(1).literals().ids_size(), 9);
}

// One stage of 4 layers: weights 5000, workspace 50; `columns` blocks a layer of 128 bytes each.
uint64_t MemoryFor(uint32_t columns) { return 5050 + uint64_t{columns} * 4 * 128; }

TEST(SchedulerTest, OutOfBlocksTheYoungestGoesAndComesBack) {
  Harness h(Options(1), SmallModel());
  const WorkerId worker = h.Attach(MemoryFor(5));
  const RequestId old = h.Submit(OneSequence(120, 100));
  const RequestId young = h.Submit(OneSequence(120, 100));
  // Both grow over 128 rows: 3 + 3 columns of 5.
  std::vector<uint64_t> closed;
  for (int i = 0; i < 2000 && !h.StageOf(worker).plans.empty(); ++i) {
    const v1::StepPlan& plan = h.StageOf(worker).plans.front();
    for (const v1::CacheOp& op : plan.cache_ops()) {
      if (op.has_close()) closed.push_back(op.close().sequence_id());
    }
    h.Report(worker);
  }
  EXPECT_GE(h.core.Stats().preemptions, 1u);
  ASSERT_FALSE(closed.empty());
  EXPECT_EQ(closed.front(), 2u) << "the youngest goes first";
  EXPECT_GE(h.core.Stats().replayed_tokens, 120u);
  for (const RequestId id : {old, young}) {
    ASSERT_EQ(h.tokens[id].size(), 100u);
    for (uint32_t i = 0; i < 100; ++i) EXPECT_EQ(h.tokens[id][i].position, 120 + i);
    EXPECT_EQ(h.ended.at(id).reason, FinishReason::kLength);
  }
  EXPECT_THAT(h.problems, ElementsAre());
}

// What the status tells by layer is the pure function of the length, and nothing afterwards.
TEST(SchedulerTest, StatusTellsHeldBytesByLayer) {
  ModelShape model = SmallModel();
  model.max_positions = 16'384;
  CoreOptions options = Options(2);
  options.max_step_tokens = options.prefill_chunk = 8192;
  Harness h(options, model);
  for (int i = 0; i < 2; ++i) h.Attach(1'000'000);
  for (const uint32_t length : {1u, 63u, 64u, 65u, 1000u, 8000u}) {
    const RequestId id = h.Submit(OneSequence(length, 5));
    for (LayerIndex layer = 0; layer < 4; ++layer) {
      const uint64_t held = HeldBytes(model.policy(), length, {layer, layer + 1});
      EXPECT_THAT(h.core.StatusJson(h.now_us),
                  HasSubstr("{\"layer\":" + std::to_string(layer) +
                            ",\"cache_bytes\":" + std::to_string(held) + "}"));
    }
    h.core.OnCancel(id, std::nullopt, h.now_us);
    h.Pump();
    h.Run();
    EXPECT_THAT(h.core.StatusJson(h.now_us), HasSubstr("{\"layer\":3,\"cache_bytes\":0}"));
    EXPECT_EQ(h.core.Stats().cache_bytes_used, 0u);
  }
  EXPECT_THAT(h.problems, ElementsAre());
}

TEST(SchedulerTest, CancelledBlocksGoWithTheNextStep) {
  Harness h(Options(1), SmallModel());
  const WorkerId worker = h.Attach(MemoryFor(8));
  const RequestId id = h.Submit(OneSequence(100, 100));
  h.Run();  // runs to its end
  const RequestId other = h.Submit(OneSequence(100, 100));
  h.Report(worker);
  h.core.OnCancel(other, std::nullopt, h.now_us);
  h.Pump();
  EXPECT_EQ(h.ended.at(other).reason, FinishReason::kCancelled);
  bool closes = false;
  for (const v1::StepPlan& plan : h.StageOf(worker).plans) {
    for (const v1::CacheOp& op : plan.cache_ops()) closes = closes || op.has_close();
  }
  if (!closes) {
    // All places in flight were taken: the very next step has it.
    h.Report(worker);
    for (const v1::CacheOp& op : h.StageOf(worker).plans.back().cache_ops()) {
      closes = closes || op.has_close();
    }
  }
  EXPECT_TRUE(closes);
  h.Run();
  EXPECT_EQ(h.core.Stats().cache_bytes_used, 0u);
  EXPECT_EQ(h.ended.at(id).reason, FinishReason::kLength);
  EXPECT_THAT(h.problems, ElementsAre());
}

TEST(SchedulerTest, RefusalsNameTheNumbers) {
  CoreOptions options = Options(1);
  options.max_waiting = 2;
  options.max_running = 1;
  Harness h(options, SmallModel());
  h.Attach(MemoryFor(4));
  const RequestId context = h.Submit(OneSequence(1000, 100));
  EXPECT_EQ(h.refused.at(context).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(h.refused.at(context).ToString(),
              HasSubstr("make 1100, the context of this server has 1024"));
  const RequestId blocks = h.Submit(OneSequence(200, 100));
  EXPECT_EQ(h.refused.at(blocks).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(h.refused.at(blocks).ToString(),
              HasSubstr("need 299 cache rows, the roomiest pipeline has 256"));
  // The longest that fits: the last token needs no row.
  EXPECT_FALSE(h.refused.contains(h.Submit(OneSequence(157, 100))));
  h.Submit(OneSequence(10, 10));
  h.Submit(OneSequence(10, 10));
  const RequestId queue = h.Submit(OneSequence(10, 10));
  EXPECT_EQ(h.refused.at(queue).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(h.refused.at(queue).ToString(), HasSubstr("max_waiting is 2"));
  // The bug: "come back later", though it can never be admitted.
  RequestSpec many = OneSequence(10, 10);
  many.sequences.resize(3, many.sequences[0]);
  const RequestId never = h.Submit(many);
  EXPECT_EQ(h.refused.at(never).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(h.refused.at(never).ToString(), HasSubstr("has 3 sequences"));
}

TEST(SchedulerTest, StopTokensAndMinTokens) {
  Harness h(Options(1), SmallModel());
  h.Attach(MemoryFor(8));
  RequestSpec spec = OneSequence(10, 10);
  spec.sequences[0].ignore_eos = false;
  h.next_token = 2;  // end of sequence
  const RequestId stops = h.Submit(spec);
  h.Run();
  EXPECT_EQ(h.tokens[stops].size(), 1u);
  EXPECT_EQ(h.ended.at(stops).reason, FinishReason::kStop);
  EXPECT_EQ(h.ended.at(stops).stop_token, TokenId{2});
  spec.sequences[0].min_tokens = 3;
  const RequestId later = h.Submit(spec);
  h.Run();
  EXPECT_EQ(h.tokens[later].size(), 4u);
  spec.sequences[0].ignore_eos = true;
  const RequestId never = h.Submit(spec);
  h.Run();
  EXPECT_EQ(h.tokens[never].size(), 10u);
}

TEST(SchedulerTest, PromptScoresOnlyNeedNoSample) {
  Harness h(Options(1), SmallModel());
  const WorkerId worker = h.Attach(MemoryFor(8));
  RequestSpec spec = OneSequence(70, 0);
  spec.sequences[0].score_prompt = true;
  const RequestId id = h.Submit(spec);
  EXPECT_EQ(Rows(h.StageOf(worker).plans[0]), 32u);
  h.Run();
  ASSERT_EQ(h.scores[id].size(), 69u);
  for (uint32_t i = 0; i < 69; ++i) {
    EXPECT_EQ(h.scores[id][i].position, i + 1);
    EXPECT_EQ(h.scores[id][i].id, 10 + (i + 1) % 80);
  }
  EXPECT_EQ(h.ended.at(id).reason, FinishReason::kLength);
  // Nothing to do at all: ends without a step.
  const RequestId nothing = h.Submit(OneSequence(5, 0));
  EXPECT_EQ(h.ended.at(nothing).reason, FinishReason::kLength);
}

TEST(SchedulerTest, PipelinesShareTheLoad) {
  CoreOptions options = Options(1);
  options.num_pipelines = 2;
  Harness h(options, SmallModel());
  const WorkerId a = h.Attach(MemoryFor(8));
  const WorkerId b = h.Attach(MemoryFor(8));
  h.Submit(OneSequence(60, 4));
  h.Submit(OneSequence(10, 4));
  h.Submit(OneSequence(10, 4));
  EXPECT_EQ(h.StageOf(a).plans.front().sequences(0).sequence_id(), 1u);
  EXPECT_EQ(h.StageOf(b).plans.front().sequences(0).sequence_id(), 2u);
  h.Run();
  EXPECT_EQ(h.ended.size(), 3u);
}

}  // namespace
}  // namespace strait

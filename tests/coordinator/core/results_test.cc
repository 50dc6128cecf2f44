// SPDX-License-Identifier: Apache-2.0
//
// Defends: what a report means for its sequences, its stage and everybody else.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

constexpr uint64_t kMemory = 100'000;

CoreOptions Options(uint32_t num_stages) {
  CoreOptions options;
  options.grant_depth = 1;
  options.num_stages = num_stages;
  options.max_step_tokens = 64;
  options.prefill_chunk = 32;
  return options;
}

// Makes the results of the report's first sequence void.
void Void(v1::StageReport* report) {
  v1::SequenceResult* result = report->mutable_results(0);
  result->clear_scored();
  result->clear_sampled();
  result->set_error_code(static_cast<uint32_t>(absl::StatusCode::kDataLoss));
  result->set_error_message("row 9");
}

// The bug: NaN logits came as a log-probability, for which an honest worker was evicted: again and
// again, since the sequence was replayed.
TEST(ResultsTest, LogitsThatAreNoNumbersEndTheirSequenceOnly) {
  Harness h(Options(1), SmallModel());
  const WorkerId worker = h.Attach(kMemory);
  const RequestId bad = h.Submit(OneSequence(10, 5));
  const RequestId good = h.Submit(OneSequence(10, 5));
  h.Report(worker);  // of the first alone: the second came later
  v1::StageReport report = h.MakeReport(worker);
  ASSERT_EQ(report.results(0).sequence_id(), 2u);
  h.Send(worker, report);
  report = h.MakeReport(worker);
  ASSERT_EQ(report.results(0).sequence_id(), 1u);
  Void(&report);
  h.Send(worker, report);
  ASSERT_TRUE(h.ended.contains(bad));
  EXPECT_EQ(h.ended.at(bad).reason, FinishReason::kError);
  EXPECT_EQ(h.ended.at(bad).status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(h.ended.at(bad).status.ToString(), HasSubstr("logits were not finite: row 9"));
  EXPECT_FALSE(h.workers.at(worker).evicted);
  h.Run();
  EXPECT_EQ(h.tokens[bad].size(), 1u);
  EXPECT_EQ(h.tokens[good].size(), 5u);
  EXPECT_EQ(h.core.Stats().cache_bytes_used, 0u);
  EXPECT_EQ(h.core.Stats().recoveries, 0u);
  EXPECT_THAT(h.problems, ElementsAre());
}

TEST(ResultsTest, ScoresThatAreNoNumbersEndASequenceWithStepsInFlight) {
  Harness h(Options(2), SmallModel());
  const WorkerId first = h.Attach(kMemory);
  const WorkerId last = h.Attach(kMemory);
  RequestSpec spec = OneSequence(100, 5);
  spec.sequences[0].score_prompt = true;
  const RequestId id = h.Submit(spec);
  ASSERT_EQ(h.StageOf(last).plans.size(), 3u);
  h.Report(first);
  v1::StageReport report = h.MakeReport(last);
  Void(&report);
  h.Send(last, report);
  ASSERT_TRUE(h.ended.contains(id));
  h.Run();  // what is under way for it is answered, and ignored
  EXPECT_TRUE(h.scores[id].empty());
  EXPECT_EQ(h.core.Stats().cache_bytes_used, 0u);
  EXPECT_FALSE(h.workers.at(last).evicted);
  EXPECT_THAT(h.problems, ElementsAre());
}

TEST(ResultsTest, TheStatusShowsWhereTheTimeGoes) {
  Harness h(Options(2), SmallModel());
  const WorkerId first = h.Attach(kMemory);
  const WorkerId last = h.Attach(kMemory);
  h.Submit(OneSequence(10, 100));
  EXPECT_THAT(h.core.StatusJson(h.now_us), Not(HasSubstr("step_compute_us")));
  for (const uint64_t compute_us : {1000, 1000, 2600}) {
    v1::StageReport report = h.MakeReport(first);
    report.set_compute_us(compute_us);
    h.Send(first, report);
    report = h.MakeReport(last);
    report.set_compute_us(50);
    report.set_wait_us(compute_us + 7);
    h.Send(last, report);
  }
  EXPECT_THAT(h.core.StatusJson(h.now_us),
              HasSubstr("\"step_compute_us\":1100,\"step_wait_us\":0"));
  EXPECT_THAT(h.core.StatusJson(h.now_us),
              HasSubstr("\"step_compute_us\":50,\"step_wait_us\":1107"));
  // Nothing that a worker says makes a number that JSON cannot have.
  v1::StageReport report = h.MakeReport(first);
  report.set_compute_us(~uint64_t{0});
  h.Send(first, report);
  EXPECT_THAT(h.core.StatusJson(h.now_us), HasSubstr("\"step_compute_us\":22500"));
}

// The bug: every stage was written twice, with the bytes of each of its layers.
TEST(ResultsTest, TheStatusTellsBytesOnce) {
  Harness h(Options(2), SmallModel());
  for (int i = 0; i < 2; ++i) h.Attach(kMemory);
  const std::string json = h.core.StatusJson(h.now_us);
  size_t count = 0;
  for (size_t at = 0; (at = json.find("cache_bytes_by_layer", at)) != std::string::npos; ++at) {
    ++count;
  }
  EXPECT_EQ(count, 2u);
}

}  // namespace
}  // namespace strait

// SPDX-License-Identifier: Apache-2.0
//
// Defends: a worker that tells rows which it cannot have, or computed other rows than planned, is
// evicted with its name and the numbers, and nobody else is disturbed.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr uint64_t kMemory = 100'000;

CoreOptions Options(uint32_t num_stages) {
  CoreOptions options;
  options.grant_depth = 1;
  options.num_stages = num_stages;
  options.max_step_tokens = 64;
  options.prefill_chunk = 32;
  return options;
}

struct Lie {
  std::string what;
  std::function<void(v1::StageState*)> tell;
};

TEST(SurvivorLiesTest, WhoTellsWhatCannotBeIsEvictedByNameAndNobodyElse) {
  const std::vector<Lie> lies = {
      {"tells 37 rows of sequence 1, at most 36 were planned there",
       [](v1::StageState* s) { s->mutable_held(0)->set_rows(37); }},
      {"tells 0 rows of sequence 9, which is not open there",
       [](v1::StageState* s) { s->add_held()->set_sequence_id(9); }},
      {"tells sequence 1 behind 3",
       [](v1::StageState* s) { s->mutable_held()->SwapElements(0, 1); }},
      {"tells sequence 1 behind 1",
       [](v1::StageState* s) { s->mutable_held(1)->set_sequence_id(1); }},
      {"tells sequence 0 behind 0",
       [](v1::StageState* s) { s->mutable_held(0)->set_sequence_id(0); }},
  };
  for (const Lie& lie : lies) {
    SCOPED_TRACE(lie.what);
    CoreOptions options = Options(2);
    options.num_pipelines = 2;
    options.max_running = 2;
    options.steps_in_flight = 1;
    Harness h(options, SmallModel());
    const std::vector<WorkerId> w = AttachAll(h, 4);
    std::vector<RequestId> ids;
    for (int i = 0; i < 4; ++i) ids.push_back(h.Submit(OneSequence(32, 20)));
    for (int i = 0; i < 6; ++i) {
      h.Report(w[0]);
      h.Report(w[1]);
    }
    h.Report(w[0]);
    ASSERT_EQ(h.StageOf(w[0]).lengths.at(SequenceId{1}), 36u);
    ASSERT_TRUE(h.StageOf(w[0]).lengths.contains(SequenceId{3}));
    h.before_active = [&](WorkerId id, v1::StageState* state) {
      if (id == w[0]) lie.tell(state);
    };
    v1::StageReport error;
    error.set_stage_id(h.StageOf(w[1]).load.stage_id());
    *error.mutable_epoch() = h.StageOf(w[1]).epoch;
    error.set_error_code(13);
    h.Send(w[1], error);
    const uint64_t steps = h.core.Stats().steps;
    h.Tick(1'000'000);
    ASSERT_TRUE(h.workers.at(w[0]).evicted);
    EXPECT_THAT(std::string(h.workers.at(w[0]).why.message()),
                AllOf(HasSubstr("of worker w1 "), HasSubstr(lie.what)));
    for (int i = 1; i < 4; ++i) EXPECT_FALSE(h.workers.at(w[i]).evicted) << i;
    h.Report(w[2]);
    h.Report(w[3]);
    EXPECT_GT(h.core.Stats().steps, steps) << "another pipeline goes on";
    h.Attach(kMemory);
    h.Run();
    for (const RequestId id : ids) EXPECT_EQ(h.tokens[id].size(), 20u);
    EXPECT_THAT(h.problems, IsEmpty());
  }
}

TEST(SurvivorLiesTest, RowsThatWereNotComputedAsPlannedEvict) {
  for (const bool stored : {false, true}) {
    Harness h(Options(2), SmallModel());
    const std::vector<WorkerId> w = AttachAll(h, 2);
    h.Submit(OneSequence(10, 5));
    v1::StageReport report = h.MakeReport(w[0]);
    EXPECT_EQ(report.rows_computed(), 10u);
    if (stored) {
      report.set_rows_stored(9);
    } else {
      report.set_rows_computed(11);
    }
    h.Send(w[0], report);
    EXPECT_TRUE(h.workers.at(w[0]).evicted);
    EXPECT_THAT(h.workers.at(w[0]).why.ToString(),
                HasSubstr(stored ? "10 rows computed and 9 stored in step 1, the plan has 10 and 10"
                                 : "11 rows computed and 10 stored in step 1, the plan has 10"));
    EXPECT_FALSE(h.workers.at(w[1]).evicted);
  }
}

}  // namespace
}  // namespace strait

// SPDX-License-Identifier: Apache-2.0
//
// Defends: the figures that `strait bench` prints follow from the requests, and no failed request
// hides in them.
#include "coordinator/cli/measure.h"

#include <gtest/gtest.h>

namespace strait::cli {
namespace {

TEST(PercentileTest, InterpolatesBetweenNeighbours) {
  EXPECT_EQ(Percentile({}, 0.5), 0);
  EXPECT_EQ(Percentile({7}, 0.99), 7);
  EXPECT_DOUBLE_EQ(Percentile({4, 1, 3, 2}, 0.5), 2.5);
  EXPECT_DOUBLE_EQ(Percentile({4, 1, 3, 2}, 0), 1);
  EXPECT_DOUBLE_EQ(Percentile({4, 1, 3, 2}, 1), 4);
  EXPECT_DOUBLE_EQ(Percentile({0, 10}, 0.9), 9);
}

TEST(TimePerOutputTokenTest, LeavesTheFirstTokenOut) {
  RequestResult request;
  request.first_token_s = 1;
  request.total_s = 3;
  request.output_tokens = 5;
  EXPECT_DOUBLE_EQ(TimePerOutputToken(request), 0.5);
  request.output_tokens = 1;
  EXPECT_LT(TimePerOutputToken(request), 0);
}

TEST(SummarizeTest, CountsErrorsAndLeavesThemOutOfTimes) {
  RunResult run;
  run.concurrency = 2;
  run.duration_s = 2;
  RequestResult good;
  good.first_token_s = 0.1;
  good.total_s = 0.5;
  good.prompt_tokens = 10;
  good.output_tokens = 5;
  RequestResult cut = good;
  cut.is_short = true;
  RequestResult bad;
  bad.error = "HTTP 429: full";
  bad.first_token_s = 100;
  run.requests = {good, bad, cut, bad};

  const json::Object out = Summarize(run);
  EXPECT_EQ(out.at("requests").to_number<int>(), 4);
  EXPECT_EQ(out.at("succeeded").to_number<int>(), 2);
  EXPECT_EQ(out.at("failed").to_number<int>(), 2);
  EXPECT_EQ(out.at("short_outputs").to_number<int>(), 1);
  EXPECT_EQ(out.at("errors").get_object().at("HTTP 429: full").to_number<int>(), 2);
  EXPECT_DOUBLE_EQ(out.at("prompt_tokens_per_s").to_number<double>(), 10);
  EXPECT_DOUBLE_EQ(out.at("output_tokens_per_s").to_number<double>(), 5);
  EXPECT_DOUBLE_EQ(out.at("ttft_ms").get_object().at("max").to_number<double>(), 100);
  EXPECT_DOUBLE_EQ(out.at("tpot_ms").get_object().at("p50").to_number<double>(), 100);
}

TEST(SummarizeTest, NothingSucceededIsNoCrash) {
  RunResult run;
  run.requests.resize(1);
  run.requests[0].error = "refused";
  const json::Object out = Summarize(run);
  EXPECT_EQ(out.at("failed").to_number<int>(), 1);
  EXPECT_EQ(out.at("ttft_ms").get_object().at("p99").to_number<double>(), 0);
}

}  // namespace
}  // namespace strait::cli

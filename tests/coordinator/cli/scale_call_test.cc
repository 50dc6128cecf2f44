// SPDX-License-Identifier: Apache-2.0
//
// Defends: what a coordinator tells of a scale is read as it was meant, whatever is left out of it, and is said in
// words that have the figures.
#include "coordinator/cli/scale_call.h"

#include <gtest/gtest.h>

#include <string>

#include "tests/coordinator/cli/scripted_server.h"

namespace strait::cli {
namespace {

constexpr char kLine[] =
    R"({"event":"progress","stages":2,"pipelines_done":1,"pipelines_total":3,"pipeline":2,)"
    R"("phase":"copying","bytes_loaded":10,"bytes_to_load":10,"rows":512,"rows_total":1024,)"
    R"("moved_bytes":1258291,"edges_up":0,"edges_total":1,"total_ms":1500})";
constexpr char kDone[] =
    R"({"event":"done","stages":2,"pipelines":3,"pause_ms":9.5,"rows_kept":640,"rows_lost":7,)"
    R"("moved_bytes":1258291,"residents":{"count":4,"pause_min_ms":5.25,"pause_p50_ms":6,)"
    R"("pause_max_ms":9.5},"total_ms":2000})";
constexpr char kPlanned[] =
    R"({"event":"done","stages":2,"dry_run":true,"plans":[{"pipeline":1,"tokens_max":640,"stages":[)"
    R"({"worker_id":1,"worker":"a","layer_begin":0,"layer_end":3,"cache_bytes":1024,)"
    R"("load_bytes":0,"rows_bytes":0},{"worker_id":2,"worker":"b","layer_begin":3,"layer_end":4,)"
    R"("cache_bytes":2048,"load_bytes":3072,"rows_bytes":4096}],"plan":{"num_plans":2,)"
    R"("why":"it moves the fewest bytes"}},{"pipeline":2,"tokens_max":640,"stages":[],"plan":{}}]})";

TEST(ScaleCallTest, ReadsAReport) {
  const auto line = ParseScaleLine(kLine);
  ASSERT_TRUE(line.ok()) << line.status();
  EXPECT_EQ(ProgressText(*line),
            "pipeline 2 (2 of 3): copying, 512 of 1024 rows, 1.20 MiB, 0 of 1 edge");
  EXPECT_EQ(ShareDone(*line), 0.5);
  ScaleLine other;
  other.phase = "waiting";
  other.pipelines_total = 2;
  EXPECT_EQ(ProgressText(other), "0 of 2 pipelines: waiting");
  EXPECT_LT(ShareDone(other), 0);
  for (const char* text : {"", "x", "[]", "{}", R"({"event":3})"}) {
    EXPECT_FALSE(ParseScaleLine(text).ok()) << text;
  }
}

TEST(ScaleCallTest, TheEndTellsThePausesAndADryRunWhoGetsWhat) {
  EXPECT_EQ(DoneText(*ParseScaleLine(kDone), {.num_stages = 2}),
            "3 pipelines with 2 stages; longest pause 9.5 ms; rows kept in caches 640, computed "
            "again 7, moved 1.20 MiB; 4 sequences stood still for 5.2 to 9.5 ms, half of them at "
            "most 6.0 ms");
  const std::string text = DoneText(*ParseScaleLine(kPlanned), {.num_stages = 2, .dry_run = true});
  for (const char* part : {"pipeline 1 could get 2 stages", "up to 640 tokens", "fewest bytes",
                           "3 to 4", "3.00 KiB", "4.00 KiB", "pipeline 2 has 2 stages already"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << " is not in:\n" << text;
  }
}

TEST(ScaleCallTest, AsksForReportsAndFollowsThem) {
  const std::string head = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";
  ScriptedServer server({head + kLine + "\n" + kDone + "\n"});
  HttpClient client(server.url(), "key");
  int reports = 0;
  const auto outcome = CallScale(client, {.num_stages = 2, .dry_run = true, .timeout_s = 5},
                                 [&](const ScaleLine&) { ++reports; });
  ASSERT_TRUE(outcome.ok()) << outcome.status();
  EXPECT_TRUE(outcome->done);
  EXPECT_EQ(reports, 1);
  EXPECT_EQ(outcome->last.residents, 4u);
  const std::string sent = server.request();
  EXPECT_TRUE(sent.starts_with("POST /strait/scale ")) << sent;
  EXPECT_TRUE(sent.ends_with(R"({"stages":2,"dry_run":true,"progress":true})")) << sent;
}

}  // namespace
}  // namespace strait::cli

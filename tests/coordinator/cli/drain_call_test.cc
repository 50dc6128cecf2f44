// SPDX-License-Identifier: Apache-2.0
//
// Defends: what a coordinator tells of a drain is read as it was meant, whatever is left out of it, and is said in
// words that have the figures.
#include "coordinator/cli/drain_call.h"

#include <gtest/gtest.h>

#include <string>

#include "tests/coordinator/cli/scripted_server.h"

namespace strait::cli {
namespace {

constexpr char kLine[] =
    R"({"event":"progress","worker_id":2,"worker":"w","pipeline":1,"way":"move","phase":"moving",)"
    R"("sequences_left":3,"sequences_moved":1,"moved_bytes":1258291,"rows_kept":0,"rows_lost":0,)"
    R"("pause_ms":3.25,"total_ms":1500})";

TEST(DrainCallTest, ReadsAReport) {
  const auto line = ParseDrainLine(kLine);
  ASSERT_TRUE(line.ok()) << line.status();
  EXPECT_EQ(line->worker_id, 2u);
  EXPECT_EQ(line->pipeline, 1u);
  EXPECT_EQ(ProgressText(*line),
            "worker w in pipeline 1: moving, 3 sequences left, 1 moved, 1.20 MiB");
  for (const char* text : {"", "x", "[]", "{}", R"({"event":3})"}) {
    EXPECT_FALSE(ParseDrainLine(text).ok()) << text;
  }
}

TEST(DrainCallTest, TheEndSaysWhichWayItWas) {
  DrainLine line = *ParseDrainLine(kLine);
  EXPECT_EQ(DoneText(line, {}),
            "worker w is drained: 1 sequence moved, 1.20 MiB, longest pause 3.2 ms, total 1.500 s");
  EXPECT_NE(DoneText(line, {.dry_run = true}).find("3 sequences of pipeline 1 would move"),
            std::string::npos);
  EXPECT_EQ(DoneText(line, {.undo = true}), "worker w may get stages again");
  line.way = "replace";
  line.rows_kept = 7;
  line.rows_lost = 2;
  EXPECT_EQ(DoneText(line, {}),
            "worker w is drained: pipeline 1 has other stages; rows kept 7, computed again 2, "
            "pause 3.2 ms, total 1.500 s");
  line.way = "none";
  EXPECT_EQ(DoneText(line, {}), "worker w is drained, total 1.500 s");
}

TEST(DrainCallTest, ADrainIsDoneWhenItsLastLineSaysSo) {
  const auto called = [](const std::string& answer, const DrainRequest& request,
                         const std::string& body) {
    ScriptedServer server({answer});
    HttpClient client(server.url(), "key");
    const auto outcome = CallDrain(client, request, [](const DrainLine&) {});
    EXPECT_TRUE(outcome.ok()) << outcome.status();
    const std::string sent = server.request();
    EXPECT_TRUE(sent.starts_with("POST /strait/drain ")) << sent;
    EXPECT_TRUE(sent.ends_with(body)) << sent;
    return outcome.ok() ? *outcome : DrainOutcome{};
  };
  const std::string head = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";
  DrainOutcome outcome = called(head + kLine + "\n" + R"({"event":"done","worker":"w"})" + "\n",
                                {.worker = "w", .timeout_s = 5}, R"({"worker":"w","timeout":5E0})");
  EXPECT_TRUE(outcome.done);
  outcome = called(
      head + kLine + "\n" + R"({"event":"error","error":{"code":"aborted","message":"m"}})" + "\n",
      {.worker = "w", .undo = true, .timeout_s = 5}, R"({"worker":"w","undo":true,"timeout":5E0})");
  EXPECT_FALSE(outcome.done);
  EXPECT_EQ(outcome.code, "aborted");
  EXPECT_EQ(outcome.last.phase, "moving");
}

}  // namespace
}  // namespace strait::cli

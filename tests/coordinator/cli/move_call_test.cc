// SPDX-License-Identifier: Apache-2.0
//
// Defends: what a coordinator tells of a move is read as it was meant, whatever is left out of it,
// and is said in words that have the figures.
#include "coordinator/cli/move_call.h"

#include <gtest/gtest.h>

#include <string>

#include "tests/coordinator/cli/scripted_server.h"

namespace strait::cli {
namespace {

constexpr char kLine[] =
    R"({"event":"progress","sequence":12,"from":1,"to":2,"phase":"copy","rounds":2,"rows":640,)"
    R"("rows_total":1024,"moved_bytes":1258291,"recomputed_rows":0,"pause_ms":0.000,"total_ms":41.2})";

TEST(MoveCallTest, ReadsAReport) {
  const auto line = ParseMoveLine(kLine);
  ASSERT_TRUE(line.ok()) << line.status();
  EXPECT_EQ(line->event, "progress");
  EXPECT_EQ(line->sequence, 12u);
  EXPECT_EQ(line->from, 1u);
  EXPECT_EQ(line->to, 2u);
  EXPECT_EQ(line->rows, 640u);
  EXPECT_EQ(line->total_ms, 41.2);
  EXPECT_EQ(ProgressText(*line),
            "sequence 12 from pipeline 1 to 2: copy, round 2, 640 of 1024 rows, 1.20 MiB");
}

TEST(MoveCallTest, ReadsAnError) {
  const auto line = ParseMoveLine(
      R"({"event":"error","error":{"message":"lost","type":"server_error","param":null,"code":"aborted"}})");
  ASSERT_TRUE(line.ok()) << line.status();
  EXPECT_EQ(line->event, "error");
  EXPECT_EQ(line->error_code, "aborted");
  EXPECT_EQ(line->error_message, "lost");
}

TEST(MoveCallTest, WhatIsNoReportIsAnError) {
  for (const char* text : {"", "x", "[]", "{}", R"({"event":3})"}) {
    EXPECT_FALSE(ParseMoveLine(text).ok()) << text;
  }
  // What is missing or of another type is none.
  const auto line = ParseMoveLine(R"({"event":"done","rows":"many","moved_bytes":-1})");
  ASSERT_TRUE(line.ok()) << line.status();
  EXPECT_EQ(line->rows + line->moved_bytes, 0u);
}

TEST(MoveCallTest, TheEndHasTheFigures) {
  MoveLine done = *ParseMoveLine(kLine);
  done.rows = 1024;
  done.rounds = 1;
  done.moved_bytes = 500'000'000;
  done.pause_ms = 12.34;
  done.total_ms = 2000;
  EXPECT_EQ(DoneText(done, false),
            "sequence 12 from pipeline 1 to 2: 1024 rows, 477 MiB in 1 round, pause 12.3 ms, "
            "total 2.000 s, 0.250 GB/s");
  EXPECT_EQ(DoneText(done, true), "sequence 12 from pipeline 1 to 2 could move: 1024 rows");
  done.total_ms = 0;
  done.recomputed_rows = 3;
  EXPECT_TRUE(DoneText(done, false).ends_with("0.000 GB/s; 3 rows were computed again"));
}

// What the coordinator said, as the verb has it.
MoveOutcome Called(const std::string& answer, int* num_reports = nullptr) {
  ScriptedServer server({answer});
  HttpClient client(server.url(), "the-operator's-key");
  int reports = 0;
  const auto outcome = CallMigrate(client, {.sequence = "cmpl-a/1", .to = 2, .timeout_s = 5},
                                   [&reports](const MoveLine&) { ++reports; });
  EXPECT_TRUE(outcome.ok()) << outcome.status();
  const std::string request = server.request();
  EXPECT_TRUE(request.starts_with("POST /strait/migrate ")) << request;
  EXPECT_NE(request.find("Bearer the-operator's-key"), std::string::npos) << request;
  EXPECT_TRUE(request.ends_with(R"({"sequence":"cmpl-a/1","to":2,"timeout":5E0})")) << request;
  if (num_reports != nullptr) *num_reports = reports;
  return outcome.ok() ? *outcome : MoveOutcome{};
}

TEST(MoveCallTest, AMoveIsDoneWhenItsLastLineSaysSo) {
  const std::string head = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";
  const std::string progress = std::string(kLine) + "\n";
  int reports = 0;
  MoveOutcome outcome =
      Called(head + progress + progress + R"({"event":"done","rows":9})" + "\n", &reports);
  EXPECT_TRUE(outcome.done);
  EXPECT_EQ(reports, 2);
  EXPECT_EQ(outcome.last.rows, 9u);

  outcome = Called(head + progress +
                   R"({"event":"error","error":{"code":"aborted","message":"m"}})" + "\n");
  EXPECT_FALSE(outcome.done);
  EXPECT_EQ(outcome.http_status, 200);
  EXPECT_EQ(outcome.code, "aborted");
  EXPECT_EQ(outcome.last.phase, "copy");  // how far it came

  outcome = Called(
      "HTTP/1.1 507 No\r\nConnection: close\r\n\r\n"
      R"({"error":{"message":"no room","code":"no_room"}})");
  EXPECT_FALSE(outcome.done);
  EXPECT_EQ(outcome.http_status, 507);
  EXPECT_EQ(outcome.code, "no_room");
  EXPECT_EQ(outcome.message, "HTTP 507: no room");
  EXPECT_TRUE(outcome.last.event.empty());
}

TEST(MoveCallTest, AnAnswerWithoutAnEndIsNone) {
  ScriptedServer server({"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + std::string(kLine) + "\n",
                         "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello\n"});
  HttpClient client(server.url());
  for (int i = 0; i < 2; ++i) {
    EXPECT_TRUE(absl::IsInternal(CallMigrate(client, {}, [](const MoveLine&) {}).status()));
  }
}

}  // namespace
}  // namespace strait::cli

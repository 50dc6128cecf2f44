// SPDX-License-Identifier: Apache-2.0
//
// Defends: a stress run sees every difference from the reference, however small; counts as a move
// only what moved every row; takes a pause from the right gap; counts by time and size nothing twice
// and nothing away; passes no acceptance run that lacks anything; and signals no process but its own
// children.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <iterator>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "coordinator/cli/status_json.h"
#include "coordinator/cli/stress_disturb.h"
#include "coordinator/cli/stress_goals.h"
#include "coordinator/cli/stress_load.h"
#include "coordinator/cli/stress_log.h"
#include "coordinator/cli/stress_timeline.h"
#include "tests/coordinator/cli/scripted_server.h"

namespace strait::cli {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// ---- The load ----

TEST(StressLoadTest, RequestsAreWithinBoundsAndOfTheSeedAlone) {
  LoadOptions options;
  options.num_requests = 200;
  options.min_rows = 40;
  options.max_rows = 3000;
  options.vocabulary = 50;
  const auto requests = MakeRequests(options);
  ASSERT_EQ(requests.size(), 200u);
  uint32_t greedy = 0, twos = 0, below_300 = 0;
  std::set<std::string> bodies;
  for (const StressRequest& request : requests) {
    const uint32_t rows = request.prompt_tokens + request.output_tokens;
    EXPECT_GE(rows, 40u);
    EXPECT_LE(rows, 3000u);
    EXPECT_GE(request.prompt_tokens, 1u);
    EXPECT_GE(request.output_tokens, 1u);
    EXPECT_LE(request.output_tokens, options.output_tokens);
    const json::Array& prompt = request.body.at("prompt").as_array();
    EXPECT_EQ(prompt.size(), request.prompt_tokens);
    for (const json::Value& id : prompt) EXPECT_LT(id.to_number<int64_t>(), 50);
    greedy += request.body.at("temperature").to_number<double>() == 0 ? 1 : 0;
    twos += request.choices == 2 ? 1 : 0;
    below_300 += rows < 300 ? 1 : 0;
    bodies.insert(BodyOf(request, ""));
  }
  EXPECT_EQ(bodies.size(), 200u);
  EXPECT_GT(greedy, 60u);
  EXPECT_LT(greedy, 140u);
  EXPECT_GT(twos, 5u);
  EXPECT_GT(below_300, 50u);  // evenly by the logarithm: about 93
  const auto again = MakeRequests(options);
  EXPECT_EQ(BodyOf(again[7], "x"), BodyOf(requests[7], "x"));
  EXPECT_NE(BodyOf(requests[7], "x"), BodyOf(requests[7], "y"));
  options.seed = 2;
  EXPECT_NE(BodyOf(MakeRequests(options)[7], ""), BodyOf(requests[7], ""));
}

StreamOutcome Read(const std::vector<std::string>& events, uint32_t choices = 1) {
  StreamReader reader(choices);
  double at_s = 0;
  for (const std::string& event : events) {
    if (!reader.Take(event, at_s += 1)) break;
  }
  return std::move(reader).End();
}

std::string Token(int id, const char* logprob, const char* finish = "null", int choice = 0) {
  return R"({"id":"cmpl-a","choices":[{"index":)" + std::to_string(choice) + R"(,"token_ids":[)" +
         std::to_string(id) + R"(],"logprobs":{"token_logprobs":[)" + logprob +
         R"(]},"finish_reason":)" + finish + "}]}";
}

TEST(StressLoadTest, AStreamIsReadWithItsTimes) {
  const StreamOutcome got = Read(
      {Token(5, "-0.25"), Token(9, "-1", "null", 1), Token(6, "-0.5", "\"length\""), "[DONE]"}, 2);
  EXPECT_EQ(got.failure, "");
  EXPECT_EQ(got.name, "cmpl-a");
  EXPECT_THAT(got.choices[0].ids, ElementsAre(5, 6));
  EXPECT_THAT(got.choices[0].logprobs, ElementsAre(-0.25, -0.5));
  EXPECT_THAT(got.choices[0].at_s, ElementsAre(1, 3));
  EXPECT_EQ(got.choices[0].finish, "length");
  EXPECT_THAT(got.choices[1].ids, ElementsAre(9));
}

TEST(StressLoadTest, WhatBreaksOffHasFailed) {
  EXPECT_THAT(Read({Token(5, "-1")}).failure, HasSubstr("without [DONE]"));
  EXPECT_THAT(Read({R"({"error":{"message":"lost"}})", "[DONE]"}).failure, HasSubstr("lost"));
  EXPECT_THAT(Read({"what"}).failure, HasSubstr("no JSON"));
  EXPECT_THAT(Read({Token(5, "-1", "null", 1)}).failure, HasSubstr("not asked for"));
  std::atomic<int64_t> sign = 0;
  ScriptedServer server(
      {"HTTP/1.1 503 No\r\nConnection: close\r\n\r\n{\"error\":{\"message\":\"full\"}}",
       "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ndata: " + Token(5, "-1") + "\n\n"});
  HttpClient client(server.url());
  const auto run = [&] { return RunStream(client, "{}", 1, StressClock::now(), &sign).failure; };
  EXPECT_THAT(run(), HasSubstr("refused: HTTP 503: full"));
  EXPECT_THAT(run(), HasSubstr("without [DONE]"));
}

TEST(StressLoadTest, EveryDifferenceIsSeen) {
  const std::vector<std::string> events = {Token(5, "-0.25"), Token(6, "-0.1", "\"length\""),
                                           "[DONE]"};
  const StreamOutcome reference = Read(events);
  EXPECT_EQ(Difference(Read(events), reference), "");
  const auto differs = [&](std::vector<std::string> other) {
    return Difference(Read(other), reference);
  };
  EXPECT_THAT(differs({Token(5, "-0.25"), Token(7, "-0.1", "\"length\""), "[DONE]"}),
              HasSubstr("token 1 is 7 instead of 6"));
  // The next float32.
  EXPECT_THAT(differs({Token(5, "-0.25"), Token(6, "-0.10000001", "\"length\""), "[DONE]"}),
              HasSubstr("log-probability of token 1"));
  EXPECT_THAT(differs({Token(5, "-0.25"), Token(6, "null", "\"length\""), "[DONE]"}),
              HasSubstr("log-probability of token 1"));
  EXPECT_THAT(differs({Token(5, "-0.25"), "[DONE]"}), HasSubstr("1 tokens instead of 2"));
  EXPECT_THAT(differs({events[0], events[1], events[1], "[DONE]"}), HasSubstr("3 tokens"));
  EXPECT_THAT(differs({Token(5, "-0.25"), Token(6, "-0.1", "\"stop\""), "[DONE]"}),
              HasSubstr("\"stop\" instead of \"length\""));
  EXPECT_THAT(differs({events[0], events[1]}), HasSubstr("[DONE]"));
}

// ---- Pauses and sums ----

// A token every 10 ms, but for `gap_ms` before token `index`.
ChoiceOutcome Steady(size_t tokens, size_t index, double gap_ms) {
  ChoiceOutcome choice;
  double at_s = 1;
  for (size_t i = 0; i < tokens; ++i) {
    choice.at_s.push_back(at_s += (i == index ? gap_ms : 10) / 1000);
  }
  return choice;
}

TEST(StressLogTest, APauseIsTheGapBehindTheOldPipelinesLastToken) {
  // A prompt of 100: the token of index 60 is at position 160, and was the old pipeline's last.
  const ChoiceOutcome choice = Steady(200, 61, 52);
  ASSERT_TRUE(PauseMs(choice, 100, 160));
  EXPECT_NEAR(*PauseMs(choice, 100, 160), 42, 1e-6);
  EXPECT_NEAR(*PauseMs(choice, 100, 161), 0, 1e-6);
  EXPECT_NEAR(*PauseMs(choice, 100, 159), 0, 1e-6);
  EXPECT_FALSE(PauseMs(choice, 100, 99));   // its prompt was being computed
  EXPECT_FALSE(PauseMs(choice, 100, 107));  // too few gaps to compare with
  EXPECT_TRUE(PauseMs(choice, 100, 108));
  EXPECT_TRUE(PauseMs(choice, 100, 298));
  EXPECT_FALSE(PauseMs(choice, 100, 299));  // its last token
}

MoveOutcome Moved(uint64_t rows, uint64_t recomputed = 0) {
  MoveOutcome outcome;
  outcome.done = true;
  outcome.last.event = "done";
  outcome.last.rows = outcome.last.rows_total = rows;
  outcome.last.recomputed_rows = recomputed;
  outcome.last.moved_bytes = 1000 * rows;
  outcome.last.pause_ms = 7;
  outcome.last.total_ms = 100;
  return outcome;
}

TEST(StressLogTest, OnlyAMoveOfEveryRowCounts) {
  StressLog log;
  log.AddMove("cmpl-a", 0, Moved(1500));
  log.AddMove("cmpl-a", 0, Moved(4000));
  log.AddMove("cmpl-b", 1, Moved(160));
  log.AddMove("cmpl-b", 0, Moved(5000, 1));
  MoveOutcome part = Moved(5000);
  part.last.rows = 4999;
  log.AddMove("cmpl-b", 0, part);
  MoveOutcome failed;
  failed.code = "no_room";
  log.AddMove("cmpl-b", 0, failed);
  log.AddFailure("migration", "no answer");
  log.AddFault("death");
  StreamOutcome stream;
  stream.name = "cmpl-b";
  stream.choices = {Steady(10, 0, 0), Steady(200, 61, 52)};
  log.AddStream(std::move(stream), 100, "");
  log.AddStream({}, 10, "refused");

  const json::Object report = log.Report(60);
  const auto number = [&](const char* key) { return static_cast<int>(Number(report, key)); };
  EXPECT_EQ(number("migrations"), 3);
  EXPECT_EQ(number("migrations_of_1000_rows"), 2);
  EXPECT_EQ(number("migrations_of_4000_rows"), 1);
  EXPECT_EQ(number("replaying_migrations"), 2);
  EXPECT_EQ(boost::json::serialize(report.at("failed_migrations")),
            R"({"no answer":1,"no_room":1})");
  EXPECT_EQ(number("moved_bytes"), 5'660'000);
  EXPECT_EQ(number("worker_deaths"), 1);
  EXPECT_EQ(number("streams"), 2);
  EXPECT_EQ(number("sequences"), 2);
  EXPECT_EQ(number("violations"), 1);
  EXPECT_THAT(log.violations(), ElementsAre("a request: refused"));
  const json::Object& pause =
      report.at("pause_ms").as_object();  // of the one whose stream is known
  EXPECT_NEAR(Number(pause, "max"), 42, 1e-6);
  EXPECT_EQ(Number(pause, "count"), 1);
  EXPECT_EQ(Number(report.at("pause_told_ms").as_object(), "p50"), 7);
  EXPECT_EQ(
      boost::json::serialize(report.at("skipped_faults")),
      R"(["stop","coordinator stop","reshape","drain","partition","bandwidth limit","join","leave"])");
  EXPECT_EQ(boost::json::serialize(report.at("move_rows_histogram")),
            boost::json::serialize(json::Value{{{"from", 128.0}, {"to", 256.0}, {"count", 1u}},
                                               {{"from", 256.0}, {"to", 512.0}, {"count", 0u}},
                                               {{"from", 512.0}, {"to", 1000.0}, {"count", 0u}},
                                               {{"from", 1000.0}, {"to", 2000.0}, {"count", 1u}},
                                               {{"from", 2000.0}, {"to", 3000.0}, {"count", 0u}},
                                               {{"from", 3000.0}, {"to", 4000.0}, {"count", 0u}},
                                               {{"from", 4000.0}, {"to", 6000.0}, {"count", 1u}}}));
  ASSERT_EQ(report.at("moves").as_array().size(), 3u);
  const json::Array& last = report.at("moves").as_array()[2].as_array();
  EXPECT_EQ(last[1].to_number<int>(), 160);
  EXPECT_NEAR(last[4].to_number<double>(), 42, 1e-6);
  EXPECT_TRUE(report.at("moves").as_array()[0].as_array()[4].is_null());
  // 5.66 MB in 300 ms.
  EXPECT_NEAR(Number(report, "gb_per_s"), 0.01887, 1e-5);
  const json::Object& timeline = report.at("timeline").as_object();
  EXPECT_EQ(Number(timeline, "bin_s"), 1);
  EXPECT_EQ(timeline.at("tokens").as_array().size(), 60u);
  EXPECT_EQ(timeline.at("death").as_array()[0].to_number<int>(), 1);
  EXPECT_EQ(timeline.at("migration").as_array()[0].to_number<int>(), 5);
}

// ---- By time, by size ----

TEST(StressTimelineTest, CountsByTimeInFewBinsAndLosesNothing) {
  EXPECT_EQ(BinSeconds(0.5), 1);
  EXPECT_EQ(BinSeconds(120), 1);
  EXPECT_EQ(BinSeconds(121), 2);
  EXPECT_EQ(BinSeconds(600), 5);
  // What is outside, by clocks that do not agree to the last digit, is at the ends.
  EXPECT_EQ(boost::json::serialize(CountByTime({-0.1, 0, 0.99, 1, 2.5, 3, 7}, 3)), "[3,1,3]");
  EXPECT_EQ(boost::json::serialize(CountByTime({599, 4.9, 5}, 600)).substr(0, 6), "[1,1,0");
  EXPECT_EQ(CountByTime({}, 600).size(), 120u);
}

TEST(StressTimelineTest, ARangeHasItsLowerEdge) {
  const auto counted = CountBySize({0, 9.9, 10, 99}, {0, 10, 20, 50, 100, 200});
  ASSERT_EQ(counted.size(), 4u);
  EXPECT_EQ(Number(counted[0].as_object(), "count"), 2);
  EXPECT_EQ(Number(counted[1].as_object(), "count"), 1);
  EXPECT_EQ(Number(counted[2].as_object(), "count"), 0);
  EXPECT_EQ(Number(counted[3].as_object(), "to"), 100);
  EXPECT_TRUE(CountBySize({}, {0, 1}).empty());
}

TEST(StressTimelineTest, ManyPointsBecomeEveryNth) {
  json::Array points(kMaxPoints * 2 + 1);
  for (size_t i = 0; i < points.size(); ++i) points[i] = i;
  const json::Array some = Some(points);
  EXPECT_LE(some.size(), kMaxPoints);
  EXPECT_EQ(some[1].to_number<int>(), 3);
  points.resize(kMaxPoints);
  EXPECT_EQ(Some(points).size(), kMaxPoints);
}

// ---- Acceptance ----

json::Object Accepted() {
  json::Object report;
  for (const FaultKind& kind : kFaultKinds) report[kind.member] = 100;
  report["seconds"] = 600.0;
  report["migrations"] = 1000;
  report["migrations_of_1000_rows"] = 500;
  report["migrations_of_4000_rows"] = 100;
  report["reshapes"] = 20;
  report["protected_share"] = 0.99;
  report["violations"] = 0;
  report["skipped_faults"] = json::Array();
  return report;
}

TEST(StressGoalsTest, EachGoalThatIsNotReachedIsTold) {
  EXPECT_THAT(Missed(Accepted(), StressGoals()), ElementsAre());
  for (const auto& [key, value, told] :
       {std::tuple("seconds", json::Value(599.9), "seconds: 599.9, at least 600"),
        std::tuple("migrations", json::Value(999), "migrations: 999, at least 1000"),
        std::tuple("migrations_of_1000_rows", json::Value(499),
                   "migrations of 1,000 rows and more: 49.9 %, at least 50 %"),
        std::tuple("migrations_of_4000_rows", json::Value(99),
                   "migrations of 4,000 rows and more: 9.9 %, at least 10 %"),
        std::tuple("worker_deaths", json::Value(99), "worker_deaths: 99, at least 100"),
        std::tuple("reshapes", json::Value(19), "reshapes: 19, at least 20"),
        std::tuple("protected_share", json::Value(0.98999),
                   "protected_share: 98.9 %, at least 99 %"),
        std::tuple("violations", json::Value(1), "violations: 1, none is allowed"),
        std::tuple("skipped_faults", json::Value{"partition"}, "skipped: partition")}) {
    json::Object report = Accepted();
    report[key] = value;
    EXPECT_THAT(Missed(report, StressGoals()), ElementsAre(told)) << key;
  }
  // Without copies no share is told.
  json::Object report = Accepted();
  report.erase("protected_share");
  EXPECT_THAT(Missed(report, StressGoals()), ElementsAre("protected_share: 0 %, at least 99 %"));
}

TEST(StressGoalsTest, AnEmptyRunMissesEverything) {
  const StressLog log;
  const std::vector<std::string> missed = Missed(log.Report(0), StressGoals());
  EXPECT_EQ(missed.size(), 7 + std::size(kFaultKinds));
}

// ---- Signals ----

TEST(StressDisturbTest, OnlyChildrenOfThisProcessAreSignalled) {
  EXPECT_FALSE(SignalChild(0, SIGCONT));
  EXPECT_FALSE(SignalChild(1, SIGCONT));
  EXPECT_FALSE(SignalChild(getppid(), SIGCONT));
  EXPECT_FALSE(SignalChild(getpid(), SIGCONT));
  const pid_t child = fork();
  if (child == 0) {
    pause();
    _exit(0);
  }
  EXPECT_TRUE(SignalChild(child, SIGKILL));
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFSIGNALED(status));
  EXPECT_FALSE(SignalChild(child, SIGKILL));
}

}  // namespace
}  // namespace strait::cli

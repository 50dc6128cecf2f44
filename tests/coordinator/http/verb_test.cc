// SPDX-License-Identifier: Apache-2.0
//
// Defends: the elastic verbs reach the engine as they were asked, and nobody without the operator
// key does; a refusal has its status, a report its line; a client that goes away stops nothing.
#include "coordinator/http/verb_request.h"

#include <string>
#include <vector>

#include "coordinator/http/openai.h"
#include "tests/coordinator/http/api_fixture.h"

namespace strait {
namespace {

constexpr char kKey[] = "operator-key-of-this-test";
const HttpHeaders kOperator = {{"authorization", std::string("Bearer ") + kKey}};

class VerbTest : public ApiTest {
 protected:
  void SetUp() override { Use(TestModel(), {}, kKey); }

  std::shared_ptr<RecordingResponder> Migrate(const std::string& body) {
    return Begin("POST", "/strait/migrate", body, kOperator);
  }
  static std::vector<json::Object> Lines(const RecordingResponder& responder) {
    std::vector<json::Object> lines;
    size_t at = 0;
    while (at < responder.stream.size()) {
      const size_t end = responder.stream.find('\n', at);
      EXPECT_NE(end, std::string::npos) << "half a line: " << responder.stream.substr(at);
      if (end == std::string::npos) break;
      lines.push_back(
          json::Parse(responder.stream.substr(at, end - at), "line").value().as_object());
      at = end + 1;
    }
    return lines;
  }
  static MoveReport Report(std::string phase, uint32_t rows) {
    MoveReport report;
    report.sequence = SequenceId{12};
    report.from = PipelineId{1};
    report.to = PipelineId{2};
    report.phase = std::move(phase);
    report.rounds = 2;
    report.rows = rows;
    report.rows_total = 100;
    report.moved_bytes = 1000 * rows;
    report.pause_us = 2345;
    report.total_us = 300'000'007;
    return report;
  }
};

TEST_F(VerbTest, AMoveReachesTheEngineAsItWasAsked) {
  Migrate(R"({"sequence": "cmpl-abc/1", "to": 2})");
  Migrate(
      R"({"sequence": "12", "to": 3, "dry_run": true, "timeout": 1.5, "force_numerics": true})");
  Migrate(R"({"sequence": 7, "to": 1, "dry_run": null, "timeout": null})");
  ASSERT_EQ(engine_.moves.size(), 3u);
  const MigrateSpec& plain = engine_.moves[0].first;
  EXPECT_EQ(plain.sequence, "cmpl-abc/1");
  EXPECT_EQ(plain.to, PipelineId{2});
  EXPECT_FALSE(plain.dry_run || plain.force_numerics);
  EXPECT_EQ(plain.timeout_us, 0u);
  const MigrateSpec& full = engine_.moves[1].first;
  EXPECT_EQ(full.sequence, "12");
  EXPECT_TRUE(full.dry_run && full.force_numerics);
  EXPECT_EQ(full.timeout_us, 1'500'000u);
  EXPECT_EQ(engine_.moves[2].first.sequence, "7");
}

TEST_F(VerbTest, WhatIsNoMoveNamesTheFieldAndTheFix) {
  struct Bad {
    const char* body;
    const char* param;
    const char* in_message;
  };
  const Bad cases[] = {
      {"", "", "cut off"},
      {"[]", "", "must be a JSON object"},
      {"{}", "sequence", "\\\"sequence\\\" is missing"},
      {R"({"to": 2})", "sequence", "GET /strait/status"},
      {R"({"sequence": "", "to": 2})", "sequence", "1 to 256"},
      {R"({"sequence": -1, "to": 2})", "sequence", "must be a string, not an integer"},
      {R"({"sequence": true, "to": 2})", "sequence", "must be a string, not a boolean"},
      {R"({"sequence": ["1"], "to": 2})", "sequence", "must be a string, not an array"},
      {R"({"sequence": "1"})", "to", "\\\"to\\\" is missing"},
      {R"({"sequence": "1", "to": "2"})", "to", "must be an integer, not a string"},
      {R"({"sequence": "1", "to": 0})", "to", "from 1 to"},
      {R"({"sequence": "1", "to": 1.5})", "to", "integer"},
      {R"({"sequence": "1", "to": 4294967296})", "to", "from 1 to"},
      {R"({"sequence": "1", "to": 2, "dry_run": 1})", "dry_run", "true or false"},
      {R"({"sequence": "1", "to": 2, "timeout": 0})", "timeout", "greater than 0"},
      {R"({"sequence": "1", "to": 2, "timeout": 1e6})", "timeout", "at most 86400"},
      {R"({"sequence": "1", "to": 2, "timeout": "5"})", "timeout", "must be a number"},
      {R"({"sequence": "1", "to": 2, "force_numerics": "yes"})", "force_numerics", "true or false"},
      {R"({"sequence": "1", "to": 2, "dryrun": true})", "dryrun", "it takes \\\"sequence\\\""},
  };
  for (const Bad& bad : cases) {
    ExpectError(*Migrate(bad.body), 400, bad.param, bad.in_message, bad.body);
  }
  const std::string name = R"({"to": 2, "sequence": ")" + std::string(257, 'x') + "\"}";
  ExpectError(*Migrate(name), 400, "sequence", "257 bytes", "a long name");
  for (const char* body : {"{}", R"({"stages": 0})", R"({"stages": 257})", R"({"stages": "2"})"}) {
    ExpectError(*Begin("POST", "/strait/scale", body, kOperator), 400, "stages", "stages", body);
  }
  ExpectError(*Begin("POST", "/strait/scale", R"({"stages": 2, "pipelines": 1})", kOperator), 400,
              "pipelines", "it takes", "pipelines");
  EXPECT_TRUE(engine_.moves.empty() && engine_.scales.empty());
}

TEST_F(VerbTest, ReportsAreLinesAndTheLastOneIsTheEnd) {
  auto responder = Migrate(R"({"sequence": "12", "to": 2})");
  EXPECT_FALSE(responder->sent || responder->stream_head);
  VerbListener& listener = *engine_.moves.at(0).second;
  listener.OnMove(Report("copy", 64));
  responder->RunPosts();
  ASSERT_TRUE(responder->stream_head);
  EXPECT_EQ(responder->stream_head->status, 200);
  EXPECT_EQ(responder->stream_head->content_type, "application/x-ndjson");
  // Two that come before anybody takes them are one.
  listener.OnMove(Report("copy", 65));
  listener.OnMove(Report("freeze", 90));
  responder->RunPosts();
  listener.OnMove(Report("done", 100));
  listener.OnVerbEnd(absl::OkStatus());
  responder->RunPosts();
  EXPECT_TRUE(responder->stream_ended);
  EXPECT_EQ(responder->stream.substr(0, responder->stream.find('\n')),
            R"({"event":"progress","sequence":12,"from":1,"to":2,"phase":"copy","rounds":2,)"
            R"("rows":64,"rows_total":100,"moved_bytes":64000,"shared_bytes":0,"nccl_bytes":0,)"
            R"("recomputed_rows":0,)"
            R"("pause_ms":2.345,"total_ms":300000.007})");
  const auto lines = Lines(*responder);
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_EQ(lines[1].at("event"), "progress");
  EXPECT_EQ(lines[1].at("phase"), "freeze");
  EXPECT_EQ(lines[2].at("event"), "done");
  EXPECT_EQ(lines[2].at("rows"), 100);
}

TEST_F(VerbTest, ADryRunEndsWithOneLine) {
  auto responder = Migrate(R"({"sequence": "12", "to": 2, "dry_run": true})");
  engine_.moves.at(0).second->OnMove(Report("reserve", 0));
  engine_.moves.at(0).second->OnVerbEnd(absl::OkStatus());
  responder->RunPosts();
  const auto lines = Lines(*responder);
  ASSERT_EQ(lines.size(), 1u);
  EXPECT_EQ(lines[0].at("event"), "done");
}

TEST_F(VerbTest, ARefusalHasTheStatusOfItsKind) {
  const std::pair<absl::Status, std::pair<int, const char*>> kinds[] = {
      {absl::InvalidArgumentError("why"), {400, "null"}},
      {absl::NotFoundError("why"), {404, "\"not_found\""}},
      {absl::FailedPreconditionError("why"), {409, "\"not_now\""}},
      {absl::CancelledError("why"), {409, "\"cancelled\""}},
      {absl::InternalError("why"), {500, "\"internal_error\""}},
      {absl::UnimplementedError("why"), {501, "\"not_implemented\""}},
      {absl::AbortedError("why"), {503, "\"aborted\""}},
      {absl::UnavailableError("why"), {503, "\"unavailable\""}},
      {absl::DeadlineExceededError("why"), {504, "\"deadline_exceeded\""}},
      {absl::ResourceExhaustedError("why"), {507, "\"no_room\""}},
  };
  for (const auto& [status, expected] : kinds) {
    auto responder = Migrate(R"({"sequence": "12", "to": 2})");
    engine_.moves.back().second->OnVerbEnd(status);
    responder->RunPosts();
    ExpectError(*responder, expected.first, "", "why", status.ToString());
    EXPECT_NE(responder->sent->body.find(std::string("\"code\":") + expected.second),
              std::string::npos)
        << responder->sent->body;
  }
}

TEST_F(VerbTest, AMoveThatFailsHalfWaySaysSoInItsLastLine) {
  auto responder = Migrate(R"({"sequence": "12", "to": 2})");
  VerbListener& listener = *engine_.moves.at(0).second;
  listener.OnMove(Report("copy", 64));
  listener.OnVerbEnd(absl::AbortedError("worker 3 is lost; the sequence goes on where it was"));
  responder->RunPosts();
  EXPECT_TRUE(responder->stream_ended);
  const auto lines = Lines(*responder);
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_EQ(lines[0].at("event"), "progress");
  EXPECT_EQ(lines[1].at("event"), "error");
  const json::Object& error = lines[1].at("error").as_object();
  EXPECT_EQ(error.at("code"), "aborted");
  EXPECT_EQ(error.at("type"), "server_error");
  EXPECT_NE(ToText(error.at("message")).find("worker 3 is lost"), std::string::npos);
}

TEST_F(VerbTest, AClientThatGoesAwayOnlyDetaches) {
  auto responder = Migrate(R"({"sequence": "12", "to": 2})");
  VerbListener& listener = *engine_.moves.at(0).second;
  listener.OnMove(Report("copy", 64));
  responder->RunPosts();
  responder->Abandon(AbandonReason::kClientGone);
  listener.OnMove(Report("done", 100));
  listener.OnVerbEnd(absl::OkStatus());
  responder->RunPosts();
  EXPECT_EQ(Lines(*responder).size(), 1u);
  EXPECT_TRUE(engine_.cancelled().empty());
  EXPECT_EQ(engine_.moves.size(), 1u);
}

TEST_F(VerbTest, AServerThatStopsSaysSo) {
  auto before = Migrate(R"({"sequence": "12", "to": 2})");
  before->Abandon(AbandonReason::kServerStopping);
  ExpectError(*before, 503, "", "stopping", "before the first report");
  auto under_way = Migrate(R"({"sequence": "12", "to": 2})");
  engine_.moves.at(1).second->OnMove(Report("copy", 64));
  under_way->RunPosts();
  under_way->Abandon(AbandonReason::kServerStopping);
  EXPECT_TRUE(under_way->stream_ended);
  EXPECT_EQ(Lines(*under_way).at(1).at("event"), "error");
  handler_->SetDraining(true);
  ExpectError(*Migrate(R"({"sequence": "12", "to": 2})"), 503, "", "stopping", "draining");
}

TEST_F(VerbTest, ADrainReachesTheEngineAndItsReportsAreLines) {
  const auto drain = [&](const std::string& body) {
    return Begin("POST", "/strait/drain", body, kOperator);
  };
  auto responder = drain(R"({"worker": "worker-1"})");
  drain(R"({"worker": 3, "dry_run": true, "timeout": 1.5})");
  drain(R"({"worker": "3", "undo": true, "timeout": null})");
  ASSERT_EQ(engine_.drains.size(), 3u);
  EXPECT_EQ(engine_.drains[0].first.worker, "worker-1");
  EXPECT_FALSE(engine_.drains[0].first.dry_run || engine_.drains[0].first.undo);
  EXPECT_EQ(engine_.drains[0].first.timeout_us, 0u);
  EXPECT_EQ(engine_.drains[1].first.worker, "3");
  EXPECT_TRUE(engine_.drains[1].first.dry_run);
  EXPECT_EQ(engine_.drains[1].first.timeout_us, 1'500'000u);
  EXPECT_TRUE(engine_.drains[2].first.undo);
  DrainReport report;
  report.worker = WorkerId{3};
  report.name = "worker-1";
  report.pipeline = PipelineId{2};
  report.way = "move";
  report.phase = "moving";
  report.sequences_left = 4;
  report.sequences_moved = 5;
  report.moved_bytes = 6;
  report.pause_us = 1500;
  report.total_us = 2000;
  engine_.drains[0].second->OnDrain(report);
  responder->RunPosts();
  EXPECT_EQ(responder->stream,
            R"({"event":"progress","worker_id":3,"worker":"worker-1","pipeline":2,"way":"move",)"
            R"("phase":"moving","sequences_left":4,"sequences_moved":5,"moved_bytes":6,)"
            R"("rows_kept":0,"rows_lost":0,"pause_ms":1.500,"total_ms":2.000})"
            "\n");
  report.phase = "done";
  engine_.drains[0].second->OnDrain(report);
  engine_.drains[0].second->OnVerbEnd(absl::OkStatus());
  responder->RunPosts();
  EXPECT_TRUE(responder->stream_ended);
  EXPECT_EQ(Lines(*responder).at(1).at("event"), "done");
}

TEST_F(VerbTest, WhatIsNoDrainNamesTheFieldAndTheFix) {
  const auto refused = [&](const std::string& body, const char* param, const char* in_message) {
    ExpectError(*Begin("POST", "/strait/drain", body, kOperator), 400, param, in_message, body);
  };
  refused("{}", "worker", "GET /strait/status");
  refused(R"({"worker": ""})", "worker", "1 to 256");
  refused(R"({"worker": -1})", "worker", "must be a string, not an integer");
  refused(R"({"worker": "1", "undo": 1})", "undo", "true or false");
  refused(R"({"worker": "1", "timeout": 0})", "timeout", "greater than 0");
  refused(R"({"worker": "1", "to": 2})", "to", "it takes");
  ExpectError(*Begin("POST", "/strait/drain", R"({"worker": "1"})", {}), 403, "", "operator",
              "without a key");
  EXPECT_TRUE(engine_.drains.empty());
}

TEST_F(VerbTest, AScaleAnswersOnce) {
  auto responder = Begin("POST", "/strait/scale", R"({"stages": 3})", kOperator);
  ASSERT_EQ(engine_.scales.size(), 1u);
  EXPECT_EQ(engine_.scales[0].spec.num_stages, 3u);
  engine_.scales[0].done(
      absl::OkStatus(),
      {.pipelines = 2,
       .pause_us = 1500,
       .rows_kept = 640,
       .rows_lost = 7,
       .moved_bytes = 9,
       .pauses = {.residents = 3, .min_us = 900, .p50_us = 1000, .max_us = 1400}});
  responder->RunPosts();
  ASSERT_TRUE(responder->sent);
  EXPECT_EQ(
      responder->sent->body,
      R"({"pipelines":2,"pause_ms":1.500,"rows_kept":640,"rows_lost":7,"moved_bytes":9,)"
      R"("residents":{"count":3,"pause_min_ms":0.900,"pause_p50_ms":1.000,"pause_max_ms":1.400}})");
  auto refused = Begin("POST", "/strait/scale", R"({"stages": 3})", kOperator);
  engine_.scales.at(1).done(absl::FailedPreconditionError("another scale is under way"), {});
  refused->RunPosts();
  ExpectError(*refused, 409, "", "another scale", "not now");
}

TEST_F(VerbTest, AScaleTellsHowItGoesWhereThatIsAskedFor) {
  auto responder = Begin("POST", "/strait/scale", R"({"stages": 3, "progress": true})", kOperator);
  ScaleReport report{.num_stages = 3,
                     .pipelines_total = 2,
                     .pipeline = PipelineId{1},
                     .phase = "copying",
                     .bytes_loaded = 7,
                     .bytes_to_load = 8,
                     .rows = 100,
                     .rows_total = 200,
                     .moved_bytes = 300,
                     .edges_up = 1,
                     .edges_total = 2,
                     .total_us = 2500};
  engine_.scales.at(0).progress(report);
  responder->RunPosts();
  const std::string line =
      R"("stages":3,"pipelines_done":0,"pipelines_total":2,"pipeline":1,"phase":"copying",)"
      R"("bytes_loaded":7,"bytes_to_load":8,"rows":100,"rows_total":200,"moved_bytes":300,)"
      R"("edges_up":1,"edges_total":2,"total_ms":2.500})";
  EXPECT_EQ(responder->stream, "{\"event\":\"progress\"," + line + "\n");
  responder->stream.clear();
  engine_.scales[0].done(absl::OkStatus(), {.pipelines = 2, .pause_us = 1500});
  responder->RunPosts();
  EXPECT_EQ(responder->stream,
            R"({"event":"done","stages":3,"pipelines":2,"pause_ms":1.500,"rows_kept":0,)"
            R"("rows_lost":0,"moved_bytes":0,"residents":{"count":0,"pause_min_ms":0.000,)"
            R"("pause_p50_ms":0.000,"pause_max_ms":0.000},"total_ms":2.500})"
            "\n");
  // One that fails under way says how far it came.
  auto failed = Begin("POST", "/strait/scale", R"({"stages": 3, "progress": true})", kOperator);
  engine_.scales.at(1).progress(report);
  engine_.scales[1].done(absl::AbortedError("a worker died"), {});
  failed->RunPosts();
  EXPECT_NE(failed->stream.find("copying"), std::string::npos) << failed->stream;
  EXPECT_NE(failed->stream.find(R"("event":"error")"), std::string::npos) << failed->stream;
}

TEST_F(VerbTest, ADryRunOfAScaleTellsThePlans) {
  for (const bool progress : {false, true}) {
    auto responder = Begin("POST", "/strait/scale",
                           progress ? R"({"stages": 2, "dry_run": true, "progress": true})"
                                    : R"({"stages": 2, "dry_run": true})",
                           kOperator);
    const FakeEngine::AskedScale& asked = engine_.scales.back();
    EXPECT_TRUE(asked.spec.dry_run);
    PlannedPipeline planned;
    planned.pipeline = PipelineId{1};
    planned.capacity_rows = 640;
    planned.stages.push_back({WorkerId{2}, "worker-1", 0, 3, 1000, 20, 30});
    planned.why = {4, 50, 48, 51, 90, "it moves the fewest bytes"};
    ScaleReport report{.num_stages = 2, .phase = "done"};
    report.plans.push_back(planned);
    asked.progress(report);
    asked.done(absl::OkStatus(), {});
    responder->RunPosts();
    const std::string plans =
        R"("dry_run":true,"plans":[{"pipeline":1,"tokens_max":640,"stages":[{"worker_id":2,)"
        R"("worker":"worker-1","layer_begin":0,"layer_end":3,"cache_bytes":1000,"load_bytes":20,)"
        R"("rows_bytes":30}],"plan":{"num_plans":4,"bottleneck_bytes":50,)"
        R"("best_bottleneck_bytes":48,"moved_bytes":51,"best_moved_bytes":90,)"
        R"("why":"it moves the fewest bytes"}}])";
    const std::string& body = progress ? responder->stream : responder->sent->body;
    EXPECT_NE(body.find(plans), std::string::npos) << body;
  }
}

// ---- Who may ----

TEST_F(VerbTest, NobodyButTheOperatorChangesTheCluster) {
  const std::string body = R"({"sequence": "12", "to": 2})";
  const auto ask = [&](const std::string& path, const HttpHeaders& headers) {
    return Begin("POST", path, path == "/strait/scale" ? R"({"stages": 2})" : body, headers);
  };
  const auto bearer = [](const std::string& key) {
    return HttpHeaders{{"authorization", "Bearer " + key}};
  };
  for (const char* path : {"/strait/migrate", "/strait/scale"}) {
    Use(TestModel(), {"api-key"}, kKey);
    ExpectError(*ask(path, {}), 403, "", "--operator-key-file", "no key");
    ExpectError(*ask(path, bearer("api-key")), 403, "", "an API key is none", "an API key");
    ExpectError(*ask(path, bearer("guessed")), 401, "", "not the operator key", "a wrong one");
    ExpectError(*ask(path, bearer("")), 401, "", "not the operator key", "an empty one");
    Use(TestModel(), {}, "");  // a coordinator without one: not even an empty key opens it
    ExpectError(*ask(path, bearer("")), 403, "", "strait up", "none is set");
    ExpectError(*ask(path, bearer(kKey)), 403, "", "has no operator key", "none is set");
  }
  EXPECT_TRUE(engine_.moves.empty() && engine_.scales.empty());
}

TEST_F(VerbTest, TheOperatorKeyOpensStatusAndFlushButNoCompletions) {
  Use(TestModel(), {"api-key"}, kKey);
  EXPECT_EQ(Begin("GET", "/strait/status", "", kOperator)->sent->status, 200);
  EXPECT_EQ(Begin("POST", "/strait/flush", "", kOperator)->sent->status, 200);
  EXPECT_EQ(Begin("GET", "/strait/status")->sent->status, 401);
  EXPECT_EQ(Begin("GET", "/v1/models", "", kOperator)->sent->status, 401);
  EXPECT_EQ(Begin("GET", "/strait/migrate", "", kOperator)->sent->status, 405);
}

// ---- Names ----

TEST_F(VerbTest, ARequestIsKnownByTheIdOfItsAnswer) {
  auto text = Begin("POST", "/v1/completions", R"({"prompt": "a", "max_tokens": 1})",
                    {{"x-request-id", "mine"}});
  auto chat = Begin("POST", "/v1/chat/completions",
                    R"({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1})");
  engine_.StepAll();
  text->RunPosts();
  chat->RunPosts();
  const auto specs = engine_.specs();
  ASSERT_EQ(specs.size(), 2u);
  EXPECT_EQ(specs[0].name, "cmpl-mine");
  EXPECT_EQ(ToText(text->Json().at("id")), "\"cmpl-mine\"");
  EXPECT_EQ("\"" + specs[1].name + "\"", ToText(chat->Json().at("id")));
  EXPECT_TRUE(specs[1].name.starts_with("chatcmpl-"));
}

}  // namespace
}  // namespace strait

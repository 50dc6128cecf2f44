// SPDX-License-Identifier: Apache-2.0
#include "coordinator/http/verb_exchange.h"

#include <cstdio>
#include <utility>

#include "coordinator/http/json_writer.h"
#include "coordinator/http/verb_request.h"
#include "coordinator/text/detokenizer.h"

namespace strait {
namespace {

// Microseconds as milliseconds, all digits.
std::string Milliseconds(uint64_t us) {
  char text[32];
  std::snprintf(text, sizeof(text), "%llu.%03u", static_cast<unsigned long long>(us / 1000),
                static_cast<unsigned>(us % 1000));
  return text;
}

std::string LineOf(const MoveReport& report, std::string_view event) {
  JsonWriter json;
  json.BeginObject().Key("event").String(event);
  json.Key("sequence").Int(report.sequence.value);
  json.Key("from").Int(report.from.value).Key("to").Int(report.to.value);
  json.Key("phase").String(Utf8Lossy(report.phase)).Key("rounds").Int(report.rounds);
  json.Key("rows").Int(report.rows).Key("rows_total").Int(report.rows_total);
  json.Key("moved_bytes").Int(report.moved_bytes);
  json.Key("shared_bytes").Int(report.shared_bytes);
  json.Key("nccl_bytes").Int(report.nccl_bytes);
  json.Key("recomputed_rows").Int(report.recomputed_rows);
  json.Key("pause_ms").Raw(Milliseconds(report.pause_us));
  json.Key("total_ms").Raw(Milliseconds(report.total_us)).EndObject();
  return json.Take() + "\n";
}

std::string LineOf(const DrainReport& report, std::string_view event) {
  JsonWriter json;
  json.BeginObject().Key("event").String(event);
  json.Key("worker_id").Int(report.worker.value).Key("worker").String(Utf8Lossy(report.name));
  json.Key("pipeline").Int(report.pipeline.value);
  json.Key("way").String(report.way).Key("phase").String(report.phase);
  json.Key("sequences_left").Int(report.sequences_left);
  json.Key("sequences_moved").Int(report.sequences_moved);
  json.Key("moved_bytes").Int(report.moved_bytes);
  json.Key("rows_kept").Int(report.rows_kept).Key("rows_lost").Int(report.rows_lost);
  json.Key("pause_ms").Raw(Milliseconds(report.pause_us));
  json.Key("total_ms").Raw(Milliseconds(report.total_us)).EndObject();
  return json.Take() + "\n";
}

std::string ScaleJson(const ScaleOutcome& outcome) {
  JsonWriter json;
  json.BeginObject().Key("pipelines").Int(outcome.pipelines);
  json.Key("pause_ms").Raw(Milliseconds(outcome.pause_us));
  json.Key("rows_kept").Int(outcome.rows_kept).Key("rows_lost").Int(outcome.rows_lost);
  json.Key("moved_bytes").Int(outcome.moved_bytes).EndObject();
  return json.Take();
}

// {"event":"error","error":{…}}
std::string ErrorLine(const ApiError& error) {
  std::string object = ErrorJson(error);
  return "{\"event\":\"error\"," + object.substr(1) + "\n";
}

}  // namespace

VerbExchange::VerbExchange(std::shared_ptr<ApiState> state, std::string route,
                           std::string request_id, std::shared_ptr<Responder> responder)
    : state_(std::move(state)),
      route_(std::move(route)),
      request_id_(std::move(request_id)),
      responder_(std::move(responder)) {}

// What comes back before the client is known to be there waits for the posts, as all else.
void VerbExchange::Watch() {
  responder_->OnAbandon(
      [self = shared_from_this()](AbandonReason reason) { self->Abandoned(reason); });
}

void VerbExchange::Migrate(MigrateSpec spec) {
  Watch();
  state_->engine->Migrate(std::move(spec), shared_from_this());
}

void VerbExchange::Drain(DrainSpec spec) {
  Watch();
  state_->engine->Drain(std::move(spec), shared_from_this());
}

void VerbExchange::Scale(uint32_t num_stages) {
  Watch();
  state_->engine->Scale(num_stages,
                        [self = shared_from_this()](absl::Status status, ScaleOutcome outcome) {
                          std::lock_guard lock(self->mu_);
                          self->ended_ = Ended{std::move(status), outcome};
                          self->Post();
                        });
}

// ---- The engine's thread ----

void VerbExchange::OnMove(MoveReport report) {
  std::lock_guard lock(mu_);
  report_ = std::move(report);
  Post();
}

void VerbExchange::OnDrain(DrainReport report) {
  std::lock_guard lock(mu_);
  report_ = std::move(report);
  Post();
}

void VerbExchange::OnVerbEnd(absl::Status status) {
  std::lock_guard lock(mu_);
  ended_ = Ended{std::move(status), std::nullopt};
  Post();
}

// After closing, no post is made, so the server may end its threads.
void VerbExchange::Post() {
  if (closed_ || std::exchange(posted_, true)) return;
  responder_->Post([self = shared_from_this()] { self->Take(); });
}

// ---- The Responder's posts ----

void VerbExchange::Take() {
  std::optional<Report> report;
  std::optional<Ended> ended;
  {
    std::lock_guard lock(mu_);
    report.swap(report_);
    ended.swap(ended_);
    posted_ = false;
  }
  if (finished_) return;
  if (report) last_ = std::move(report);
  if (ended) return End(*ended);
  if (last_) Tell(*last_, "progress");
}

void VerbExchange::Tell(const Report& report, std::string_view event) {
  std::string line = std::visit([&](const auto& told) { return LineOf(told, event); }, report);
  if (std::exchange(streaming_, true)) return responder_->Write(std::move(line));
  HttpResponse head;
  head.content_type = "application/x-ndjson";
  head.headers = Headers();
  head.headers.emplace_back("Cache-Control", "no-cache");
  head.headers.emplace_back("X-Accel-Buffering", "no");
  head.body = std::move(line);
  responder_->StartStream(std::move(head), "");
}

void VerbExchange::End(const Ended& ended) {
  if (!ended.status.ok()) {
    if (last_ && !streaming_) Tell(*last_, "progress");  // how far it came, then why no further
    return Fail(ToVerbError(ended.status));
  }
  if (ended.outcome) {
    HttpResponse response;
    response.headers = Headers();
    response.body = ScaleJson(*ended.outcome);
    responder_->Send(std::move(response));
  } else {
    Tell(last_.value_or(MoveReport{}), "done");
    responder_->EndStream();
  }
  Finish(200);
}

void VerbExchange::Fail(const ApiError& error) {
  if (streaming_) {
    responder_->Write(ErrorLine(error));
    responder_->EndStream();
  } else {
    HttpResponse response = ErrorResponse(error);
    for (auto& header : Headers()) response.headers.push_back(std::move(header));
    responder_->Send(std::move(response));
  }
  Finish(error.status);
}

void VerbExchange::Abandoned(AbandonReason reason) {
  if (finished_) return;
  if (reason == AbandonReason::kServerStopping) {
    return Fail({503, "the server is stopping", "", "stopping"});
  }
  constexpr int kClientGoneStatus = 499;  // for metrics; nobody receives it
  Finish(kClientGoneStatus);
}

void VerbExchange::Finish(int status) {
  if (std::exchange(finished_, true)) return;
  {
    std::lock_guard lock(mu_);
    closed_ = true;
    report_.reset();
  }
  state_->metrics.CountAnswer(route_, status);
}

HttpHeaders VerbExchange::Headers() const { return {{"X-Request-Id", request_id_}}; }

}  // namespace strait

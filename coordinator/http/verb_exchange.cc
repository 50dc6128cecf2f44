// SPDX-License-Identifier: Apache-2.0
#include "coordinator/http/verb_exchange.h"

#include <utility>

#include "coordinator/http/verb_lines.h"

namespace strait {
namespace {

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

void VerbExchange::Scale(ScaleRequest request) {
  Watch();
  streams_ = request.progress;
  const bool dry_run = request.spec.dry_run;
  state_->engine->Scale(
      request.spec,
      [self = shared_from_this()](ScaleReport report) {
        std::lock_guard lock(self->mu_);
        self->report_ = std::move(report);
        self->Post();
      },
      [self = shared_from_this(), dry_run](absl::Status status, ScaleOutcome outcome) {
        std::lock_guard lock(self->mu_);
        self->ended_ = Ended{std::move(status), std::nullopt};
        if (!dry_run) self->ended_->outcome = outcome;
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
  if (last_ && streams_) Tell(*last_, "progress");
}

void VerbExchange::Tell(const Report& report, std::string_view event) {
  Line(std::visit([&](const auto& told) { return LineOf(told, event); }, report));
}

void VerbExchange::Line(std::string line) {
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
    if (last_ && streams_ && !streaming_)
      Tell(*last_, "progress");  // how far it came, then why no further
    return Fail(ToVerbError(ended.status));
  }
  const ScaleReport* const scale = last_ ? std::get_if<ScaleReport>(&*last_) : nullptr;
  if (!ended.outcome && scale == nullptr) {
    Tell(last_.value_or(MoveReport{}), "done");
  } else if (streams_) {
    Line(ScaleEndLine(ended.outcome, scale ? *scale : ScaleReport()));
  } else {
    HttpResponse response;
    response.headers = Headers();
    response.body = ended.outcome ? OutcomeJson(*ended.outcome) : PlansJson(*scale);
    responder_->Send(std::move(response));
    return Finish(200);
  }
  responder_->EndStream();
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
